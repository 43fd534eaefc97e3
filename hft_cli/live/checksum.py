"""A checksum of weights in memory, computed where they are."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from hft_cli.live.compat import local_part, unwrapped


def frozen_checksum(model: Any) -> int:
    """A checksum of the bits of all frozen weights that this rank holds (under ZeRO-3: of its shards)."""
    return _checksum(model, trained=False)


def trained_checksum(model: Any) -> int:
    """The same of all weights that require a gradient."""
    return _checksum(model, trained=True)


def of_all_ranks(checksum: int) -> list[int]:
    """The checksums of all ranks, in their order. Collective over them, if there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [checksum]
    checksums = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(checksums, checksum)
    return checksums


def _checksum(model: Any, trained: bool) -> int:
    named = [(name, value) for name, value in unwrapped(model).named_parameters() if value.requires_grad == trained]
    sums = [(name, weighted_sum_of_bits(local_part(value))) for name, value in named]  # queued on the device
    text = json.dumps([(name, int(total)) for name, total in sums])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


CHUNK = 1 << 22  # words that have a weight at a time


def weighted_sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as 64-bit words, each times an odd number that depends on its place, summed modulo 2**64.

    It is exact, and computed where the tensor is. Every change of one word changes it; other changes go unnoticed with
    a probability of about 2**-63.

    Args:
        tensor: of any shape and dtype, on any device.

    Returns:
        An int64 scalar on the device of the tensor.
    """
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(data) % 8 or data.storage_offset() % 8:  # a copy that ends with zeros
        data = torch.nn.functional.pad(data, (0, -len(data) % 8))
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK]
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += places.mul_(MULTIPLIER).bitwise_or_(1).mul_(part).sum()
    return total


MULTIPLIER = 0x1E3779B97F4A7C15  # odd; it spreads the places over 64 bits
