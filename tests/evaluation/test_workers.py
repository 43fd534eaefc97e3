"""Batches of rows, and items shared among ranks."""

from __future__ import annotations

import torch

from hft_cli.evaluation.workers import batches_by_length, pad_rows, share_items
from hft_cli.launch.ranks import Ranks


def test_batches_have_similar_lengths_the_longest_first():
    assert list(batches_by_length([1, 5, 2, 4, 3], 2)) == [[1, 3], [4, 2], [0]]


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
