"""Tensors as bytes in safetensors files: streaming deltas out and models together. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes.
All of this works on byte ranges, so any dtype passes bit for bit and memory does not grow with the model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from hft_cli.layout import TensorInfo, checkpoint_files, read_header
from hft_cli.schema import UserError

CHUNK = 1 << 22  # bytes handled at once
NOT_WEIGHTS = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what a model's folder has besides


def fetch(path: str) -> Path:
    """The local folder of a model: `path` itself, or a hub repository's snapshot, downloaded if need be.

    Raises:
        UserError: if it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path} is not a folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(path, allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in NOT_WEIGHTS)])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path={path} is neither a folder nor a model that the hub gives us: {reason}") from None
    return Path(found)


class Writer:
    """Write a safetensors file tensor by tensor, in the order announced, and give it its name only when it is whole."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        """`tensors`: name -> dtype and shape, in the order in which `add` will get them; offsets only give the size."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, info in tensors.items():
            begin, end = end, end + info.stop - info.start
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
        self._left = [(name, info.stop - info.start) for name, info in reversed(list(tensors.items()))]
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._file = self._part.open("wb")
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Append the next tensor's bytes.

        Raises:
            ValueError: if it is not the tensor announced next, or not of its size.
        """
        expected = self._left.pop() if self._left else ("nothing", 0)
        if (name, len(data)) != expected:
            raise ValueError(f"expected {expected[1]} bytes of {expected[0]}, got {len(data)} of {name}")
        self._file.write(data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None and not self._left:
            self._part.rename(self._path)
        else:
            self._part.unlink()
            if kind is None:
                raise ValueError(f"{self._path.name} ends before {self._left[-1][0]}")


def tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a checkpoint: name -> its file, and its dtype, shape and byte range there."""
    headers: dict[Path, dict[str, TensorInfo]] = {}
    found = {}
    for name, file in checkpoint_files(folder).items():
        if file not in headers:
            headers[file] = read_header(file)
        found[name] = (file, headers[file][name])
    return found


def apply_delta(base: Path, delta: Path, out: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write the model that has the delta's tensors and, for the rest, the base's: same files, same dtypes, same order.

    The base's other files (config, tokenizer) come along; `extra` (name -> text) replaces or adds some. The folder gets
    its name only when it is whole.

    Raises:
        UserError: if a tensor of the delta is not in the base with the same dtype and shape.
    """
    changes = read_header(delta)
    where = tensors(base)
    for name, info in changes.items():
        if name not in where or (where[name][1].dtype, where[name][1].shape) != (info.dtype, info.shape):
            raise UserError(f"{delta} has {name} as {info.dtype} {list(info.shape)}, which {base} does not.")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in NOT_WEIGHTS:
            shutil.copyfile(file, part / file.name)
    for name, text in (extra or {}).items():
        (part / name).write_text(text)
    for file in sorted({file for file, _ in where.values()}):
        shutil.copyfile(file, part / file.name)
        with (part / file.name).open("r+b") as target, delta.open("rb") as source:
            for name, info in changes.items():
                if where[name][0] == file:
                    target.seek(where[name][1].start)
                    for chunk in _chunks(source, info):
                        target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def same_bytes(one: tuple[Path, TensorInfo], other: tuple[Path, TensorInfo]) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits."""
    (file, info), (other_file, other_info) = one, other
    if (info.dtype, info.shape) != (other_info.dtype, other_info.shape):
        return False
    with file.open("rb") as a, other_file.open("rb") as b:
        return all(x == y for x, y in zip(_chunks(a, info), _chunks(b, other_info), strict=True))


def _chunks(file: BinaryIO, info: TensorInfo) -> Iterator[bytes]:
    file.seek(info.start)
    left = info.stop - info.start
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            raise UserError(f"{file.name} ends early.")
        left -= len(chunk)
        yield chunk
