"""The mixed model over seeds: known answers, missing runs, and its coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.report.mixed import over_seeds
from hft_cli.report.stats import LAST_DIGIT, estimate

Random = np.random.Generator


def grid(data: int, draws: int) -> list[tuple[int, int]]:
    return [(one, other) for one in range(data) for other in range(draws)]


def test_seeds_that_no_runs_share_give_the_t_interval():
    values = {(1, 1): 0.2, (2, 2): 0.5, (3, 3): 0.4}
    found, kind = over_seeds(values)
    assert kind == "t"
    assert found == estimate(list(values.values()))


def test_draws_of_one_data_seed_are_a_sample_of_draws():
    found, _ = over_seeds({(1, 1): 0.0, (1, 2): 0.1, (1, 3): 0.35})
    assert found.high - found.mean == pytest.approx(4.302653 * found.sd / math.sqrt(3))


def test_a_seed_without_effect_changes_no_interval():
    values = {(data, draw): 0.3 + 0.1 * draw for data, draw in grid(3, 3)}
    found, kind = over_seeds(values)
    assert kind == "mixed model"
    assert found.high - found.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-3)  # of 3 draws, not 9 runs


def test_one_run_less_makes_the_interval_no_narrower():
    values = {(data, draw): 0.3 + 0.1 * draw + 0.01 * (data * draw % 3) for data, draw in grid(4, 3)}
    whole, _ = over_seeds(values)
    for missing in values:
        found, _ = over_seeds({seeds: value for seeds, value in values.items() if seeds != missing})
        assert found.high - found.low > 0.8 * (whole.high - whole.low)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.booleans())
@settings(deadline=None)
def test_an_interval_of_a_share_stays_in_it_and_has_a_width(scores, same):
    scores = [scores[0]] * len(scores) if same else scores
    found, _ = over_seeds({(seed, seed): score for seed, score in enumerate(scores)}, share=True)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.high - found.low >= LAST_DIGIT / 2
    assert (found.least, found.most) == (min(scores), max(scores))


def test_more_than_all_of_a_score_can_be_retained():
    found, _ = over_seeds({(1, 1): 1.02, (2, 2): 1.05, (3, 3): 0.99}, share=True)
    assert found.low < 1 < found.mean < found.high


def test_one_value_has_no_interval():
    assert over_seeds({(1, 1): 0.4})[1] == "none, n = 1"
    assert over_seeds({}) == (None, "")


# How the scores of simulated runs differ, around a known mean.


def normal(rng: Random, data: int, draws: int) -> tuple[np.ndarray, float]:
    rows, columns = rng.normal(0, 0.06, data)[:, None], rng.normal(0, 0.04, draws)[None, :]
    return 0.6 + rows + columns + rng.normal(0, 0.04, (data, draws)), 0.6


def near_the_ceiling(rng: Random, data: int, draws: int) -> tuple[np.ndarray, float]:
    """Shares of 100 items of models that know 97% on average."""
    rows, columns = rng.normal(0, 0.25, data)[:, None], rng.normal(0, 0.25, draws)[None, :]
    shares = 1 / (1 + np.exp(-(3.6 + rows + columns)))
    return rng.binomial(100, shares) / 100, MEAN_NEAR_THE_CEILING


MEAN_NEAR_THE_CEILING = float(
    np.mean(1 / (1 + np.exp(-(3.6 + np.random.default_rng(0).normal(0, 0.25 * math.sqrt(2), 200_000)))))
)


def bimodal(rng: Random, data: int, draws: int) -> tuple[np.ndarray, float]:
    """A draw either works or does not."""
    return rng.choice([0.5, 0.7], draws)[None, :] + rng.normal(0, 0.03, (data, draws)), 0.6


def coverage(make: Callable, data: int, draws: int, missing: int, times: int) -> float:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(times):
        table, mean = make(rng, data, draws)
        kept = [grid(data, draws)[i] for i in sorted(rng.permutation(data * draws)[missing:])]
        found, _ = over_seeds({seeds: float(table[seeds]) for seeds in kept}, share=True)
        covered += found.low <= mean <= found.high
    return covered / times


# Three of a thousand times the interval of 5% would be off by more than the slack of 300 simulations.
@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(("data", "draws"), [(3, 3), (5, 3), (3, 8), (6, 6)])
@pytest.mark.parametrize("make", [normal, near_the_ceiling])
def test_intervals_have_their_coverage(make, data, draws, missing):
    assert 0.91 <= coverage(make, data, draws, missing, 300) <= 0.995


@pytest.mark.parametrize("draws", [5, 8, 12])
def test_intervals_of_draws_in_two_clusters_have_their_coverage(draws):
    assert 0.91 <= coverage(bimodal, 3, draws, 0, 300) <= 0.995


@pytest.mark.parametrize(("make", "seeds"), [(normal, 3), (normal, 12), (near_the_ceiling, 5), (near_the_ceiling, 12)])
def test_intervals_of_independent_seeds_have_their_coverage(make, seeds):
    rng, covered = np.random.default_rng(2), 0
    for _ in range(400):
        table, mean = make(rng, seeds, seeds)
        found, _ = over_seeds({(seed, seed): float(table[seed, seed]) for seed in range(seeds)}, share=True)
        covered += found.low <= mean <= found.high
    assert 0.91 <= covered / 400 <= 0.98
