"""How far each tensor of a run's model moved: ‖θ_T − θ_0‖ / ‖θ_0‖, streamed from the files, without torch.

The final value of a tensor is in the last delta that holds it. A tensor that no delta holds did not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hft_cli.checkpoint.folders import stored_tensors, weights_hash
from hft_cli.checkpoint.tensors import StoredTensor, read_bytes, read_header
from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.run_dir import RunDir
from hft_cli.runner.base import find_base

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # of safetensors -> of numpy


@dataclass(frozen=True)
class TensorChange:
    """Frobenius norms of a tensor at the start and of its change."""

    tensor: str
    start: float
    change: float

    @property
    def relative(self) -> float | None:
        """The change as a share of the start; None for a tensor that started as zeros."""
        return self.change / self.start if self.start > 0 else None


def tensor_changes(run: RunDir, hash_of: Callable[[Path], str] = weights_hash) -> list[TensorChange]:
    """The change of every tensor of the model that a run started from.

    `hash_of` returns the hash of a folder's weights; a caller with many runs can pass a cached one.

    Raises:
        UserError: the change cannot be measured, because the base is missing or has changed, or a delta is missing.
    """
    try:
        deltas = [run.round(entry["number"], entry["name"]).delta for entry in read_json(run.plan)["rounds"]]
        base = find_base(run, hash_of=hash_of, fix="Restore it.")
    except (KeyError, TypeError):
        raise UserError(f"{run.plan} is broken.") from None
    if missing := [delta for delta in deltas if not delta.exists()]:
        raise UserError(f"{missing[0]} is missing.")
    final = {name: tensor for delta in deltas for name, tensor in read_header(delta).items()}
    return [_change(name, start, final.get(name)) for name, start in stored_tensors(base).items()]


def _change(name: str, start: StoredTensor, end: StoredTensor | None) -> TensorChange:
    if end is None:
        return TensorChange(name, math.sqrt(sum(float(values @ values) for values in stored_values(start))), 0.0)
    if start.layout != end.layout:
        raise UserError(f"{name} has another dtype or shape in {end.file} than in the base model.")
    start_square = change_square = 0.0
    for old, new in zip(stored_values(start), stored_values(end), strict=True):
        start_square += float(old @ old)
        change_square += float((new - old) @ (new - old))
    return TensorChange(name, math.sqrt(start_square), math.sqrt(change_square))


def stored_values(tensor: StoredTensor) -> Iterator[NDArray[np.float64]]:
    """The values of a stored tensor in order, in chunks.

    Raises:
        UserError: the tensor does not hold floating-point numbers, or its file ends early.
    """
    if tensor.dtype not in DTYPES:
        raise UserError(f"{tensor.file} has tensors of type {tensor.dtype}, whose change cannot be measured.")
    for chunk in read_bytes(tensor):
        values = np.frombuffer(chunk, DTYPES[tensor.dtype])
        if tensor.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        yield values.astype(np.float64)
