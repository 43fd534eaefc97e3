"""Tensors as byte ranges of safetensors files: headers, reading, writing, comparing. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes.
Everything here works on byte ranges: any dtype passes bit for bit, and memory does not grow with the model.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from hft_cli.errors import UserError, short
from hft_cli.files import sync_folder

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

MOST = 1 << 63  # bytes and elements of a file

CHUNK = 1 << 20  # bytes read at a time: they stay in the cache of a core

THREADS = min(4, os.cpu_count() or 1)  # that read and compare

WRITERS = 4  # files written at a time: they wait for the disk more than for a core


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: the bytes `file[start:stop]`, row-major, counted from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def layout(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape."""
        return self.dtype, self.shape

    def extends(self, other: StoredTensor) -> bool:
        """Whether this tensor has the dtype and the row shape of `other`, and more rows."""
        same_rows = self.dtype == other.dtype and self.shape[1:] == other.shape[1:]
        return same_rows and len(self.shape) == len(other.shape) > 0 and self.shape[0] > other.shape[0]

    def rows(self, first: int, last: int) -> StoredTensor:
        """Rows `first` to `last` (exclusive) as a tensor of their own."""
        row = self.size // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + first * row, stop=self.start + last * row)


def read_header(path: str | Path) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file, by name. A missing, broken or truncated file is a UserError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start - 8 > min(size, MAX_HEADER_BYTES):
                raise UserError(f"{path} is no safetensors file (a failed download, or a Git LFS pointer?). Fetch it.")
            header = json.loads(file.read(start - 8))
        tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                shape = entry["shape"]
                if not all(type(number) is int and 0 <= number < MOST for number in (first, last, *shape)):
                    raise ValueError(f"'{name}' has a shape or offsets that are no sizes")
                tensors[name] = StoredTensor(path, entry["dtype"], tuple(shape), start + first, start + last)
        end = _end_of_data(tensors, start)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{path} has a broken safetensors header ({what}). Fetch the file again.") from None
    if end != size:
        raise UserError(f"{path} has {size} bytes where its header says {end}. Fetch the file again.")
    return tensors


def _end_of_data(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """The offset behind the last tensor; UserError unless the tensors fill the bytes from `start` without gaps."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        bits = math.prod(tensor.shape) * BITS[tensor.dtype]
        if tensor.start != start or tensor.size * 8 != bits:
            raise UserError(
                f"{tensor.file}: the offsets of tensor '{name}' do not fit its shape. Fetch the file again."
            )
        start = tensor.stop
    return start


def read_bytes(tensor: StoredTensor) -> Iterator[bytearray]:
    """Read the bytes of a tensor in chunks. A chunk is valid until the next one is read: all but the last share one."""
    chunk = bytearray(min(CHUNK, tensor.size))
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for left in range(tensor.size, 0, -CHUNK):
            if left < len(chunk):
                chunk = bytearray(left)
            _fill(memoryview(chunk), file, tensor)
            yield chunk


def _fill(chunk: memoryview, file: io.FileIO, tensor: StoredTensor) -> None:
    """Read into the whole chunk; UserError if the file ends early."""
    while chunk:
        count = file.readinto(chunk)
        if not count:
            raise UserError(f"{tensor.file} ends early. Fetch the file again.")
        chunk = chunk[count:]


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if first.layout != second.layout:
        return False
    return all(a == b for a, b in zip(read_bytes(first), read_bytes(second), strict=True))


def same_each(pairs: Iterable[tuple[StoredTensor, StoredTensor]]) -> Iterator[bool]:
    """`same_bytes` of each pair, in order; several at a time, because files are read while others are compared."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(lambda pair: same_bytes(*pair), pairs)


class Writer:
    """Write a safetensors file tensor by tensor. The file gets its name only when it is complete."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
        """Write the header. `tensors` has dtype, shape and size of each tensor, in the order of the calls of `add`."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.size
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        self._remaining = [(name, tensor.size) for name, tensor in reversed(list(tensors.items()))]
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._file = self._part.open("wb", buffering=0)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Append the bytes of the next tensor; ValueError if the header has another name or size at this place."""
        self._check(name, sum(self._write(chunk) for chunk in chunks))

    def copy(self, name: str, parts: Sequence[StoredTensor]) -> None:
        """Append the next tensor from tensors of other files, whose rows are joined, as `add` does."""
        for part in parts:
            rest = replace(part, start=part.start + self._copy_in_kernel(part))
            if rest.size:
                for chunk in read_bytes(rest):
                    self._write(chunk)
        self._check(name, sum(part.size for part in parts))

    def _check(self, name: str, size: int) -> None:
        expected = self._remaining.pop() if self._remaining else ("nothing", 0)
        if (name, size) != expected:
            raise ValueError(f"expected {expected[1]} bytes of {expected[0]}, got {size} of {name}")

    def _write(self, chunk: bytes | bytearray | memoryview) -> int:
        view = memoryview(chunk).cast("B")
        size = len(view)
        while view:
            view = view[self._file.write(view) :]
        return size

    def _copy_in_kernel(self, part: StoredTensor) -> int:
        """Copy a tensor without bringing it into this process; how many of its bytes the system has copied."""
        copied = 0
        with part.file.open("rb", buffering=0) as source, suppress(OSError, AttributeError):
            while copied < part.size:
                begin = part.start + copied
                count = os.copy_file_range(source.fileno(), self._file.fileno(), part.size - copied, begin)
                if not count:  # the file ends early, which reading on will say
                    break
                copied += count
                # Start to write it to the disk, so that the end of the file does not wait for all of it.
                os.posix_fadvise(self._file.fileno(), self._file.tell() - count, count, os.POSIX_FADV_DONTNEED)
        return copied

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None and not self._remaining:
            self._part.rename(self._path)
            sync_folder(self._path.parent)
        else:
            self._part.unlink()
            if kind is None:
                raise ValueError(f"{self._path.name} ends before {self._remaining[-1][0]}")
