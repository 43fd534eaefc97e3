"""Section: what was updated."""

from __future__ import annotations

import pytest
from report_runs import NAMES, figure, sections_of, table, write_run


def test_the_figure_marks_what_was_updated(tmp_path):
    updated = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    write_run(tmp_path / "run", updated=updated)
    sections = sections_of(tmp_path)
    (axes,) = figure(sections, "draws").axes
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["q", "k", "v", "o", "up", "down", "input_norm"]
    (dots,) = axes.lines
    assert {(columns[int(x)], int(y)) for x, y in dots.get_xydata()} == {("q", 0), ("up", 1)}
    (record,) = table(sections, "draws").records
    assert (record["updated"], record["frozen"], record["share"]) == (2, 12, pytest.approx(1 / 7))


def test_runs_of_one_draw_are_one_row(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", seed=seed, draw_seed=5, updated=NAMES[:7])
    write_run(tmp_path / "b", draw_seed=6, updated=NAMES[7:])
    sections = sections_of(tmp_path)
    assert [(r["draw_seed"], r["runs"]) for r in table(sections, "draws").records] == [(5, 2), (6, 1)]
    often = figure(sections, "draws_often").axes[0]
    assert {text.get_text() for text in often.texts} == {"50"}
    assert often.get_title() == "category 0.5, 2 rounds"


def test_runs_that_freeze_nothing_have_no_draws(tmp_path):
    write_run(tmp_path / "a", "fft")
    write_run(tmp_path / "b", "hft", ratio=1.0, updated=NAMES)
    assert "What was updated" not in [entry.title for entry in sections_of(tmp_path)]
