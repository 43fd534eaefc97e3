"""Tensors between those of two models: base + share x (tuned - base), from file to file. No torch.

Numbers of 16 bits are computed in float32, those of 32 bits in float64, by one multiplication for each model and one
addition, and rounded to the nearest, ties to even: every machine gets the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import StoredTensor, Writer, read_bytes
from hft_cli.errors import UserError
from hft_cli.text import first_of, plural

NUMBERS = 1 << 18  # computed at a time: they stay in the cache of a core

# dtype in a file -> how numpy reads it, and what it is computed in. numpy has no bfloat16.
DTYPES: dict[str, tuple[str, str]] = {
    "BF16": ("<u2", "<f4"), "F16": ("<f2", "<f4"), "F32": ("<f4", "<f8"), "F64": ("<f8", "<f8"),
}  # fmt: skip


@dataclass(frozen=True)
class Blend:
    """A tensor of a tuned model that keeps a share of its change.

    Attributes:
        tuned: the tensor of the tuned model.
        base: the tensor of the base; it may have fewer rows. Rows that only `tuned` has stay as they are.
        share: of the change; 0 gives the bits of the base, 1 those of the tuned tensor.
    """

    tuned: StoredTensor
    base: StoredTensor
    share: float

    @property
    def header(self) -> StoredTensor:
        """A tensor with the dtype, shape and size of the result: the dtype of the base if it is put back as it is."""
        if self.share:
            return self.tuned
        size = sum(piece.size for piece in self.pieces)
        return replace(self.base, shape=self.tuned.shape, start=0, stop=size)

    @property
    def pieces(self) -> list[StoredTensor]:
        """The tensors whose rows the result joins where nothing is computed."""
        return [self.tuned] if self.share == 1 else [self.base, *self._rest]

    @property
    def _rest(self) -> list[StoredTensor]:
        """The rows that the base does not have."""
        more = self.tuned.shape != self.base.shape
        return [self.tuned.rows(self.base.shape[0], self.tuned.shape[0])] if more else []

    def write(self, name: str, writer: Writer) -> None:
        """Append the tensor `name` to a file."""
        if self.share in (0, 1):
            writer.copy(name, self.pieces)
        else:
            writer.add(name, self.read())

    def read(self) -> Iterator[bytes | bytearray]:
        """The bytes of the result, in chunks. A chunk is valid until the next one is read."""
        if self.share in (0, 1):
            for piece in self.pieces:
                yield from read_bytes(piece)
            return
        shared = self.tuned.rows(0, self.base.shape[0]) if self._rest else self.tuned
        for base, tuned in zip(_numbers(self.base), _numbers(shared), strict=True):
            kind = np.result_type(base, tuned).type
            values = base * kind(1 - self.share) + tuned * kind(self.share)
            yield _rounded(values, self.tuned.dtype)
        for piece in self._rest:
            yield from read_bytes(piece)


def write_blends(blends: Mapping[str, Blend], out: Path, metadata: Mapping[str, str]) -> None:
    """Write a delta of blended tensors, by their names in the files of the tuned model."""
    header = {name: blend.header for name, blend in blends.items()}
    with Writer(out, header, {"format": "pt", **metadata}) as writer:
        for name, blend in blends.items():
            blend.write(name, writer)


def is_blend(tensor: StoredTensor, blend: Blend) -> bool:
    """Whether a tensor of a file has the dtype, shape and bits of the result."""
    if tensor.layout != blend.header.layout:
        return False
    place = tensor.start
    with tensor.file.open("rb", buffering=0) as file:
        for chunk in blend.read():
            if _exactly(file.fileno(), place, len(chunk)) != chunk:
                return False
            place += len(chunk)
    return True


@dataclass(frozen=True)
class StoredModel:
    """The parameters of a model and the tensors of its files. `folder` names it in errors."""

    folder: Path
    params: Sequence[Param]
    tensors: Mapping[str, StoredTensor]


def blends(tuned: StoredModel, base: StoredModel, kept: Mapping[str, float], shared_rows: bool) -> dict[str, Blend]:
    """What becomes of the tensors of a tuned model that is put back to its base, wholly or in part.

    Args:
        kept: parameter -> share of its change that it keeps. Others are not in the result.
        shared_rows: whether to put back only the rows that both models have, if the tuned one has more (a longer
            vocabulary).

    Returns:
        By the names of tensors in the files of the tuned model.

    Raises:
        UserError: if names, shapes or dtypes do not fit.
    """
    tuned_names, base_names = ({p.name: p.stored for p in model.params} for model in (tuned, base))
    result: dict[str, Blend] = {}
    mismatches: list[str] = []
    for name, share in kept.items():
        here, there = len(tuned_names[name]), len(base_names.get(name, ()))
        if here != there:
            mismatches.append(f"{name} ({plural(here, 'tensor')} here, {plural(there, 'tensor')} in the base)")
            continue
        for target, source in zip(tuned_names[name], base_names[name], strict=True):
            old, new = tuned.tensors[target], base.tensors[source]
            if old.shape == new.shape or (shared_rows and old.extends(new)):
                result[target] = Blend(old, new, share)
            else:
                mismatches.append(f"{target} ({list(old.shape)}, in the base {list(new.shape)})")
    if mismatches:
        raise UserError(
            f"{tuned.folder} cannot be set back to {base.folder}: {first_of(mismatches, 3)}. Keep "
            "embeddings and head tuned (selection.embeddings=freeze selection.head=freeze) or, if only the vocabulary "
            "is longer, set back the rows that both models have (method.shared_rows=true)."
        )
    _require_numbers(blend for blend in result.values() if blend.share not in (0, 1))
    return result


def _require_numbers(blended: Iterable[Blend]) -> None:
    """Raise UserError for a dtype that nothing can be computed with."""
    for tensor in (tensor for blend in blended for tensor in (blend.tuned, blend.base)):
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file} has tensors of {tensor.dtype}, which cannot be interpolated. Convert the model to "
                f"one of: {', '.join(DTYPES)}."
            )


def _numbers(tensor: StoredTensor) -> Iterator[Any]:
    """The values of a tensor in order, NUMBERS at a time, as an array of float32 or float64."""
    stored, computed = DTYPES[tensor.dtype]
    width = np.dtype(stored).itemsize
    with tensor.file.open("rb", buffering=0) as file:
        for start in range(tensor.start, tensor.stop, NUMBERS * width):
            values = np.frombuffer(_exactly(file.fileno(), start, min(NUMBERS * width, tensor.stop - start)), stored)
            if tensor.dtype == "BF16":
                yield (values.astype("<u4") << 16).view(computed)
            else:
                yield values.astype(computed)


def _exactly(descriptor: int, start: int, count: int) -> bytes:
    """Bytes of a file; UserError if it ends early."""
    data = b""
    while len(data) < count:
        part = os.pread(descriptor, count - len(data), start + len(data))
        if not part:
            raise UserError("A weight file ends early. Fetch it again.")
        data += part
    return data


def _rounded(values: Any, dtype: str) -> bytes:
    """Numbers in the dtype of a file, to the nearest, ties to even."""
    if dtype != "BF16":
        result: bytes = values.astype(DTYPES[dtype][0]).tobytes()
        return result
    bits = values.astype("<f4").view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)  # the sum would carry into the sign
    return bytes(rounded.astype("<u2").tobytes())
