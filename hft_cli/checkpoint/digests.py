"""SHA-256 of tensors in files, also as a computation in fewer bits has them in memory. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from hft_cli.checkpoint.tensors import StoredTensor, read_bytes
from hft_cli.errors import UserError


def tensor_sha256(tensor: StoredTensor, dtype: str | None = None) -> str:
    """SHA-256 of the bytes of a tensor, after rounding to nearest (ties to even) if `dtype` is another one. A wider one
    changes no value.

    Raises:
        UserError: for a dtype that the tensor cannot be rounded to.
    """
    digest = hashlib.sha256()
    convert = _rounding(tensor.dtype, dtype or tensor.dtype)
    for chunk in read_bytes(tensor):
        digest.update(convert(chunk))
    return digest.hexdigest()


def _rounding(source: str, target: str) -> Callable[[bytearray], Any]:
    """The function that converts the bytes of finite numbers from one dtype to another."""
    import numpy as np

    if source == target:
        return lambda chunk: chunk
    if (source, target) == ("BF16", "F32"):  # the upper half of a float32
        return lambda chunk: (np.frombuffer(chunk, "<u2").astype("<u4") << 16).tobytes()
    numbers = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    if source not in numbers or target not in ("F32", "BF16"):
        raise UserError(f"A tensor of {source} cannot be compared with {target} in memory.")

    def rounded(chunk: bytearray) -> Any:
        with np.errstate(over="ignore"):  # too large is infinite, as in memory
            single = np.frombuffer(chunk, numbers[source]).astype("<f4")
        if target == "F32":
            return single.tobytes()
        bits = single.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()

    return rounded
