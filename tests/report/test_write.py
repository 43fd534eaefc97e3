"""The files of a report."""

from __future__ import annotations

import csv
import html.parser
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, hft
from report_runs import write_run

from hft_cli.errors import UserError
from hft_cli.report.tables import Section, Table, columns
from hft_cli.report.write import render_page, report


class Page(html.parser.HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.alternatives: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for key in ("src", "href") if (value := values.get(key))]
        self.ids += [values["id"]] if values.get("id") else []
        self.alternatives += [values.get("alt") or ""] if tag == "img" else []
        if tag not in ("meta", "img", "br", "link"):
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    write_run(tmp_path / "a<script>alert(1)", "fft")
    write_run(tmp_path / "b", r=[[0.8, None], [0.4, 0.6]])
    report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags == []
    assert text.count("<script") == 1  # that sorts tables
    assert "alert(1)" in text
    assert "<script>alert(1)" not in text
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    contents = [link[1:] for link in page.links if link.startswith("#")]
    assert contents
    assert set(contents) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(page.alternatives)
    assert "From the paper" in text


def test_a_long_table_is_cut_on_the_page_only():
    long = Table("long", "Long.", columns("n"), [{"n": f"row {i}"} for i in range(70)])
    hidden = Table("hidden", "Hidden.", columns("n"), [{"n": "secret"}], csv_only=True)
    for template in ("report.html.jinja", "report.md.jinja"):
        page = render_page(template, "T", [Section("S", ["A & B"], [long, hidden])], {})
        assert "row 59" in page
        assert "row 60" not in page
        assert "the first 60 of 70 rows; long.csv has all" in page
        assert "secret" not in page
        assert ("A &amp; B" in page) == ("html" in template)


def test_the_same_runs_give_the_same_bytes(tmp_path):
    write_run(tmp_path / "runs/a", "fft", r=[[0.8, None], [0.4, 0.6]])
    write_run(tmp_path / "runs/b", seed=1)
    write_run(tmp_path / "runs/c", seed=2)
    report([tmp_path / "runs"], tmp_path / "one")
    assert hft("report", tmp_path / "runs", "--out", tmp_path / "two").status == 0  # in a process with other hashes
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one.keys() >= {"tradeoff.svg", "tradeoff.png", "report.html", "runs.md", "runs.csv", "runs.json"}
    assert one == two


def test_a_second_report_leaves_nothing_of_the_first(tmp_path):
    """Only files of a report go: a user's own stay."""
    write_run(tmp_path / "runs/a", "fft", r=[[0.8, None], [0.4, 0.6]])
    write_run(tmp_path / "runs/b", seed=1)
    write_run(tmp_path / "runs/c", seed=2)
    write_run(tmp_path / "few/a")
    out = tmp_path / "out"
    report([tmp_path / "runs"], out)
    (out / "mine.png").write_bytes(b"")
    report([tmp_path / "few"], out)
    report([tmp_path / "few"], tmp_path / "fresh")
    kept, fresh = ({path.name for path in folder.iterdir()} for folder in (out, tmp_path / "fresh"))
    assert kept - fresh == {"mine.png"}


def test_every_file_has_a_temporary_name_first(tmp_path, monkeypatch):
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", "fft")
    opened, real = [], Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *more, **options: opened.append(path) or real(path, *more, **options)
    )
    report([tmp_path / "runs"], tmp_path / "out")
    names = [path.name for path in opened if path.parent == tmp_path / "out"]
    assert [name for name in names if not name.endswith(".part")] == []
    assert {name for name in names if ".png." in name}


def test_columns_that_others_read_are_there(tmp_path):
    write_run(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]], model="llama2_7b", data="trace")
    said = report([tmp_path], tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines())
    assert {"run", "status", "method", "selection", "learning_rate", "seed", "draw_seed", "updated", "skill",
            "retained", "train_seconds", "peak_memory_bytes", "op", "bwt", "scores"} <= row.keys()  # fmt: skip
    assert json.loads(row["scores"])["pocket/facts"] == {"before": 1.0, "after": 0.7}
    (same,) = json.loads((tmp_path / "out/runs.json").read_text())
    assert same["op"] == pytest.approx(0.5)
    tables = json.loads((tmp_path / "out/report.json").read_text())
    assert tables["sequences"]["rows"][0]["op"] == pytest.approx(0.5)
    assert [name for name, entry in tables.items() if entry["of_the_paper"]] == ["paper_trace"]
    assert (tmp_path / "out/runs.md").read_text().strip() in said


def test_mistakes_are_one_line(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report([tmp_path / "run"], tmp_path / "file")
    ended = hft("report", tmp_path / "nowhere")
    assert (ended.status, ended.err.count("\n")) == (2, 1)


def test_a_hundred_runs_are_reported(tmp_path):
    for i in range(100):
        write_run(tmp_path / str(i), ("fft", "hft")[i % 2], seed=i // 20, rate=1e-4 * (1 + i % 20 // 2), skill=i / 100)
    report([tmp_path], tmp_path / "out")
    assert len((tmp_path / "out/runs.csv").read_text().splitlines()) == 101


def test_importing_the_report_loads_no_large_library():
    code = "import sys, hft_cli.report.write; print(sorted({'torch', 'matplotlib', 'scipy'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert ended.stdout == "[]\n"
