"""The mean of scores over seeds, by a mixed model: y = mean + data seed + draw seed + noise, each seed a random effect.

The variances are estimated by restricted maximum likelihood (REML; Searle, Casella and McCulloch, Variance Components,
1992, chapter 6), also where runs are missing, and the interval of the mean has the degrees of freedom of Satterthwaite.
`tests/report/test_mixed.py` simulates its coverage. statsmodels has REML, but no degrees of freedom for it: its
intervals are those of infinitely many seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hft_cli.report.stats import LAST_DIGIT, Estimate, interval

Seeds = tuple[int, int]  # of the data, of the draw


def over_seeds(values: Mapping[Seeds, float], share: bool = False) -> tuple[Estimate | None, str]:
    """The mean of a score over seeds, and what its interval is of.

    Args:
        values: one for each pair of seeds. Missing pairs are no problem.
        share: whether the score is a share of 1, which its interval does not leave.
    """
    y = np.array(list(values.values()), float)
    if len(y) < 2:
        return (Estimate(float(y[0]), 1), "none, n = 1") if len(y) else (None, "")
    factors = _factors(list(values))
    mean, error, freedom = _mixed(y, list(factors.values())) if factors else _independent(y)
    kind = "mixed model" if factors else "t"
    if np.ptp(y) == 0:  # seeds that agree to the last digit do not prove that others would
        error = LAST_DIGIT / 2
    return interval(mean, error, freedom, list(values.values()), share), kind


def _factors(seeds: Sequence[Seeds]) -> dict[str, Any]:
    """The seeds that several values share, as arrays of labels. Others cannot be told from the noise."""
    factors = {}
    for name, labels in zip(("data", "draw"), np.array(seeds).T, strict=True):
        if 1 < len(set(labels.tolist())) < len(seeds):
            factors[name] = labels
    return factors


def _independent(y: Any) -> tuple[float, float, float]:
    return float(y.mean()), float(y.std(ddof=1) / math.sqrt(len(y))), len(y) - 1.0


def _mixed(y: Any, factors: Sequence[Any]) -> tuple[float, float, float]:
    """Mean, its standard error, and Satterthwaite's degrees of freedom."""
    scale = float(y.var(ddof=1))
    if scale == 0:
        return float(y.mean()), 0.0, len(y) - 1.0
    parts = [np.eye(len(y)), *((labels[:, None] == labels[None, :]).astype(float) for labels in factors)]
    variances = _reml((y - y.mean()) / math.sqrt(scale), parts)
    inverse, _, information = _at(variances, parts)
    of_mean = 1 / float(inverse.sum())
    mean = of_mean * float(inverse.sum(0) @ y)
    rows = inverse.sum(1)
    slopes = np.array([of_mean**2 * rows @ part @ rows for part in parts])
    positive = variances > 0
    spread = slopes[positive] @ np.linalg.pinv(information[np.ix_(positive, positive)]) @ slopes[positive]
    freedom = 2 * of_mean**2 / float(spread)
    return mean, math.sqrt(of_mean * scale), min(max(freedom, 1.0), len(y) - 1.0)


LEAST = 1e-5  # variance of the noise, relative to that of the values: less would make the matrices singular

STEPS = 300  # of Fisher scoring at most; it needs about ten


def _reml(y: Any, parts: Sequence[Any]) -> Any:
    """The variance of each part that makes the values likeliest, by Fisher scoring with variances of 0 or more."""
    variances = np.full(len(parts), 1 / len(parts))
    for _ in range(STEPS):
        _, projected, information = _at(variances, parts)
        residual = projected @ y
        score = np.array([(residual @ part @ residual - (projected * part).sum()) / 2 for part in parts])
        free = (variances > 0) | (score > 0)
        step = np.zeros(len(parts))
        step[free] = np.linalg.pinv(information[np.ix_(free, free)]) @ score[free]
        new = np.maximum(variances + step, 0)
        new[0] = max(new[0], LEAST)
        if np.abs(new - variances).max() < 1e-8:
            return new
        variances = new
    return variances


def _at(variances: Any, parts: Sequence[Any]) -> tuple[Any, Any, Any]:
    """V^-1, the projection P that takes out the mean, and the expected information of the variances."""
    inverse = np.linalg.inv(sum(variance * part for variance, part in zip(variances, parts, strict=True)))
    projected = inverse - np.outer(inverse.sum(1), inverse.sum(0)) / inverse.sum()
    products = [projected @ part for part in parts]
    information = np.array([[(one * other.T).sum() / 2 for other in products] for one in products])
    return inverse, projected, information
