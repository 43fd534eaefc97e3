"""Continual learning: the measures of a sequence of rounds. Standard library only.

R[i][j] is the score on task j after round i, all on one scale from 0 to 1 (TRACE: Wang et al. 2023, arXiv 2310.06762).
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def overall_performance(scores: Matrix) -> float:
    """OP: the mean over all T tasks after the last round, (1/T) sum_i R[T][i].

    Raises:
        ValueError: if the matrix is not T x T.
    """
    _square(scores)
    return sum(scores[-1]) / len(scores)


def backward_transfer(scores: Matrix) -> float:
    """BWT: what the tasks lost since they were learned, (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i]); below 0 is forgetting.

    Raises:
        ValueError: if the matrix is not T x T, or T is 1: a single task has none before it to forget.
    """
    _square(scores)
    if len(scores) < 2:
        raise ValueError("backward transfer needs two rounds or more")
    last = len(scores) - 1
    return sum(scores[last][i] - scores[i][i] for i in range(last)) / last


def _square(scores: Matrix) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        raise ValueError("R must have a row and a column for each round")
