"""Tensors as bytes in safetensors files: streaming deltas out and models together. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes.
All of this works on byte ranges, so any dtype passes bit for bit and memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType

from hft_cli.layout import Param, TensorInfo, checkpoint_files, read_header
from hft_cli.schema import UserError

CHUNK = 1 << 22  # bytes handled at once
Place = tuple[Path, TensorInfo]  # a stored tensor: its file, and its dtype, shape and byte range there
NOT_WEIGHTS = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")  # what a model's folder has besides


def fetch(path: str, key: str = "model.path") -> Path:
    """The local folder of a model: `path` itself, or a hub repository's snapshot, downloaded if need be.

    Raises:
        UserError: if it is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}={path} is not a folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(path, allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in NOT_WEIGHTS)])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{key}={path} is neither a folder nor a model that the hub gives us: {reason}") from None
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

    def add(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Append the next tensor's bytes.

        Raises:
            ValueError: if it is not the tensor announced next, or not of its size.
        """
        expected = self._left.pop() if self._left else ("nothing", 0)
        size = sum(self._file.write(chunk) for chunk in chunks)
        if (name, size) != expected:
            raise ValueError(f"expected {expected[1]} bytes of {expected[0]}, got {size} of {name}")

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


def tensors(folder: Path) -> dict[str, Place]:
    """Every tensor of a checkpoint: name -> its file, and its dtype, shape and byte range there."""
    headers: dict[Path, dict[str, TensorInfo]] = {}
    found = {}
    for name, file in checkpoint_files(folder).items():
        if file not in headers:
            headers[file] = read_header(file)
        found[name] = (file, headers[file][name])
    return found


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files of a checkpoint, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(set(checkpoint_files(folder).values())):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def lay_over(base: Path, deltas: Sequence[Path], out: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write the model that has the deltas' tensors (the last one's, of several), in their dtypes, and for the rest the
    base's, file by file.

    The base's other files (config, tokenizer) come along; `extra` (name -> text) replaces or adds some. The folder gets
    its name only when it is whole.

    Raises:
        UserError: if a tensor of a delta is not in the base with the same shape.
    """
    changes: dict[str, Place] = {name: (delta, info) for delta in deltas for name, info in read_header(delta).items()}
    where = tensors(base)
    for name, (delta, info) in changes.items():
        if name not in where or where[name][1].shape != info.shape:
            raise UserError(f"{delta} has {name} as {list(info.shape)}, which {base} has not.")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in NOT_WEIGHTS:
            shutil.copyfile(file, part / file.name)
    for name, text in (extra or {}).items():
        (part / name).write_text(text)
    for file in sorted({file for file, _ in where.values()}):
        places = {name: changes.get(name, place) for name, place in where.items() if place[0] == file}
        if not changes.keys() & places.keys():
            shutil.copyfile(file, part / file.name)
            continue
        with Writer(part / file.name, {name: info for name, (_, info) in places.items()}, {"format": "pt"}) as writer:
            for name, place in places.items():
                writer.add(name, read(place))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def reset_pieces(
    tuned: Sequence[Param], base: Sequence[Param], folders: tuple[Path, Path], names: Iterable[str], join: bool
) -> dict[str, list[Place]]:
    """Where the bytes lie that put the named parameters of a tuned model back to its base (Half-Reset, section 2).

    Args:
        tuned, base: parameters of the two models; `folders` holds theirs, in that order.
        names: parameters to put back. Their bits and dtype become the base's.
        join: where the tuned model has more rows (a longer vocabulary), put back those that both have.

    Returns:
        Tensor of the tuned model's files -> its places, one after the other.

    Raises:
        UserError: for names or shapes that do not fit, naming the first few.
    """
    own, theirs = tensors(folders[0]), tensors(folders[1])
    stored, base_stored = ({p.name: p.stored for p in params} for params in (tuned, base))
    pieces: dict[str, list[Place]] = {}
    odd: list[str] = []
    for name in names:
        if len(base_stored.get(name, ())) != len(stored[name]):
            odd.append(f"{name} (not in the base)")
            continue
        for at, source in zip(stored[name], base_stored[name], strict=True):
            (file, info), place = own[at], theirs[source]
            rows = place[1].shape[:1]
            if info.shape == place[1].shape:
                pieces[at] = [place]
            elif (
                join and info.shape[1:] == place[1].shape[1:] and info.shape[:1] > rows and info.dtype == place[1].dtype
            ):
                left = (info.shape[0] - rows[0], *info.shape[1:])
                tail = replace(info, shape=left, start=info.start + place[1].stop - place[1].start)
                pieces[at] = [place, (file, tail)]
            else:
                odd.append(f"{at} ({list(info.shape)}, in the base {list(place[1].shape)})")
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(
            f"{folders[0]} cannot be put back to {folders[1]}: {', '.join(odd[:3])}{more}. Leave embeddings and head "
            "tuned (selection.embeddings=freeze selection.head=freeze), or, if only the vocabulary is longer, put back "
            "the rows that both have (method.shared_rows=true)."
        )
    return pieces


def write_pieces(pieces: Mapping[str, Sequence[Place]], out: Path, metadata: Mapping[str, str]) -> None:
    """Stream a delta together from tensors that lie in other files; the pieces of one are joined along its rows."""
    announced = {}
    for name, places in pieces.items():
        first = places[0][1]
        if len(places) > 1:
            rows = sum(info.shape[0] for _, info in places)
            size = sum(info.stop - info.start for _, info in places)
            first = replace(first, shape=(rows, *first.shape[1:]), start=0, stop=size)
        announced[name] = first
    with Writer(out, announced, {"format": "pt", **metadata}) as writer:
        for name, places in pieces.items():
            writer.add(name, chain.from_iterable(read(place) for place in places))


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits."""
    (_, info), (_, other_info) = one, other
    if (info.dtype, info.shape) != (other_info.dtype, other_info.shape):
        return False
    return all(a == b for a, b in zip(read(one), read(other), strict=True))


def read(place: Place) -> Iterator[bytes]:
    """A stored tensor's bytes, a chunk at a time.

    Raises:
        UserError: if the file ends early.
    """
    path, info = place
    with path.open("rb") as file:
        file.seek(info.start)
        left = info.stop - info.start
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise UserError(f"{path} ends early.")
            left -= len(chunk)
            yield chunk
