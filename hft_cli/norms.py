"""How far each tensor of a run's model is from where it began: ‖θ_T − θ_0‖ / ‖θ_0‖, streamed from files. No torch.

The final value of a tensor is that of the last round whose delta holds it; what no delta holds did not move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hft_cli.layout import read_header
from hft_cli.run_dir import RunDir, read_json
from hft_cli.schema import UserError
from hft_cli.weights import Place, tensors, weights_hash

CHUNK = 1 << 20  # elements handled at once
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Change:
    """Frobenius norms of a tensor at the start and of its change; `relative` is None where it began as zeros."""

    tensor: str
    start: float
    change: float

    @property
    def relative(self) -> float | None:
        return self.change / self.start if self.start > 0 else None


def changes(run: RunDir, hashes: dict[Path, str]) -> list[Change]:
    """The change of every tensor of the model that a run started from. `hashes` remembers those of bases read before.

    Raises:
        UserError: why they cannot be told: the base is gone or is not the same any more, a delta is missing.
    """
    plan = read_json(run.plan)
    try:
        base, sealed, rounds = Path(plan["base"]), plan["base_sha256"], plan["rounds"]
        deltas = [run.round(entry["number"], entry["name"]).delta for entry in rounds]
    except (KeyError, TypeError):
        raise UserError("plan.json is broken") from None
    if not base.is_dir():
        raise UserError(f"the model that it started from, {base}, is gone")
    if base not in hashes:
        hashes[base] = weights_hash(base)
    if hashes[base] != sealed:
        raise UserError(f"the weights in {base} are not those that it started from")
    if missing := [delta for delta in deltas if not delta.exists()]:
        raise UserError(f"{missing[0].relative_to(run.folder)} is missing")
    last: dict[str, Place] = {
        name: (delta, info) for delta in deltas for name, info in read_header(delta).items()
    }  # a later delta goes before an earlier one
    return [_change(name, place, last.get(name)) for name, place in tensors(base).items()]


def _change(name: str, start: Place, end: Place | None) -> Change:
    if end is not None and start[1].shape != end[1].shape:
        raise UserError(f"{name} has another shape in {end[0].name}")
    of_start = of_change = 0.0
    if end is None:
        of_start = sum(float(values @ values) for values in numbers(start))
    else:
        for old, new in zip(numbers(start), numbers(end), strict=True):
            difference = new - old
            of_start += float(old @ old)
            of_change += float(difference @ difference)
    return Change(name, math.sqrt(of_start), math.sqrt(of_change))


def numbers(place: Place) -> Iterator[NDArray[np.float64]]:
    """A stored tensor's numbers in order, a chunk at a time. bfloat16 is the upper half of a float32.

    Raises:
        UserError: if it holds no floating-point numbers, or the file ends early.
    """
    path, info = place
    if info.dtype not in TYPES:
        raise UserError(f"{path.name} has tensors of type {info.dtype}, which are not measured")
    kind = np.dtype(TYPES[info.dtype])
    left = (info.stop - info.start) // kind.itemsize
    with path.open("rb") as file:
        file.seek(info.start)
        while left:
            values = np.fromfile(file, kind, min(CHUNK, left))
            if not len(values):
                raise UserError(f"{path} ends early")
            left -= len(values)
            if info.dtype == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield values.astype(np.float64)
