"""What the report calculates, against known answers and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.report.stats import along, crossed, estimate, full_grid, paired_bootstrap, regress, two_way

SCORES = st.floats(0, 1)


# ---------------------------------------------------------------------------------------------------- over the seeds


def test_the_t_interval_of_three_values_is_the_textbook_one():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_value_has_no_interval_and_none_has_no_mean():
    found = estimate([0.4])
    assert (found.mean, found.sd, found.low, found.high) == (0.4, None, None, None)
    assert estimate([]) is None


def test_the_t_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    made = [estimate(list(rng.normal(0.5, 0.1, 4))) for _ in range(2000)]
    assert np.mean([found.low <= 0.5 <= found.high for found in made]) == pytest.approx(0.95, abs=0.015)


# ---------------------------------------------------------------------------------------------------- over the items


def test_the_paired_bootstrap_is_of_the_difference_and_the_same_each_time():
    before, after = [1, 1, 1, 1, 0, 0, 0, 0] * 20, [1, 1, 0, 0, 0, 0, 0, 1] * 20
    found = paired_bootstrap(before, after)
    assert found == paired_bootstrap(before, after)
    assert found.mean == pytest.approx(-1 / 8)
    error = found.sd / math.sqrt(160)
    assert found.low == pytest.approx(-1 / 8 - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(-1 / 8 + 1.96 * error, abs=0.2 * error)


def test_both_ways_of_drawing_items_give_the_same_interval():
    rng = np.random.default_rng(2)
    few = rng.integers(0, 2, 300).astype(float)
    many = few + rng.normal(0, 1e-9, 300)  # every difference its own, so that items are drawn one by one
    short, long = (paired_bootstrap([0.5] * 300, list(values)) for values in (few, many))
    assert (short.low, short.high) == pytest.approx((long.low, long.high), abs=0.006)


def test_the_paired_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        before = rng.random(120) < 0.8
        after = before & (rng.random(120) < 0.75)
        found = paired_bootstrap(list(before), list(after))
        covered += found.low <= 0.8 * 0.75 - 0.8 <= found.high
    assert covered / 400 == pytest.approx(0.94, abs=0.03)


def test_a_paired_bootstrap_refuses_unequal_items():
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1.0], [1.0, 0.0])


# --------------------------------------------------------------------------------------------------------- variances


def test_variances_of_a_small_table_by_hand():
    # Row means 2, 5; column means 2, 3.5, 5; additive, so no rest. MS_rows = 3 * 4.5 = 13.5, MS_columns = 2 * 2.25.
    found = two_way([[0.5, 2, 3.5], [3.5, 5, 6.5]])
    assert (found.of_rows, found.of_columns, found.rest) == pytest.approx((13.5 / 3, 4.5 / 2, 0))
    assert found.share(found.of_rows) == pytest.approx(4.5 / 6.75)


def test_variances_are_recovered_from_simulated_runs():
    rng = np.random.default_rng(4)
    made = []
    for _ in range(600):
        rows, columns = rng.normal(0, 2, 6)[:, None], rng.normal(0, 1, 5)[None, :]
        made.append(two_way(rows + columns + rng.normal(0, 0.5, (6, 5))))
    assert np.mean([found.of_rows for found in made]) == pytest.approx(4, rel=0.1)
    assert np.mean([found.of_columns for found in made]) == pytest.approx(1, rel=0.1)
    assert np.mean([found.rest for found in made]) == pytest.approx(0.25, rel=0.1)


def test_f_tests_of_pure_noise_reject_one_time_in_twenty():
    rng = np.random.default_rng(5)
    made = [two_way(rng.normal(size=(4, 4))) for _ in range(1500)]
    assert np.mean([found.p_rows < 0.05 for found in made]) == pytest.approx(0.05, abs=0.017)


def test_a_negative_variance_is_set_to_zero_and_named():
    found = two_way([[1, 2], [2, 1]])
    assert (found.of_rows, found.of_columns) == (0, 0)
    assert found.floored == ("rows", "columns")
    assert found.share(found.rest) == 1


def test_nothing_varying_has_no_shares():
    found = two_way([[0.3, 0.3], [0.3, 0.3]])
    assert found.share(found.rest) is None


@given(st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=2, max_size=5), st.floats(0.1, 10), SCORES)
@settings(deadline=None)
def test_shares_do_not_hang_on_the_scale_or_the_zero_of_the_scores(table, scale, shift):
    one, other = two_way(table), two_way([[scale * (value + shift) for value in row] for row in table])
    assert other.rest == pytest.approx(scale**2 * one.rest, abs=1e-9)
    assert other.of_rows == pytest.approx(scale**2 * one.of_rows, abs=1e-9)


def test_the_interval_of_crossed_runs_covers_though_they_share_their_seeds():
    rng = np.random.default_rng(6)
    naive = safe = 0
    for _ in range(500):
        table = rng.normal(0, 1, 4)[:, None] + rng.normal(0, 0.1, 4)[None, :] + rng.normal(0, 0.1, (4, 4))
        one, other = estimate(list(table.ravel())), crossed(table)
        naive += one.low <= 0 <= one.high
        safe += other.low <= 0 <= other.high
    assert naive / 500 < 0.85
    assert safe / 500 == pytest.approx(0.95, abs=0.03)


def test_the_full_part_of_a_grid_with_a_hole_is_kept():
    cells = [(r, c) for r in (1, 2, 3) for c in (7, 8, 9)]
    assert full_grid(cells) == ([1, 2, 3], [7, 8, 9])
    rows, columns = full_grid([cell for cell in cells if cell != (3, 9)])
    assert len(rows) * len(columns) == 6
    assert min(map(len, full_grid([(1, 7), (2, 8)]))) < 2


# ----------------------------------------------------------------------------------------------------------- effects


def test_known_effects_are_recovered_and_their_intervals_cover():
    rng = np.random.default_rng(7)
    truth, covered = np.array([0.05, -0.02, 0.0]), 0
    for _ in range(300):
        x = rng.integers(0, 5, (20, 3)).astype(float)
        found = regress(x, 0.4 + x @ truth + rng.normal(0, 0.03, 20))
        covered += sum(e.low <= t <= e.high for e, t in zip(found, truth, strict=True))
    assert covered / 900 == pytest.approx(0.95, abs=0.025)


def test_effects_of_a_draw_that_trades_one_for_another_are_relative_to_their_mean():
    x = np.array([[1, 1, 0, 5], [1, 0, 1, 5], [0, 1, 1, 5]] * 3, float)
    found = regress(x, x[:, :3] @ [0.3, 0.1, 0.2])
    assert [e.value for e in found[:3]] == pytest.approx([0.1, -0.1, 0.0])
    assert found[3] is None


def test_fewer_runs_than_coefficients_give_no_effects():
    assert regress(np.eye(3), [0.1, 0.2, 0.3]) is None


# ------------------------------------------------------------------------------------------------------ interpolation


@given(st.floats(-3, 3), SCORES, st.lists(SCORES, min_size=2, max_size=6, unique=True), st.floats(0, 1))
def test_interpolation_is_exact_on_a_line(slope, start, xs, where):
    xs = sorted(xs)
    x = min(max(xs[0] + where * (xs[-1] - xs[0]), xs[0]), xs[-1])
    assert along([(v, start + slope * v) for v in xs], x) == pytest.approx(start + slope * x, abs=1e-9)


def test_a_path_that_passes_twice_counts_by_its_better_passage_and_nothing_is_extrapolated():
    path = [(0.2, 0.9), (0.8, 0.7), (0.4, 0.1)]
    assert along(path, 0.5) == pytest.approx(0.8)
    assert along(path, 0.1) is None
    assert along(path, 0.81) is None
