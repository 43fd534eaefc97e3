"""Section: retention at equal skill."""

from __future__ import annotations

import pytest
from report_runs import figure, section, sections_of, table, write_run


def test_retention_is_read_off_the_path_of_each_seed(tmp_path):
    # FFT keeps 1.0 - 0.5 s, HFT 1.1 - 0.5 s and, with seed 2, 0.1 more each.
    for seed in (1, 2):
        for i, rate in enumerate((1e-4, 1e-3, 1e-2)):
            for method, start in (("fft", 1.0), ("hft", 1.1)):
                skill = 0.2 + 0.3 * i
                retained = start - 0.5 * skill + 0.1 * (seed - 1)
                write_run(tmp_path / f"{method}{seed}{i}", method, seed=seed, rate=rate, skill=skill, retained=retained)
    sections = sections_of(tmp_path)
    records = table(sections, "frontier").records
    assert [record["skill"] for record in records] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    for record, skill in zip(records, (0.2, 0.5, 0.5, 0.8, 0.8), strict=True):  # of the run that learned so much
        assert record["FFT"] == pytest.approx(1.05 - 0.5 * skill)
        assert record["HFT"] == pytest.approx(1.15 - 0.5 * skill)
        assert (record["HFT - FFT"], record["HFT - FFT_sd"]) == pytest.approx((0.1, 0))
        assert record["HFT - FFT_n"] == 2
    (gap,) = table(sections, "gaps").records
    assert (gap["gap"], gap["wins"], gap["gap_n"]) == (pytest.approx(0.1), 2, 2)
    assert "The grid is coarse" in section(sections, "Retention at equal skill").text[-1]
    lines = figure(sections, "frontier").axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [pytest.approx([20, 50, 80])] * 8
    assert [line.get_label() for line in lines if not line.get_label().startswith("_")] == ["FFT", "HFT"]


def test_a_fine_grid_is_not_coarse_and_an_unequal_one_is_named(tmp_path):
    for method, rates in (("fft", 8), ("hft", 7)):
        for i in range(rates):
            write_run(tmp_path / f"{method}{i}", method, rate=1e-4 * (i + 1), skill=0.1 + 0.09 * i, retained=0.9)
    text = section(sections_of(tmp_path), "Retention at equal skill").text[-1]
    assert "largest step of skill between two of them is 9.0%" in text
    assert "coarse" not in text
    assert "unequal numbers of rates" in text


def test_methods_without_a_common_skill_have_no_table(tmp_path):
    for i, rate in enumerate((1e-4, 1e-3)):
        write_run(tmp_path / f"f{i}", "fft", rate=rate, skill=0.8 + 0.1 * i)
        write_run(tmp_path / f"h{i}", "hft", rate=rate, skill=0.2 + 0.1 * i)
    frontier = section(sections_of(tmp_path), "Retention at equal skill")
    assert "the lowest skill of one is 80.0%, the highest skill of another is 30.0%" in frontier.text[-1]
    assert len(frontier.parts) == 1
