"""Statistics of the report, against known answers and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hft_cli.report.stats import (
    Estimate,
    attained,
    estimate,
    full_grid,
    holm,
    max_t,
    mean_gap,
    newcombe,
    paired_bootstrap,
    regress,
    share_intervals,
    variance_components,
    wilson,
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
    assert estimate([0.5, 0.5]) == Estimate(0.5, 2, 0.0, 0.5, 0.5, 0.5, 0.5)


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


def test_items_may_have_weights():
    before, after = [1.0, 2.0, 3.0], [2.0, 2.0, 3.5]
    assert paired_bootstrap(before, after, [1, 1, 2]).mean == pytest.approx(0.5)
    plain, alike = paired_bootstrap(before, after), paired_bootstrap(before, after, [7, 7, 7])
    assert (plain.mean, plain.low, plain.high) == pytest.approx((alike.mean, alike.low, alike.high))


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


def test_what_is_attained_is_the_best_run_that_learned_so_much():
    path = [(0.2, 0.9), (0.8, 0.7), (0.4, 0.95)]
    assert [attained(path, x) for x in (0.0, 0.4, 0.41, 0.8, 0.81)] == [0.95, 0.95, 0.7, 0.7, None]


def test_a_mean_gap_is_the_area_between_the_steps():
    # Between 0.2 and 0.6 of skill: 0.9 until 0.4, then 0.5; the other has 0.7 all the way.
    assert mean_gap([(0.2, 0.9), (0.4, 0.9), (0.6, 0.5)], [(0.1, 0.7), (0.7, 0.7)]) == pytest.approx(0)
    assert mean_gap([(0.9, 0.9), (0.99, 0.3)], [(0.2, 0.9), (0.93, 0.8)]) is None  # they meet between 0.9 and 0.93 only
    assert mean_gap([], [(0.5, 0.7)]) is None


POINTS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=6)


@given(POINTS, POINTS, SCORES)
def test_gaps_are_opposite_and_move_with_the_path(path, other, shift):
    gap = mean_gap(path, other)
    if gap is None:
        return
    assert gap == pytest.approx(-mean_gap(other, path), abs=1e-9)
    assert mean_gap([(x, y + shift) for x, y in path], other) == pytest.approx(gap + shift, abs=1e-9)


def test_newcombe_is_the_published_example():
    # Newcombe 1998 (Statistics in Medicine 17, 2635-2650), table II: 36, 12, 2, 0 of 50 pairs, method 10.
    before = [1] * 36 + [1] * 12 + [0] * 2
    after = [1] * 36 + [0] * 12 + [1] * 2
    found = newcombe(before, after)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.3404, -0.0569), abs=5e-5)


@pytest.mark.parametrize(("share", "lost", "gained"), [(0.97, 0.03, 0.5), (0.5, 0.1, 0.2), (0.02, 0.5, 0.01)])
def test_newcombes_intervals_have_their_coverage(share, lost, gained):
    rng, covered = np.random.default_rng(8), 0
    for _ in range(500):
        before = rng.random(60) < share
        after = np.where(before, rng.random(60) >= lost, rng.random(60) < gained)
        found = newcombe(before.astype(float).tolist(), after.astype(float).tolist())
        covered += found.low <= (1 - share) * gained - share * lost <= found.high
    assert covered / 500 >= 0.93


def test_newcombe_with_equal_weights_is_without():
    before, after = [1.0] * 30 + [0.0] * 10, [1.0] * 20 + [0.0] * 15 + [1.0] * 5
    assert newcombe(before, after, [0.25] * 40) == newcombe(before, after)


def test_newcombe_with_weights_covers_the_mean_over_parts():
    """Two parts of 20 and 180 items, of which the score is the plain mean."""
    draw, covered = np.random.default_rng(3), 0
    weights = [1 / 20] * 20 + [1 / 180] * 180
    for _ in range(400):
        right = np.concatenate([draw.random(20) < 0.6, draw.random(180) < 0.9])
        lost = np.concatenate([draw.random(20) < 0.5, draw.random(180) < 0.1])
        found = newcombe(right.astype(float).tolist(), (right & ~lost).astype(float).tolist(), weights)
        covered += found.low <= -(0.6 * 0.5 + 0.9 * 0.1) / 2 <= found.high
    assert covered / 400 >= 0.93


def test_p_values_of_a_family_are_holms():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_one_true_effect_is_found_among_many_without():
    rng = np.random.default_rng(9)
    x = rng.integers(0, 2, (20, 6)).astype(float)
    adjusted = max_t(x, 0.5 + 0.1 * x[:, 2] + rng.normal(0, 0.03, 20))
    assert adjusted[2] < 0.01
    assert min(p for i, p in enumerate(adjusted) if i != 2) > 0.05


def test_without_effects_one_of_twenty_tables_has_a_small_p():
    rng, found = np.random.default_rng(10), 0
    for i in range(300):
        x = rng.integers(0, 2, (12, 5)).astype(float)
        adjusted = max_t(x, list(rng.exponential(size=12)), seed=i)
        found += min(p for p in adjusted if p is not None) < 0.05
    assert found / 300 == pytest.approx(0.05, abs=0.04)


def test_shares_of_a_small_table_are_hardly_known():
    rng = np.random.default_rng(11)
    widths = []
    for size in (3, 12):
        table = rng.normal(0, 2, (size, 1)) + rng.normal(0, 1, (1, size)) + rng.normal(0, 1, (size, size))
        parts = variance_components(table)
        ends = share_intervals(parts, size, size)
        assert all(0 <= low <= high <= 1 for low, high in ends)
        widths.append(ends[0][1] - ends[0][0])
    assert widths[1] < widths[0]
    assert widths[0] > 0.5


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_that_of_scipy(case):
    count, n = case
    ends = binomtest(count, n).proportion_ci(0.95, "wilson")
    assert wilson(count, n) == pytest.approx((ends.low, ends.high), abs=1e-12)
