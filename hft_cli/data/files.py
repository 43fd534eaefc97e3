"""Rows of JSON, JSONL, CSV, Parquet and Arrow files, of folders and of hub data sets, each with its place for errors.

The standard library is enough, except for Parquet and Arrow files (pyarrow) and hub names (datasets).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hft_cli.data.bad_rows import BadRows
from hft_cli.errors import UserError, first_line
from hft_cli.files import read_json
from hft_cli.paths import expanded
from hft_cli.text import plural

LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}  # of text; the delimiter of a table

TEXTS, COMPRESSED = (".json", *LINES, *TABLES), (".gz", ".bz2", ".xz", ".zst")

SUFFIXES = (*TEXTS, *(text + how for text in TEXTS for how in COMPRESSED), ".parquet", ".arrow")

# Files of folders that save_to_disk of datasets wrote.
SAVED, SAVED_TOO, SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"

LONGEST_CELL = 2**31 - 1  # characters: the csv module's own limit is 131,072

PARQUET_BATCH = 1000  # rows read at a time

_SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev|eval)\d*[-_.]", re.IGNORECASE)

# Files of rows that are compressed in another way.
_UNKNOWN = re.compile(r"\.(jsonl?|ndjson|[ct]sv|parquet|arrow)\.(7z|br|lz4|lzma|lzo|rar|snappy|sz|tar|tgz|z|zip|zstd)$")


@dataclass(frozen=True)
class Hub:
    """What else a hub data set is known by: its subset ("configuration"), and a commit, branch or tag."""

    subset: str | None = None
    revision: str | None = None


ANY_HUB = Hub()


def read_rows(
    path: str, split: str, max_rows: int | None = None, bad: BadRows | None = None, hub: Hub = ANY_HUB
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows at a path (see `rows.read_chats`), each with its place for errors: "FILE, line 3".

    At most `max_rows` rows are read; None reads all. With a limit, a hub data set is loaded row by row instead of being
    downloaded first. A UserError if the path does not exist, a file cannot be read, or a row is not an object; with
    `bad`, bad lines and rows are added to it instead and left out.
    """
    for place, row in islice(_values(path, split, hub, stream=max_rows is not None), max_rows):
        if isinstance(row, dict):
            yield place, row
            continue
        error = row if isinstance(row, UserError) else UserError(f"{place}: not an object but {json_type(row)}.")
        if bad is None:
            raise error
        bad.add(place, error)


def _values(path: str, split: str, hub: Hub, stream: bool) -> Iterator[tuple[str, Any]]:
    local = expanded(path)
    if local.exists() and hub != ANY_HUB:
        key, value = ("subset", hub.subset) if hub.subset is not None else ("revision", hub.revision)
        raise UserError(f"{path} is not on the hub, so it has no {key} '{value}': leave out data.{key}.")
    if (local / SAVED_SPLITS).is_file() or all((local / name).is_file() for name in (SAVED, SAVED_TOO)):
        yield from _rows_of_saved(local, split)
    elif local.is_dir():
        for file in _files_of_split(local, split):
            yield from _rows_of_file(file)
    elif local.is_file():
        yield from _rows_of_file(local)
    elif path.endswith(SUFFIXES) or path.startswith((".", "/", "~")):
        raise UserError(f"No such file or folder: '{path}'.")
    else:
        yield from _rows_of_hub(path, split, hub, stream)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the order of their names; all files as "train" if no name has a split."""
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIXES) and file.is_file())
    if unknown := sorted(file.name for file in folder.iterdir() if _UNKNOWN.search(file.name.lower())):
        raise UserError(
            f"{folder} holds {unknown[0]}, whose compression is not known. Known: {', '.join(COMPRESSED)}. Convert it, "
            "or move it out of the folder."
        )
    name = re.escape(split)
    patterns = re.compile(rf"{name}(-\d.*)?\."), re.compile(rf"{name}[-_]?\d*\.", re.IGNORECASE)
    matching = next(filter(None, ([file for file in files if each.match(file.name)] for each in patterns)), [])
    if not matching and split == "train" and not any(_SPLIT_NAME.search(file.name) for file in files):
        matching = files
    if not matching:
        names = ", ".join(file.name for file in files) or f"no file ending in {', '.join(SUFFIXES)}"
        below = sorted({file.parent.name for file in folder.glob("*/*") if file.name.lower().endswith(SUFFIXES)})
        hint = f" Give one of the folders in it that have some: {', '.join(below)}." if below and not files else ""
        raise UserError(f"No file for the split '{split}' in the folder {folder} (it holds {names}).{hint}")
    like = [file.name for file in files if file.name.lower().startswith(split.lower()) and file not in matching]
    if like:
        raise UserError(
            f"{folder} holds {', '.join(like)} beside {', '.join(file.name for file in matching)}, and it is not clear "
            f"whether the split '{split}' includes it. Name the files as parts ({split}-00000.jsonl, …), move it, or "
            "give one file instead of the folder."
        )
    formats = {next(suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)) for file in matching}
    if len(formats) > 1:  # probably the same rows twice
        names = ", ".join(file.name for file in matching)
        raise UserError(f"More than one format for the split '{split}' in {folder}: {names}. Name one file instead.")
    return matching


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        name = file.name.lower()
        if not name.endswith(SUFFIXES):
            raise UserError(f"{file} has an unknown format. Known: {', '.join(SUFFIXES)}.")
        if name.endswith((".parquet", ".arrow")):
            batches = _batches_of_arrow(file) if name.endswith(".arrow") else _batches_of_parquet(file)
            rows: Iterable[Any] = (_from_table(row) for batch in batches for row in batch.to_pylist())
        else:
            name = name.removesuffix(how := next((how for how in COMPRESSED if name.endswith(how)), ""))
            with _opened(file, how) as text:
                if name.endswith(LINES):
                    yield from _rows_of_lines(text, file)
                    return
                if name.endswith(tuple(TABLES)):
                    yield from _rows_of_csv(text, file, TABLES[name[-4:]])
                    return
                rows = _list_in(_parse(text.read(), str(file)), file)
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, MemoryError, ValueError) as error:  # or not UTF-8
        raise UserError(f"{file} cannot be read: {error}") from error


def _opened(file: Path, compression: str) -> TextIO:
    """A text file that may be compressed."""
    return io.TextIOWrapper(OPENERS[compression](file), encoding="utf-8-sig", newline="")


def _open_zstd(file: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(str(file), "zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"), ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd,
}  # fmt: skip


def _rows_of_lines(lines: Iterable[str], file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = _parse(line, place)
            except UserError as error:
                row = error
            yield place, row


def _rows_of_csv(text: Iterable[str], file: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table with a header; all values are texts."""
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(lines, [])
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{file}: the column '{twice[0]}' comes twice. Rename one.")
    for number, values in enumerate((line for line in lines if line), 1):
        place = f"{file}, row {number}"
        if len(values) == len(header):
            yield place, dict(zip(header, values, strict=True))
        else:
            yield place, UserError(f"{place}: {plural(len(values), 'value')} in {plural(len(header), 'column')}.")


def _rows_of_saved(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a folder that `save_to_disk` wrote: of one set, or of a split of several."""
    if (folder / SAVED_SPLITS).is_file():
        splits = read_json(folder / SAVED_SPLITS).get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise UserError(f"No split '{split}' in {folder} (it holds {splits}). Set data.split.")
        folder /= split
    try:
        files = [folder / Path(entry["filename"]).name for entry in read_json(folder / SAVED)["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder / SAVED} is not as save_to_disk writes it: it names no files.") from None
    for file in files:
        yield from _rows_of_file(file)


def _batches_of_parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH)


def _batches_of_arrow(file: Path) -> Iterator[Any]:
    """The record batches of an Arrow file, as a stream or with an index; ValueError for a broken one.

    The file is not mapped into memory: a process that reads beyond the end of a truncated file would be killed.
    """
    import pyarrow

    with pyarrow.OSFile(str(file)) as source:
        try:
            stream = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            indexed = pyarrow.ipc.open_file(source)
            stream = map(indexed.get_batch, range(indexed.num_record_batches))
        for batch in stream:
            batch.validate(full=True)
            yield batch


def _list_in(document: Any, file: Path) -> list[Any]:
    """The rows of a document that is a list, or an object with exactly one list; an object that is a row is one row."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict) and _is_row(document):
        return [document]
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) != 1:
        raise UserError(
            f"{file}: neither a list of objects nor an object with one list in it, but {json_type(document)}."
        )
    return lists[0]


def _is_row(document: dict[str, Any]) -> bool:
    """Whether an object has the columns of a row, and not rows in one of them."""
    for column in ("messages", "conversations"):
        turns = document.get(column)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) and len(turn) > 1 for turn in turns):
            return any(key in turns[0] for key in ("role", "from"))
    columns = (("prompt", "completion"), ("instruction", "output"), ("chosen", "rejected"), ("prompt", "answer"))
    return any(all(key in document for key in keys) for keys in (*columns, ("question", "response")))


def _from_table(row: Any) -> Any:
    """A row of a table, without the null fields of the objects in its columns."""
    return {column: without_nulls(value, _KEPT) for column, value in row.items()} if isinstance(row, dict) else row


def without_nulls(value: Any, kept: Sequence[str] = ()) -> Any:
    """The value without null fields of objects, but those that are to be kept.

    A table fills every field that another row has with null, and so do JSON files that were written from one.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item, kept) for key, item in value.items() if item is not None or key in kept}
    return [without_nulls(item, kept) for item in value] if isinstance(value, list) else value


_KEPT = ("content", "value")  # of turns: null is a mistake there, or stands beside calls of tools


def _rows_of_hub(name: str, split: str, hub: Hub, stream: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, hub.subset, split=split, streaming=stream, revision=hub.revision)
    except Exception as error:  # the exceptions of the hub and its cache have no common base
        raise UserError(
            f"'{name}' is no local file or folder, and its split '{split}' could not be loaded from the hub: "
            f"{first_line(error)}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} ({split}), row {number}", _from_table(row)


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError if it is none.

    Raises:
        BadValueError: for NaN, Infinity or a key that comes twice, which Python would take.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _parse(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except BadValueError as error:
        raise UserError(f"{place}: {error}") from None
    except RecursionError:
        raise UserError(f"{place}: lists and objects are nested too deeply.") from None
    except json.JSONDecodeError as error:
        hint = " One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        position = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {position}).{hint}") from None


class BadValueError(Exception):
    """A value that JSON does not have, or that hides another one."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of keys and values; an error if a key comes twice, of which Python would keep the last value."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadValueError(f"the key '{twice}' comes twice in an object.")
    return values


def _refuse_constant(text: str) -> Any:
    raise BadValueError(f"{text} is not JSON. Write null, or leave the field out.")


def json_type(value: Any) -> str:
    """The JSON type of a parsed value, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
