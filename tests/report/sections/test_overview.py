"""Section: the runs."""

from __future__ import annotations

from report_runs import section, sections_of, table, write_run


def test_runs_with_a_problem_are_listed(tmp_path):
    write_run(tmp_path / "good")
    write_run(tmp_path / "failed", passed=False, seed=2)
    (write_run(tmp_path / "old", seed=3) / "draws.json").unlink()
    sections = sections_of(tmp_path)
    problems = {record["run"]: record["status"] for record in table(sections, "problems").records}
    assert problems == {str(tmp_path / "failed"): "failed", str(tmp_path / "old"): "verified"}
    assert section(sections, "The runs").text[0] == "3 runs: 2 verified, 1 failed."


def test_every_run_is_a_row_in_order(tmp_path):
    write_run(tmp_path / "c", seed=2, rate=1e-4)
    write_run(tmp_path / "b", seed=1, draw_seed=7, rate=1e-4)
    write_run(tmp_path / "a", rate=1e-3)
    (write_run(tmp_path / "d", done=False) / "results.json").unlink()
    write_run(tmp_path / "f", "fft")
    body = table(sections_of(tmp_path), "runs").body
    assert [line[:4] for line in body] == [
        ["fft", "all", "0.001", "1"],
        ["hft", "category 0.5", "0.0001", "1, draw 7"],
        ["hft", "category 0.5", "0.0001", "2"],
        ["hft", "category 0.5", "0.001", "1"],
        [str(tmp_path / "d"), "", "", ""],
    ]
    assert body[0][4:] == ["+90.0", "70.0%", "59.0%", "2.0", "3 MiB", "verified"]


def test_sequences_have_their_measures(tmp_path):
    write_run(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]], continual="replay")
    runs = table(sections_of(tmp_path), "runs")
    cells = dict(zip(runs.headings, runs.body[0], strict=True))
    assert (cells["method"], cells["OP"], cells["BWT"]) == ("hft + replay", "50.0%", "-40.0")
