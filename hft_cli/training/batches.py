"""Rows of tokens as padded batches, for what computes losses beside the trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

TokensAndLabels = tuple[torch.Tensor, torch.Tensor]  # token ids and labels (-100: no loss), each of shape (tokens,)


def padded(rows: Sequence[TokensAndLabels]) -> dict[str, torch.Tensor]:
    """Rows as a right-padded batch: `input_ids`, `attention_mask` and `labels`, int64 of shape (rows, tokens)."""
    ids, labels = ([row[part].long() for row in rows] for part in (0, 1))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
