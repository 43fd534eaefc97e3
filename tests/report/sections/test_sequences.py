"""Section: sequences of tasks."""

from __future__ import annotations

import pytest
from report_runs import figure, sections_of, table, write_run

from hft_cli.report.reading import find_runs
from hft_cli.report.sections.sequences import mean_matrix


def test_r_is_averaged_cell_by_cell(tmp_path):
    paper = {"model": "llama2_7b", "data": "trace"}
    write_run(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]], seed=1, **paper)
    write_run(tmp_path / "b", r=[[0.6, None], [0.6, 0.8]], seed=2, **paper)
    write_run(tmp_path / "c", r=[[0.6, 0.1], [0.5, 0.7]], continual="replay", **paper)
    sections = sections_of(tmp_path)
    plain, replay = table(sections, "sequences").records
    assert (plain["op"], plain["bwt"]) == pytest.approx((0.6, -0.2))
    assert (replay["setting"], replay["op"], replay["bwt"]) == ("HFT + replay", pytest.approx(0.6), pytest.approx(-0.1))
    first, second, _ = figure(sections, "r").axes
    assert [text.get_text() for text in first.texts] == ["70", "50", "70"]
    assert [text.get_text() for text in second.texts] == ["60", "10", "50", "70"]
    assert first.get_title() == "HFT\nOP 60.0, BWT -20.0, n = 2"
    assert table(sections, "paper_trace").paper


def test_mixed_replay_is_named_also_in_one_round(tmp_path):
    write_run(tmp_path / "a", continual="mixed_replay")
    write_run(tmp_path / "b")
    assert sorted(run.row.label for run in find_runs([tmp_path])) == ["HFT", "HFT + mixed replay"]


def test_every_cell_of_r_is_in_the_csv(tmp_path):
    write_run(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]])
    cells = table(sections_of(tmp_path), "r")
    assert cells.csv_only
    assert [(cell["after"], cell["task"], cell["score"]) for cell in cells.records] == [
        ("task0", "task0", 0.8), ("task0", "task1", None), ("task1", "task0", 0.4), ("task1", "task1", 0.6)
    ]  # fmt: skip


def test_cells_that_no_matrix_has_stay_empty():
    matrices = [((1.0, None), (0.0, None)), ((0.5, None), (None, 1.0))]
    assert mean_matrix(matrices) == ((0.75, None), (0.0, 1.0))
