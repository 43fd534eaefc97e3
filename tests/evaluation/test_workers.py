"""Batches of rows, and items shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hft_cli.errors import UserError
from hft_cli.evaluation.workers import by_length, in_batches, pad_rows, share_items
from hft_cli.launch.ranks import Ranks


def test_rows_are_padded_on_the_given_side():
    rows = [[1, 2], [3]]
    assert pad_rows(rows, 0, "cpu").tolist() == [[1, 2], [3, 0]]
    assert pad_rows(rows, -100, "cpu", side="left").tolist() == [[1, 2], [-100, 3]]
    assert pad_rows(rows, 0, "cpu").dtype == torch.int64


def times_ten(items: list[int]) -> list[int]:
    assert items, "a rank without items must not call the function"
    return [10 * item for item in items]


def test_shared_items_come_back_in_order(monkeypatch):
    for items in ([1, 2, 3], [1, 2, 3, 4], [1], []):
        shares = [[10 * item for item in items[rank::2]] for rank in (0, 1)]
        monkeypatch.setattr(Ranks, "gather", lambda self, share, shares=shares: _gathered(self, share, shares))
        for rank in (0, 1):
            assert share_items(Ranks(rank, 2), times_ten, items) == [10 * item for item in items]


def _gathered(ranks: Ranks, share: list[int], shares: list[list[int]]) -> list[list[int]]:
    assert share == shares[ranks.rank]
    return shares


def test_a_batch_that_does_not_fit_is_halved_with_auto():
    done: list[int] = []
    sizes: list[int] = []

    def compute(batch: Sequence[int]) -> None:
        sizes.append(len(batch))
        if len(batch) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.extend(batch)

    in_batches(range(50), "auto", compute)
    assert done == list(range(50))
    assert sizes == [50, 32, 16, 16, 16, 2]
    with pytest.raises(UserError, match=r"does not suffice for 32 rows\. Lower suite\.batch_size\.$"):
        in_batches(range(50), 32, compute)


def test_a_single_row_that_does_not_fit_is_a_mistake():
    def compute(batch: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match=r"does not suffice for 1 row\. Take a GPU with more memory"):
        in_batches(range(3), "auto", compute)


def test_the_longest_rows_come_first():
    assert by_length([3, 9, 1, 9]) == [1, 3, 0, 2]
