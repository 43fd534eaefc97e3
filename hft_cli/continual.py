"""Continual learning: which rows of past tasks are trained on again, and the measures of a sequence. No torch.

R[i][j] is the score on task j after round i, all on one scale from 0 to 1 (TRACE: Wang et al. 2023, arXiv 2310.06762);
None where it was not scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from hft_cli.data import Chat, read_chats
from hft_cli.methods import Source
from hft_cli.schema import DataConfig, locate

Matrix = Sequence[Sequence[float | None]]


def read_sources(sources: Iterable[Source], data: DataConfig, seed: int) -> list[Chat]:
    """The rows that a step trains on, source by source, each in the order of its file.

    Raises:
        UserError: for a bad row, with file, line and reason.
    """
    chats: list[Chat] = []
    for source in sources:
        if source.general:
            chats += read_chats(locate(source.path))
            continue
        own = read_chats(locate(source.path), format=data.format, split=data.split, max_rows=data.max_rows)
        count = round(source.share * len(own)) if source.rows is None else source.rows
        chats += [own[index] for index in kept_rows(len(own), max(count, 1), f"{seed}\0{source.path}")]
    return chats


def kept_rows(rows: int, count: int, key: str) -> list[int]:
    """`count` of the indices below `rows` (all, if there are fewer), drawn uniformly under `key`, in order.

    As in selection: the first of an order by hash, so that it hangs on no state and is the same everywhere.
    """

    def order(index: int) -> bytes:
        return hashlib.blake2b(f"{key}\0{index}".encode(), digest_size=16).digest()

    return sorted(sorted(range(rows), key=order)[:count]) if count < rows else list(range(rows))


def overall_performance(scores: Matrix) -> float:
    """OP: the mean over all T tasks after the last round, (1/T) sum_i R[T][i].

    Raises:
        ValueError: if the matrix is not T x T, or a score that is needed is missing.
    """
    _square(scores)
    last = len(scores) - 1
    return sum(_at(scores, last, i) for i in range(len(scores))) / len(scores)


def backward_transfer(scores: Matrix) -> float:
    """BWT: what the tasks lost since they were learned, (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i]); below 0 is forgetting.

    Raises:
        ValueError: if the matrix is not T x T, a score that is needed is missing, or T is 1: a single task has none
            before it to forget.
    """
    _square(scores)
    if len(scores) < 2:
        raise ValueError("backward transfer needs two rounds or more")
    last = len(scores) - 1
    return sum(_at(scores, last, i) - _at(scores, i, i) for i in range(last)) / last


def _at(scores: Matrix, row: int, column: int) -> float:
    value = scores[row][column]
    if value is None:
        raise ValueError(f"R has no score of task {column + 1} after round {row + 1}")
    return value


def _square(scores: Matrix) -> None:
    if not scores or any(len(row) != len(scores) for row in scores):
        raise ValueError("R must have a row and a column for each round")
