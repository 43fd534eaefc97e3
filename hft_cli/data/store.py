"""Rows on disk: read once, kept in a cache, and decoded where they are used, so that memory does not grow with a file.

The cache lies beside that of `datasets` (HF_DATASETS_CACHE, or HF_HOME/datasets). It can be deleted at any time.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import date
from operator import eq
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from hft_cli.files import hash_code, read_json, write_json
from hft_cli.paths import expanded, home

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

BATCH = 1000  # rows of a record batch

ROWS, FACTS = "rows.arrow", "facts.json"  # files of a set in the cache; the second is written last


def cache_folder() -> Path:
    """The folder of everything that hft keeps between runs."""
    caches = os.environ.get("XDG_CACHE_HOME") or home() / ".cache"
    own = os.environ.get("HF_HOME") or Path(caches, "huggingface")
    return expanded(os.environ.get("HF_DATASETS_CACHE") or Path(own, "datasets")) / "hft"


def key_of(*facts: Any) -> str:
    """A name in the cache: 32 hex digits that depend on the facts and on the code that reads and tokenizes rows."""
    text = json.dumps([hash_code(Path(__file__).parent), *facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def files_key(path: Path) -> list[list[Any]]:
    """What shows that a file, or the files of a folder and of those in it, have changed: names, sizes and times."""
    files = (
        [path] if path.is_file() else sorted(file for file in (*path.glob("*"), *path.glob("*/*")) if file.is_file())
    )
    states = ((str(file), file.stat()) for file in files)
    # The time of a file's change can be set back, as `cp -p` and `rsync -t` do, that of its inode cannot.
    return [[name, state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states]


def source_key(path: str, *facts: Any) -> str:
    """`key_of` the rows at a path and of what else they depend on. Those of the hub are read anew each day."""
    local = expanded(path)
    return key_of(path, [str(local.resolve()), files_key(local)] if local.exists() else str(date.today()), *facts)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder in the cache, made if it is not there. A folder that is being made is not seen by other processes.

    If the cache cannot be written, a temporary one takes its place in this process and in those that it starts.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        within = folder.relative_to(cache_folder())
        folder = _temporary_cache(error) / within
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        make(new)
        new.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _temporary_cache(error: OSError) -> Path:
    """A cache of this command alone, because the user's cannot be written: a home may be read-only on a cluster."""
    folder = tempfile.mkdtemp(prefix="hft-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        f"The cache {cache_folder()} cannot be written ({error.strerror}): rows and tokens are made anew in {folder}, "
        "which is removed at the end. Set HF_DATASETS_CACHE to a folder that can be written."
    )
    os.environ["HF_DATASETS_CACHE"] = folder
    return cache_folder()


@dataclass(frozen=True)
class Codec(Generic[Item]):
    """How a kind of row is written: as a line of text, and as bytes that are equal for equal rows."""

    encode: Callable[[Item], str]
    decode: Callable[[str], Item]
    canonical: Callable[[Item], bytes]

    def sha256(self, rows: Iterable[Item]) -> str:
        """SHA-256 (hex) of the rows in their order. The same data give the same hash, from whatever file."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(self.canonical(row))
        return digest.hexdigest()


class Rows(Sequence[Item]):
    """Rows in files of the cache, as a sequence that decodes what is asked for.

    Args:
        folders: of sets in the cache; see `store`.
        codec: of the rows.
        numbers: which rows, in which order: the number of the folder times 2^40 plus the number of the row in it. None
            for all rows of the folders, one after the other.
    """

    def __init__(self, folders: Sequence[Path], codec: Codec[Item], numbers: Sequence[int] | None = None) -> None:
        self.folders, self.codec = tuple(folders), codec
        self.facts: list[dict[str, Any]] = [read_json(folder / FACTS) for folder in self.folders]
        self.known_hash = str(self.facts[0]["sha256"]) if numbers is None and len(self.folders) == 1 else None
        if numbers is None:
            numbers = [(number << 40) + row for number, facts in enumerate(self.facts) for row in range(facts["rows"])]
        self.numbers = array("Q", numbers)
        self._files: dict[int, Any] = {}

    @classmethod
    def joined(cls, parts: Sequence[Rows[Item]]) -> Rows[Item]:
        """The rows of several sequences, one after the other."""
        if len(parts) == 1:
            return parts[0]
        folders: list[Path] = []
        places = array("Q")
        for part in parts:
            places.extend(place + (len(folders) << 40) for place in part.numbers)
            folders += part.folders
        return cls(folders, parts[0].codec, places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.codec.decode(line) for line in self._cells("row", self.numbers[index])]
        return self.codec.decode(next(self._cells("row", [self.numbers[index]])))

    def __iter__(self) -> Iterator[Item]:
        return map(self.codec.decode, self._cells("row", self.numbers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: Iterable[int]) -> Rows[Item]:
        """Some of these rows, by their indices."""
        part = copy(self)  # which shares the open files
        part.numbers, part.known_hash = array("Q", [self.numbers[index] for index in indices]), None
        return part

    def places(self) -> Iterator[str]:
        """Where each row stands: "FILE, line 3"."""
        return self._cells("place", self.numbers)

    def digests(self) -> Iterator[bytes]:
        """SHA-256 of the canonical bytes of each row."""
        return self._cells("digest", self.numbers)

    def sha256(self) -> str:
        """`Codec.sha256` of these rows."""
        if self.known_hash is None:
            self.known_hash = self.codec.sha256(self)
        return self.known_hash

    def _cells(self, column: str, places: Sequence[int]) -> Iterator[Any]:
        """The values of a column; a batch of the file is read once for the rows in it that follow each other."""
        last, values = None, None
        for place in places:
            number, row = place >> 40, place & ((1 << 40) - 1)
            if (number, row // BATCH) != last:
                last = number, row // BATCH
                values = self._file(number).get_batch(row // BATCH).column(column)
            yield values[row % BATCH].as_py()  # type: ignore[index]

    def _file(self, number: int) -> Any:
        if number not in self._files:
            import pyarrow

            self._files[number] = pyarrow.ipc.open_file(pyarrow.memory_map(str(self.folders[number] / ROWS)))
        return self._files[number]


def store(
    folder: Path, rows: Iterable[tuple[str, Item]], codec: Codec[Item], facts: Callable[[], dict[str, Any]]
) -> Rows[Item]:
    """The rows in a folder of the cache, written there if they are not yet.

    Args:
        folder: in `cache_folder()`, named by `key_of` of everything that the rows depend on.
        rows: each with its place. It is not read if the folder exists.
        codec: of the rows.
        facts: called after the last row: what else is to be known of them, as JSON.
    """

    def write(new: Path) -> None:
        import pyarrow

        schema = pyarrow.schema({"row": pyarrow.string(), "place": pyarrow.string(), "digest": pyarrow.binary()})
        whole, count = hashlib.sha256(), 0
        with pyarrow.ipc.new_file(str(new / ROWS), schema) as writer:
            columns: list[list[Any]] = [[], [], []]
            for place, row in rows:
                canonical = codec.canonical(row)
                whole.update(canonical)
                for column, value in zip(
                    columns, (codec.encode(row), place, hashlib.sha256(canonical).digest()), strict=True
                ):
                    column.append(value)
                count += 1
                if len(columns[0]) == BATCH:
                    writer.write_batch(pyarrow.record_batch(columns, schema=schema))
                    columns = [[], [], []]
            if columns[0]:
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        write_json(new / FACTS, {"rows": count, "sha256": whole.hexdigest(), **facts()})

    return Rows([made(folder, write)], codec)
