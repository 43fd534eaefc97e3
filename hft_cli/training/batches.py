"""Batches: padded, for what computes losses beside the trainer; of rows of similar lengths; those of a part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

TokensAndLabels = tuple[torch.Tensor, torch.Tensor]  # token ids and labels (-100: no loss), each of shape (tokens,)


def padded(rows: Sequence[TokensAndLabels]) -> dict[str, torch.Tensor]:
    """Rows as a right-padded batch: `input_ids`, `attention_mask` and `labels`, int64 of shape (rows, tokens)."""
    ids, labels = ([row[part].long() for row in rows] for part in (0, 1))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


class ByLength(Sampler[int]):
    """The order of rows by `get_length_grouped_indices`, which depends on seed and epoch alone.

    Args:
        lengths: of the rows, in tokens.
        batch: rows of an optimizer step, over all ranks.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


def rows_of_steps(rows: int, length: int, batch: int, seed: int, steps: range) -> list[int]:
    """The rows of some optimizer steps of a training, in their order.

    Args:
        rows: of the data set. Each epoch has them in an order of its own, which depends on seed and epoch alone.
        length: rows of the whole training, over all epochs.
        batch: rows of an optimizer step.
        steps: counted from 0.
    """
    start, end = steps.start * batch, min(steps.stop * batch, length)
    order: list[int] = []
    for epoch in range(start // rows, math.ceil(end / rows)):
        generator = torch.Generator().manual_seed(seed + epoch)
        epoch_rows = torch.randperm(rows, generator=generator).tolist()
        order += epoch_rows[max(start - epoch * rows, 0) : end - epoch * rows]
    return order


def row_lengths(dataset: Any) -> list[int]:
    """The tokens of each row of a data set, of all its columns of token ids."""
    import pyarrow.compute as pc

    names = [name for name in dataset.column_names if name.endswith("_ids")]
    lengths: list[int] = []
    for batch in dataset.select_columns(names).with_format("arrow").iter(10_000):
        columns = [pc.list_value_length(batch[name]).to_pylist() for name in names]
        lengths += map(sum, zip(*columns, strict=True))
    return lengths
