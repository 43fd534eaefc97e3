"""Section: methods."""

from __future__ import annotations

import pytest
from report_runs import figure, section, sections_of, table, write_run

from hft_cli.report.stats import estimate


def test_settings_have_means_deviations_and_intervals(tmp_path):
    for seed, (skill, retained) in enumerate([(0.9, 0.5), (0.8, 0.6), (0.7, 0.7)]):
        write_run(tmp_path / f"h{seed}", skill=skill, retained=retained, seed=seed)
    write_run(tmp_path / "f", "fft", skill=0.6)
    methods = table(sections_of(tmp_path), "methods")
    full, half = methods.records
    assert (full["method"], full["skill_n"], full["skill_low"], full["interval"]) == ("fft", 1, None, "none, n = 1")
    assert (half["method"], half["skill_n"], half["interval"]) == ("hft", 3, "t")
    assert (half["skill"], half["retained_sd"]) == pytest.approx((0.8, 0.1))
    assert half["skill_high"] == pytest.approx(0.8 + 4.302653 * 0.1 / 3**0.5)
    assert half["retained_low"] < 0.6 < half["retained_high"] < 0.6 + 4.302653 * 0.1 / 3**0.5  # of the logit
    assert "+80.0 (+70.0 to +90.0) [+55.2, +104.8]" in methods.markdown()


def test_runs_that_are_not_verified_count_in_no_mean(tmp_path):
    write_run(tmp_path / "a", skill=0.8)
    write_run(tmp_path / "b", skill=0.1, passed=False, seed=2)
    write_run(tmp_path / "c", skill=0.1, done=False, seed=3)
    (record,) = table(sections_of(tmp_path), "methods").records
    assert (record["skill"], record["runs"]) == (0.8, 1)


def test_differences_from_fft_are_paired_by_data_seed(tmp_path):
    for seed, base in ((1, 0.2), (2, 0.6)):
        write_run(tmp_path / f"f{seed}", "fft", seed=seed, retained=base)
        for draw in (1, 2):
            write_run(tmp_path / f"h{seed}{draw}", seed=seed, draw_seed=draw, retained=base + 0.1 * draw)
    write_run(tmp_path / "h3", seed=3, draw_seed=1, retained=0.9)  # no FFT to compare with
    write_run(tmp_path / "other", "fft", rate=7.0)
    (record,) = table(sections_of(tmp_path), "differences").records
    assert (record["setting"], record["against"], record["retained_n"]) == ("HFT lr 0.001", "FFT lr 0.001", 4)
    assert record["retained"] == pytest.approx(0.15)
    # Draws at +10 and +20: two draws say little of others, however many data seeds they were run on.
    assert record["retained_low"] < 0 < 0.3 < record["retained_high"]


def test_p_values_are_adjusted_for_the_whole_table(tmp_path):
    for seed in range(5):
        write_run(tmp_path / f"f{seed}", "fft", seed=seed, retained=0.5 + 0.01 * seed, skill=0.8 - 0.02 * seed)
        for ratio in (0.25, 0.5):
            better = 0.02 * ratio * (1 + seed % 2)
            write_run(tmp_path / f"h{ratio}{seed}", seed=seed, ratio=ratio, retained=0.5 + 0.01 * seed + better,
                      skill=0.8 - 0.02 * seed - better)  # fmt: skip
    records = table(sections_of(tmp_path), "differences").records
    one = estimate([0.01, 0.02, 0.01, 0.02, 0.01]).p
    assert [record["retained_p"] for record in records] == pytest.approx([4 * one, 4 * one])
    assert all(record["skill_p"] == pytest.approx(4 * one) for record in records)


def test_the_forest_shows_the_same_numbers(tmp_path):
    write_run(tmp_path / "a", "fft", skill=0.6, retained=0.3)
    write_run(tmp_path / "b", skill=0.5, retained=0.8, seed=1)
    write_run(tmp_path / "c", skill=0.7, retained=0.8, seed=2)
    left, right = figure(sections_of(tmp_path), "methods").axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["FFT", "HFT"]
    points = {(round(x, 6), y) for line in left.lines if line.get_marker() in "os" for x, y in line.get_xydata()}
    assert points == {(60, 0), (60, 1)}
    assert {round(line.get_xdata()[0], 6) for line in right.lines if line.get_marker() in "os"} == {30, 80}


def test_the_tradeoff_is_means_over_seeds_by_rate(tmp_path):
    for seed in (1, 2):
        for rate in (1e-4, 1e-3):
            write_run(tmp_path / f"{seed}{rate}", seed=seed, rate=rate, skill=0.1 * seed + 100 * rate)
    axes = figure(sections_of(tmp_path), "tradeoff").axes[0]
    line = next(line for line in axes.lines if line.get_label() == "HFT")
    assert list(line.get_xdata()) == [1e-4, 1e-3]
    assert line.get_ydata() == pytest.approx([16, 25])


def test_a_half_reset_is_put_beside_the_papers(tmp_path):
    write_run(tmp_path / "a", "half_reset")
    (text,) = section(sections_of(tmp_path), "Methods").text
    assert "Half-Reset" in text
