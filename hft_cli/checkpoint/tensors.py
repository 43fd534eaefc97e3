"""Tensors as bytes in safetensors files: streaming deltas out and models together. No torch.

A safetensors file is an 8-byte little-endian length, a JSON header (name -> dtype, shape, byte range) and the bytes.
All of this works on byte ranges, so any dtype passes bit for bit and memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType

from hft_cli.checkpoint.naming import Param
from hft_cli.errors import UserError
from hft_cli.files import read_json_object
from hft_cli.paths import NOT_WEIGHTS

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its bytes are `file[start:stop]`, row-major, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, with byte offsets counted from the start of the file.

    Raises:
        UserError: the file is missing, no safetensors file, cut short, or its offsets do not fit its tensors.
    """
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start - 8 > min(size, 100_000_000):  # the format's own limit on a header
                raise UserError(f"{path} is no safetensors file (a failed download, or a Git LFS pointer?). Fetch it.")
            header = json.loads(file.read(start - 8))
        infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start + first, start + last)
        end = start
        for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            bits = math.prod(info.shape) * BITS[info.dtype]
            if info.start != end or (info.stop - info.start) * 8 != bits or min(info.shape, default=0) < 0:
                raise UserError(f"{path}: the offsets of tensor '{name}' do not fit its shape. Fetch the file again.")
            end = info.stop
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a broken safetensors header ({error!r}). Fetch the file again.") from None
    if end != size:
        raise UserError(f"{path} has {size} bytes where its header says {end}. Fetch the file again.")
    return infos


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder, by tensor name.

    As transformers does, takes `model.safetensors` where there is one, else `model.safetensors.index.json`.

    Raises:
        UserError: no such folder, no config.json, no safetensors weights, a broken index, or a shard is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; it must be a folder that save_pretrained() wrote.")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(read_header(single), single)
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} has no weight_map. Fetch it again.")
        if absent := sorted({shard for shard in shards.values() if not (folder / shard).is_file()}):
            raise UserError(f"{folder} lacks {absent[0]} ({len(absent)} of its shards are missing). Fetch them.")
        return {name: folder / shard for name, shard in shards.items()}
    old = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    found = f" only {old[0]}. Convert it once" if old else "; if it has other weights, convert them"
    raise UserError(
        f"{folder} has no model.safetensors{found}: "
        f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')."
    )


CHUNK = 1 << 22  # bytes handled at once

StoredTensor = tuple[Path, TensorInfo]  # a stored tensor: its file, and its dtype, shape and byte range there


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


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
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


def apply_deltas(base: Path, deltas: Sequence[Path], out: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write the model that has the deltas' tensors (the last one's, of several), in their dtypes, and for the rest the
    base's, file by file.

    The base's other files (config, tokenizer) come along; `extra` (name -> text) replaces or adds some. The folder gets
    its name only when it is whole.

    Raises:
        UserError: if a tensor of a delta is not in the base with the same shape.
    """
    changes: dict[str, StoredTensor] = {
        name: (delta, info) for delta in deltas for name, info in read_header(delta).items()
    }
    where = stored_tensors(base)
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
                writer.add(name, read_bytes(place))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def reset_tensors(
    tuned: Sequence[Param], base: Sequence[Param], folders: tuple[Path, Path], names: Iterable[str], join: bool
) -> dict[str, list[StoredTensor]]:
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
    own, theirs = stored_tensors(folders[0]), stored_tensors(folders[1])
    stored, base_stored = ({p.name: p.stored for p in params} for params in (tuned, base))
    pieces: dict[str, list[StoredTensor]] = {}
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


def write_delta_file(pieces: Mapping[str, Sequence[StoredTensor]], out: Path, metadata: Mapping[str, str]) -> None:
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
            writer.add(name, chain.from_iterable(read_bytes(place) for place in places))


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same dtype, shape and bits."""
    (_, info), (_, other_info) = one, other
    if (info.dtype, info.shape) != (other_info.dtype, other_info.shape):
        return False
    return all(a == b for a, b in zip(read_bytes(one), read_bytes(other), strict=True))


def read_bytes(place: StoredTensor) -> Iterator[bytes]:
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
