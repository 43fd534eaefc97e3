"""The statistics of the report: intervals over seeds and over items, variance components, effects, frontiers.

Values are scores or differences of scores, as shares. Every interval is at 95%. scipy is imported inside the functions,
because `scipy.stats` takes about a second to load.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
SIMULATIONS = 400  # of a table of variances
PERMUTATIONS = 2000
RESAMPLES = 2000  # of the bootstrap: the ends of an interval then vary by a few hundredths of its width


Ends = tuple[float, float]  # of an interval


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values, and what is known of it; None if n is 1.

    Attributes:
        sd: standard deviation of the values (n - 1).
        low, high: the interval of the mean.
        least, most: the range of the values.
        p: of the two-sided test that the mean is 0.
    """

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class VarianceComponents:
    """The variance of a table of runs, one a cell, split into its sources.

    Attributes:
        of_rows, of_columns: variance of the two factors.
        rest: variance of their interaction and of the noise, which one run a cell cannot separate.
        floored: the factors ("rows", "columns") whose estimate was negative and is set to 0.
        p_rows, p_columns: p values of the F tests of each factor against the rest; None if the rest is 0.
    """

    of_rows: float
    of_columns: float
    rest: float
    floored: tuple[str, ...]
    p_rows: float | None
    p_columns: float | None

    @property
    def total(self) -> float:
        return self.of_rows + self.of_columns + self.rest

    def share(self, component: float) -> float | None:
        """A component as a share of the total; None if nothing varies."""
        return component / self.total if self.total > 0 else None


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean and the t interval of independent values; None if there are no values."""
    if len(values) < 2:
        return Estimate(values[0], 1) if values else None
    return interval(fmean(values), stdev(values) / math.sqrt(len(values)), len(values) - 1, values)


def interval(mean: float, error: float, freedom: float, values: Sequence[float], share: bool = False) -> Estimate:
    """The interval of a mean with that standard error.

    That of a share is one of its logit: it ends between 0 and 1 and is longer on the side of the middle. A model can
    retain more than all of a score; that is no share.
    """
    from scipy.stats import t

    half = t_quantile(freedom) * error
    low, high = mean - half, mean + half
    if share and max(values) <= 1:
        inside = min(max(mean, LAST_DIGIT / 2), 1 - LAST_DIGIT / 2)
        slope = inside * (1 - inside)
        low, high = (_share(_logit(inside) + sign * half / slope) for sign in (-1, 1))
        low, high = min(low, mean), max(high, mean)
    p = float(2 * t.sf(abs(mean) / error, freedom)) if error else None
    return Estimate(mean, len(values), stdev(values), low, high, min(values), max(values), p)


LAST_DIGIT = 0.001  # of a share, as it is printed in percent


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -LARGEST_LOGIT), LARGEST_LOGIT)))


LARGEST_LOGIT = 36.0  # whose share is 1 to the last bit


def wilson(count: float, n: float) -> tuple[float, float]:
    """The interval of a share of n items (Wilson 1927); (0, 1) without items.

    It is written out, because every run prints one, and loading `scipy.stats` for it would take half a second.
    """
    if not n:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    center = count + z * z / 2
    half = z * math.sqrt(max(count * (n - count), 0) / n + z * z / 4)
    return max((center - half) / (n + z * z), 0.0), min((center + half) / (n + z * z), 1.0)


def newcombe(before: Sequence[float], after: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """The change of a share over the same items, each 0 or 1 before and after (Newcombe 1998, method 10).

    It holds the 95% level also near 0 and 1 and for a few items, where the percentiles of a bootstrap do not. With
    unequal weights the items count as so many equal ones as have a mean of the same variance.
    """
    pairs, weight = [*zip(before, after, strict=True)], [1.0] * len(before) if weights is None else list(weights)
    n = _effective_number([two - one for one, two in pairs], weight)
    both, lost, gained = (
        n * sum(each for pair, each in zip(pairs, weight, strict=True) if pair == kind) / sum(weight)
        for kind in ((1, 1), (1, 0), (0, 1))
    )
    neither = max(n - both - lost - gained, 0.0)
    shares = [(both + lost) / n, (both + gained) / n]
    (low1, high1), (low2, high2) = wilson(both + lost, n), wilson(both + gained, n)
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    excess: float = both * neither - lost * gained
    excess = excess if excess < 0 else max(excess - n / 2, 0)
    correlation = excess / math.sqrt(product) if product > 0 else 0.0

    def length(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    change = shares[1] - shares[0]
    below = length(shares[1] - low2, high1 - shares[0])
    above = length(high2 - shares[1], shares[0] - low1)
    return Estimate(change, len(before), None, change - below, change + above)


def _effective_number(changes: Sequence[float], weights: Sequence[float]) -> float:
    """The number of equal items whose mean varies as that of the weighted ones: at most Kish's, of weights alone."""
    whole, kish = sum(weights), sum(weights) ** 2 / sum(weight * weight for weight in weights)
    mean = sum(map(mul, weights, changes)) / whole
    squares = [(change - mean) ** 2 for change in changes]
    spread = sum(weight * weight * square for weight, square in zip(weights, squares, strict=True))
    return min(kish, whole * sum(map(mul, weights, squares)) / spread) if spread > 0 else kish


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values of one family, adjusted so that all of them together hold their level (Holm 1979)."""
    ordered = sorted((p, i) for i, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    most = 0.0
    for rank, (p, i) in enumerate(ordered):
        most = max(most, min(1.0, p * (len(ordered) - rank)))
        adjusted[i] = most
    return adjusted


def t_quantile(freedom: float) -> float:
    """The quantile of Student's t for a two-sided interval."""
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Estimate:
    """The mean of after - before over the same items, with the percentile interval of a bootstrap over the items.

    Args:
        weights: of the items in the mean; all alike without them.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    from scipy.stats import bootstrap

    if len(before) != len(after) or not before:
        raise ValueError("a paired difference needs the same items before and after")
    difference = np.asarray(after, float) - np.asarray(before, float)
    weight = np.ones(len(difference)) if weights is None else np.asarray(weights, float)

    def mean(values: Any, by: Any, axis: int = -1) -> Any:
        return (values * by).sum(axis=axis) / by.sum(axis=axis)

    n = len(difference)
    if n == 1:
        return Estimate(float(difference[0]), 1)
    low, high = bootstrap(
        (difference, weight), mean, paired=True, n_resamples=RESAMPLES, batch=100, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(float(mean(difference, weight)), n, float(difference.std(ddof=1)), float(low), float(high))


def variance_components(table: Sequence[Sequence[float]]) -> VarianceComponents:
    """Two-way random-effects analysis of variance of a full table, by expected mean squares.

    With one value a cell, E[MS_rows] = s2 + b s2_rows and E[MS_columns] = s2 + a s2_columns for a rows and b columns,
    where s2 is the variance of the interaction and the noise together (Searle, Casella and McCulloch, Variance
    Components, 1992, section 4.3).

    Raises:
        ValueError: the table is ragged, or has fewer than two rows or columns.
    """
    from scipy.stats import f

    if len({len(row) for row in table}) != 1:
        raise ValueError("the table is not full")
    y = np.asarray(table, float)
    a, b = y.shape
    if min(a, b) < 2:
        raise ValueError("two rows and two columns are needed")
    rows, columns, grand = y.mean(1), y.mean(0), y.mean()
    residual = y - rows[:, None] - columns[None, :] + grand
    freedom = (a - 1) * (b - 1)
    noise = float((residual**2).sum() / freedom)
    between_rows = float(b * ((rows - grand) ** 2).sum() / (a - 1))
    between_columns = float(a * ((columns - grand) ** 2).sum() / (b - 1))
    if noise < 1e-24 * float((y**2).mean() + 1e-300):  # an additive table leaves rounding errors only
        noise = 0.0
    of_rows, of_columns = (between_rows - noise) / b, (between_columns - noise) / a
    return VarianceComponents(
        of_rows=max(of_rows, 0.0),
        of_columns=max(of_columns, 0.0),
        rest=noise,
        floored=tuple(name for name, part in (("rows", of_rows), ("columns", of_columns)) if part < 0),
        p_rows=float(f.sf(between_rows / noise, a - 1, freedom)) if noise else None,
        p_columns=float(f.sf(between_columns / noise, b - 1, freedom)) if noise else None,
    )


def share_intervals(parts: VarianceComponents, rows: int, columns: int, seed: int = 0) -> tuple[Ends, Ends, Ends]:
    """Intervals of the shares of rows, columns and the rest, by a parametric bootstrap of a table of this size.

    With few rows or columns they are nearly everything between 0 and 1, which is what such a table says.
    """
    rng = np.random.default_rng(seed)
    deviations = [math.sqrt(part) for part in (parts.of_rows, parts.of_columns, parts.rest)]
    shares = []
    for _ in range(SIMULATIONS):
        table = deviations[0] * rng.normal(size=(rows, 1)) + deviations[1] * rng.normal(size=(1, columns))
        found = variance_components((table + deviations[2] * rng.normal(size=(rows, columns))).tolist())
        if found.total > 0:
            shares.append([part / found.total for part in (found.of_rows, found.of_columns, found.rest)])
    ends = np.percentile(shares, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2], axis=0)
    first, second, third = ((float(low), float(high)) for low, high in ends.T)
    return first, second, third


def full_grid(cells: Collection[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Rows and columns of a full table within the (row, column) cells, found by dropping the emptiest line each time.

    The result has fewer than two rows or columns if there is no such table.
    """
    rows, columns = sorted({row for row, _ in cells}), sorted({column for _, column in cells})
    while rows and columns:
        row_sizes = {row: sum((row, column) in cells for column in columns) for row in rows}
        column_sizes = {column: sum((row, column) in cells for row in rows) for column in columns}
        if all(size == len(columns) for size in row_sizes.values()):
            break
        row, column = min(rows, key=row_sizes.__getitem__), min(columns, key=column_sizes.__getitem__)
        if row_sizes[row] / len(columns) <= column_sizes[column] / len(rows):
            rows.remove(row)
        else:
            columns.remove(column)
    return rows, columns


def regress(features: NDArray[np.float64], values: Sequence[float]) -> list[Estimate | None] | None:
    """Least squares of `values` on `features` (runs x features) and an intercept, with t intervals.

    Where features are tied to each other (a draw that updates one matrix more updates another one less), only contrasts
    are determined. The solution of least norm then gives each effect relative to the mean of the features that it is
    tied to.

    Returns:
        An effect for each feature, None for a feature that never varies. None altogether if there are fewer runs than
        varying features plus two.
    """
    x, y = np.asarray(features, float), np.asarray(values, float)
    varies = np.ptp(x, axis=0) > 0
    if not varies.any() or len(y) < varies.sum() + 2:
        return None
    centred = x[:, varies] - x[:, varies].mean(0)
    inverse = np.linalg.pinv(centred, rcond=1e-5)
    freedom = len(y) - 1 - int(np.linalg.matrix_rank(centred))
    slopes = inverse @ (y - y.mean())
    residual = y - y.mean() - centred @ slopes
    halves = t_quantile(freedom) * np.sqrt((inverse**2).sum(1) * (residual @ residual) / freedom)
    ends = zip(slopes.tolist(), (slopes - halves).tolist(), (slopes + halves).tolist(), strict=True)
    effects = iter([Estimate(slope, len(y), None, low, high) for slope, low, high in ends])
    return [next(effects) if varying else None for varying in varies]


def max_t(features: NDArray[np.float64], values: Sequence[float], seed: int = 0) -> list[float | None] | None:
    """p values of the effects of `regress`, adjusted for all of them by permutations (Westfall and Young 1993).

    Each is the share of permutations of the values in which the largest |t| of any effect is at least that of the
    effect. So if nothing has an effect, one of them is below 0.05 one time in twenty, whatever the values are like.

    Returns:
        As `regress`.
    """
    effects = regress(features, values)
    if effects is None:
        return None
    x, y, rng = np.asarray(features, float), np.asarray(values, float), np.random.default_rng(seed)
    tables = np.stack([y, *(rng.permutation(y) for _ in range(PERMUTATIONS))], axis=1) - y.mean()
    centred = x[:, np.ptp(x, axis=0) > 0]
    centred = centred - centred.mean(0)
    inverse = np.linalg.pinv(centred, rcond=1e-5)
    freedom = len(y) - 1 - int(np.linalg.matrix_rank(centred))
    slopes = inverse @ tables
    noise = ((tables - centred @ slopes) ** 2).sum(0) / freedom
    sizes = np.abs(slopes) / np.sqrt(np.outer((inverse**2).sum(1), noise) + 1e-30)
    largest = sizes.max(axis=0)  # of each permutation; the first is the values as they are
    adjusted = iter([float((largest >= size * (1 - 1e-9)).mean()) for size in sizes[:, 0]])
    return [next(adjusted) if effect else None for effect in effects]


def attained(path: Sequence[tuple[float, float]], x: float) -> float | None:
    """The highest y of the points whose x is at least `x`; None if there is none. Nothing is interpolated."""
    return max((y for point, y in path if point >= x), default=None)


LEAST_RANGE = 0.05


def mean_gap(path: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float | None:
    """The mean of `attained(path, x) - attained(other, x)` over the x from the higher start to the lower end.

    Both are steps, so that the mean is exact. None if those x span less than LEAST_RANGE: the ends of two grids say
    little of what lies between them.
    """
    if not path or not other:
        return None
    start = max(min(x for x, _ in path), min(x for x, _ in other))
    end = min(max(x for x, _ in path), max(x for x, _ in other))
    if end - start < LEAST_RANGE:
        return None
    ends = [start, *sorted({x for x, _ in (*path, *other) if start < x < end}), end]
    return sum(_gap_at(path, other, high) * (high - low) for low, high in pairwise(ends)) / (end - start)


def _gap_at(path: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], x: float) -> float:
    return (attained(path, x) or 0.0) - (attained(other, x) or 0.0)
