"""What the report calculates: intervals over seeds and items, shares of variance, effects, interpolation. Numbers only.

Scores are shares in [0, 1] or differences of such; every interval is at 95%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95

REPEATS = 2000  # of a bootstrap; the ends of its interval then vary by a few hundredths of its width


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values, their standard deviation (n-1), and the interval of the mean; None where n is 1."""

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Shares:
    """A crossed design of `rows` x `columns` runs without repetition, as variances of the two factors and the rest.

    `rest` is their interaction and the noise, which one run a cell cannot tell apart. `floored` names the factors whose
    estimate was negative and is set to 0. The p values are those of the F tests against the rest.
    """

    rows: int
    columns: int
    of_rows: float
    of_columns: float
    rest: float
    floored: tuple[str, ...]
    p_rows: float | None
    p_columns: float | None

    @property
    def total(self) -> float:
        return self.of_rows + self.of_columns + self.rest

    def share(self, part: float) -> float | None:
        """A part of the total; None if nothing varied at all."""
        return part / self.total if self.total > 0 else None


@dataclass(frozen=True)
class Effect:
    """A regression coefficient with its interval."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and t interval of independent values (n-1 degrees of freedom); None if there are none."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 1)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Estimate(mean, n, sd, mean - half, mean + half)


def t_quantile(freedom: float) -> float:
    """Student's t that leaves 2.5% above it, with so many degrees of freedom."""
    from scipy.special import stdtrit  # a fraction of a second, which scipy.stats is not

    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def paired_bootstrap(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of after - before over the same items, with the percentile interval of drawing items with replacement.

    Raises:
        ValueError: if the two are not of the same length, or empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError("a paired difference needs the same items before and after")
    difference = np.asarray(after, float) - np.asarray(before, float)
    n = len(difference)
    if n == 1:
        return Estimate(float(difference[0]), 1)
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(difference, return_counts=True)
    if len(kinds) <= 64:  # the same distribution, drawn by how often each difference comes up
        means = rng.multinomial(n, counts / n, REPEATS) @ kinds / n
    else:
        means = np.array([difference[rng.integers(0, n, n)].mean() for _ in range(REPEATS)])
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(float(difference.mean()), n, float(difference.std(ddof=1)), float(low), float(high))


def two_way(table: Sequence[Sequence[float]]) -> Shares:
    """Random-effects analysis of variance of a full rows x columns table, by expected mean squares.

    With one value a cell E[MS_rows] = s2 + b s2_rows and E[MS_columns] = s2 + a s2_columns for a rows and b columns,
    where s2 is the interaction and the noise together (Searle, Casella and McCulloch, Variance Components, 1992, 4.3).

    Raises:
        ValueError: if the table is ragged or has fewer than two rows or columns.
    """
    if len({len(row) for row in table}) != 1:
        raise ValueError("the table is not full")
    y = np.asarray(table, float)
    a, b = y.shape
    if min(a, b) < 2:
        raise ValueError("two rows and two columns are needed")
    rows, columns, grand = y.mean(1), y.mean(0), y.mean()
    residual = y - rows[:, None] - columns[None, :] + grand
    noise = float((residual**2).sum() / ((a - 1) * (b - 1)))
    between_rows = float(b * ((rows - grand) ** 2).sum() / (a - 1))
    between_columns = float(a * ((columns - grand) ** 2).sum() / (b - 1))
    if noise < 1e-24 * float((y**2).mean() + 1e-300):  # rounding of a table that is additive
        noise = 0.0
    of_rows, of_columns = (between_rows - noise) / b, (between_columns - noise) / a
    return Shares(
        rows=a,
        columns=b,
        of_rows=max(of_rows, 0.0),
        of_columns=max(of_columns, 0.0),
        rest=noise,
        floored=tuple(name for name, part in (("rows", of_rows), ("columns", of_columns)) if part < 0),
        p_rows=_above(between_rows, noise, a - 1, (a - 1) * (b - 1)),
        p_columns=_above(between_columns, noise, b - 1, (a - 1) * (b - 1)),
    )


def _above(between: float, noise: float, first: int, second: int) -> float | None:
    """The chance of an F as large, if the factor had no effect; None without noise to compare with."""
    from scipy.special import fdtrc

    return float(fdtrc(first, second, between / noise)) if noise > 0 else None


def crossed(table: Sequence[Sequence[float]]) -> Estimate:
    """Mean over a full crossed table, with an interval that heeds that runs of a row or a column share what they share.

    The variance of the mean is s2_rows/a + s2_columns/b + s2/(ab); t with min(a, b)-1 degrees of freedom is on the safe
    side.
    """
    parts = two_way(table)
    y = np.asarray(table, float)
    variance = parts.of_rows / parts.rows + parts.of_columns / parts.columns + parts.rest / y.size
    half = t_quantile(min(y.shape) - 1) * math.sqrt(variance)
    mean = float(y.mean())
    return Estimate(mean, y.size, float(y.std(ddof=1)), mean - half, mean + half)


def full_grid(cells: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Rows and columns of a full table within the cells that there are, dropping the emptiest row or column each time.

    Ends with fewer than two of either if there is no such table.
    """
    there = set(cells)
    rows, columns = sorted({r for r, _ in there}), sorted({c for _, c in there})
    while rows and columns:
        by_row = {r: sum((r, c) in there for c in columns) for r in rows}
        by_column = {c: sum((r, c) in there for r in rows) for c in columns}
        if all(count == len(columns) for count in by_row.values()):
            break
        row, column = min(rows, key=lambda r: by_row[r]), min(columns, key=lambda c: by_column[c])
        if by_row[row] / len(columns) <= by_column[column] / len(rows):
            rows.remove(row)
        else:
            columns.remove(column)
    return rows, columns


def regress(features: NDArray[np.float64], values: Sequence[float]) -> list[Effect | None] | None:
    """Least squares of `values` on `features` (runs x features) and an intercept, with t intervals.

    A feature that never varies has no effect that could be told: None. Where features are tied to each other (a draw
    that updates one matrix more updates another one less) only contrasts can be told; the solution of least norm gives
    each effect relative to the mean of those that it is tied to.

    Returns:
        An effect for each feature, or None altogether if the runs are fewer than the varying features and two more.
    """
    x, y = np.asarray(features, float), np.asarray(values, float)
    varies = np.ptp(x, axis=0) > 0
    n, count = len(y), int(varies.sum())
    if n < count + 2 or count == 0:
        return None
    centred = x[:, varies] - x[:, varies].mean(0)
    inverse = np.linalg.pinv(centred.T @ centred, rcond=1e-10, hermitian=True)
    freedom = n - 1 - int(np.linalg.matrix_rank(centred))
    slopes = inverse @ centred.T @ (y - y.mean())
    residual = y - y.mean() - centred @ slopes
    spread = t_quantile(freedom) * np.sqrt(np.diag(inverse).clip(0) * (residual @ residual) / freedom)
    found = iter(zip(slopes, spread, strict=True))
    effects: list[Effect | None] = []
    for own in varies:
        if not own:
            effects.append(None)
            continue
        slope, half = (float(value) for value in next(found))
        effects.append(Effect(slope, slope - half, slope + half))
    return effects


def along(path: Sequence[tuple[float, float]], x: float) -> float | None:
    """The y at which a path of (x, y) points, joined by straight lines in their order, passes x.

    The highest, if it passes more than once; None if it never does. Nothing is extrapolated.
    """
    found = [y for at, y in path if at == x]
    for (x0, y0), (x1, y1) in pairwise(path):
        if min(x0, x1) < x < max(x0, x1):
            found.append(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    return max(found, default=None)
