"""Statistics of the report, against known answers and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.report.stats import (
    Estimate,
    crossed_estimate,
    estimate,
    full_grid,
    interpolate,
    paired_bootstrap,
    regress,
    variance_components,
)

SCORES = st.floats(0, 1)


def test_the_t_interval_of_three_values_is_the_textbooks():
    result = estimate([1.0, 2.0, 3.0])
    assert (result.mean, result.sd, result.n) == (2.0, 1.0, 3)
    assert result.high - result.mean == pytest.approx(4.302653 / math.sqrt(3))
    assert result.mean - result.low == pytest.approx(result.high - result.mean)


def test_one_value_has_no_interval():
    assert estimate([0.4]) == Estimate(0.4, 1)
    assert estimate([]) is None


def test_equal_values_have_an_interval_without_width():
    assert estimate([0.5, 0.5]) == Estimate(0.5, 2, 0.0, 0.5, 0.5)


def test_t_intervals_have_their_coverage():
    rng = np.random.default_rng(1)
    results = [estimate(list(rng.normal(0.5, 0.1, 4))) for _ in range(2000)]
    assert np.mean([result.low <= 0.5 <= result.high for result in results]) == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_is_of_the_paired_difference():
    before, after = [1, 1, 1, 1, 0, 0, 0, 0] * 20, [1, 1, 0, 0, 0, 0, 0, 1] * 20
    result = paired_bootstrap(before, after)
    error = result.sd / math.sqrt(160)
    assert (result.mean, result.n) == (-1 / 8, 160)
    assert result.low == pytest.approx(-1 / 8 - 1.96 * error, abs=0.2 * error)
    assert result.high == pytest.approx(-1 / 8 + 1.96 * error, abs=0.2 * error)


def test_the_bootstrap_gives_the_same_interval_each_time():
    result = paired_bootstrap([0.0] * 12, [2.0**i for i in range(12)])  # skewed: its percentiles are not symmetric
    assert (result.low, result.high) == pytest.approx((62.325, 707.1916667))


def test_one_item_has_no_interval():
    assert paired_bootstrap([1.0], [0.0]) == Estimate(-1.0, 1)


def test_bootstrap_intervals_have_their_coverage():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        before = rng.random(120) < 0.8
        after = before & (rng.random(120) < 0.75)
        result = paired_bootstrap(list(before), list(after))
        covered += result.low <= 0.8 * 0.75 - 0.8 <= result.high
    assert covered / 400 == pytest.approx(0.94, abs=0.03)


def test_the_bootstrap_refuses_unequal_items():
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1.0], [1.0, 0.0])


def test_variances_of_a_small_table_are_those_by_hand():
    # Row means 2, 5; column means 2, 3.5, 5; additive, so no rest. MS_rows = 3 * 4.5 = 13.5, MS_columns = 2 * 2.25.
    result = variance_components([[0.5, 2, 3.5], [3.5, 5, 6.5]])
    assert (result.of_rows, result.of_columns, result.rest) == pytest.approx((13.5 / 3, 4.5 / 2, 0))
    assert result.share(result.of_rows) == pytest.approx(4.5 / 6.75)


def test_variances_are_recovered_from_simulated_runs():
    rng = np.random.default_rng(4)
    results = []
    for _ in range(600):
        rows, columns = rng.normal(0, 2, 6)[:, None], rng.normal(0, 1, 5)[None, :]
        results.append(variance_components(rows + columns + rng.normal(0, 0.5, (6, 5))))
    assert np.mean([result.of_rows for result in results]) == pytest.approx(4, rel=0.1)
    assert np.mean([result.of_columns for result in results]) == pytest.approx(1, rel=0.1)
    assert np.mean([result.rest for result in results]) == pytest.approx(0.25, rel=0.1)


def test_f_tests_of_pure_noise_reject_one_time_in_twenty():
    rng = np.random.default_rng(5)
    results = [variance_components(rng.normal(size=(4, 4))) for _ in range(1500)]
    assert np.mean([result.p_rows < 0.05 for result in results]) == pytest.approx(0.05, abs=0.017)


def test_a_negative_variance_is_set_to_zero_and_named():
    result = variance_components([[1, 2], [2, 1]])
    assert (result.of_rows, result.of_columns) == (0, 0)
    assert result.floored == ("rows", "columns")
    assert result.share(result.rest) == 1


def test_a_table_that_does_not_vary_has_no_shares():
    result = variance_components([[0.3, 0.3], [0.3, 0.3]])
    assert result.share(result.rest) is None


@given(st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=2, max_size=5), st.floats(0.1, 10), SCORES)
@settings(deadline=None)
def test_shares_do_not_depend_on_scale_and_zero(table, scale, shift):
    parts = variance_components(table)
    scaled = variance_components([[scale * (value + shift) for value in row] for row in table])
    assert scaled.rest == pytest.approx(scale**2 * parts.rest, abs=1e-9)
    assert scaled.of_rows == pytest.approx(scale**2 * parts.of_rows, abs=1e-9)


def test_crossed_intervals_have_their_coverage():
    rng = np.random.default_rng(6)
    naive = safe = 0
    for _ in range(500):
        table = rng.normal(0, 1, 4)[:, None] + rng.normal(0, 0.1, 4)[None, :] + rng.normal(0, 0.1, (4, 4))
        one, other = estimate(list(table.ravel())), crossed_estimate(table)
        naive += one.low <= 0 <= one.high
        safe += other.low <= 0 <= other.high
    assert naive / 500 < 0.85
    assert safe / 500 == pytest.approx(0.95, abs=0.03)


def test_a_grid_with_a_hole_has_a_full_part():
    cells = [(r, c) for r in (1, 2, 3) for c in (7, 8, 9)]
    assert full_grid(cells) == ([1, 2, 3], [7, 8, 9])
    rows, columns = full_grid([cell for cell in cells if cell != (3, 9)])
    assert len(rows) * len(columns) == 6
    assert min(map(len, full_grid([(1, 7), (2, 8)]))) < 2


def test_known_effects_are_recovered_with_coverage():
    rng = np.random.default_rng(7)
    truth, covered = np.array([0.05, -0.02, 0.0]), 0
    for _ in range(300):
        x = rng.integers(0, 5, (20, 3)).astype(float)
        effects = regress(x, 0.4 + x @ truth + rng.normal(0, 0.03, 20))
        covered += sum(e.low <= t <= e.high for e, t in zip(effects, truth, strict=True))
    assert covered / 900 == pytest.approx(0.95, abs=0.025)


def test_tied_effects_are_relative_to_their_mean():
    x = np.array([[1, 1, 0, 5], [1, 0, 1, 5], [0, 1, 1, 5]] * 3, float)
    effects = regress(x, x[:, :3] @ [0.3, 0.1, 0.2])
    assert [e.mean for e in effects[:3]] == pytest.approx([0.1, -0.1, 0.0])
    assert effects[3] is None


def test_fewer_runs_than_coefficients_give_no_effects():
    assert regress(np.eye(3), [0.1, 0.2, 0.3]) is None


@given(st.floats(-3, 3), SCORES, st.lists(SCORES, min_size=2, max_size=6, unique=True), st.floats(0, 1))
def test_interpolation_is_exact_on_a_line(slope, start, xs, where):
    xs = sorted(xs)
    x = min(max(xs[0] + where * (xs[-1] - xs[0]), xs[0]), xs[-1])
    assert interpolate([(v, start + slope * v) for v in xs], x) == pytest.approx(start + slope * x, abs=1e-9)


def test_the_highest_crossing_counts_without_extrapolation():
    path = [(0.2, 0.9), (0.8, 0.7), (0.4, 0.1)]
    assert interpolate(path, 0.5) == pytest.approx(0.8)
    assert interpolate(path, 0.1) is None
    assert interpolate(path, 0.81) is None
