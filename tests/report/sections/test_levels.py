"""Section: level of selection."""

from __future__ import annotations

from report_runs import figure, sections_of, table, write_run

PAPER = {"model": "llama2_7b", "data": "trace"}


def test_levels_stand_beside_each_other_and_the_papers(tmp_path):
    for level, retained in (("category", 0.9), ("layer", 0.8), ("model", 0.7)):
        write_run(tmp_path / level, level=level, retained=retained, **PAPER)
    write_run(tmp_path / "fft", "fft", retained=0.5, **PAPER)
    sections = sections_of(tmp_path)
    assert [(record["level"], record["retained"]) for record in table(sections, "levels").records] == [
        ("all", 0.5), ("model", 0.7), ("layer", 0.8), ("category", 0.9)
    ]  # fmt: skip
    assert [record["OP"] for record in table(sections, "paper_levels").records] == [45.7, 46.9, 47.9, 51.3]
    axes = figure(sections, "levels").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "model", "layer", "category"]
