"""Rows of JSON, JSONL and Parquet files, of folders and of hub data sets, each with its place for error messages.

The standard library is enough, except for Parquet files (pyarrow) and hub names (datasets).
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError, first_line

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

PARQUET_BATCH = 1000  # rows read at a time

_SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev|eval)[-_.]")


def read_rows(path: str, split: str, max_rows: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows at a path (see `rows.read_chats`), each with its place for errors: "FILE, line 3".

    At most `max_rows` rows are read; None reads all. With a limit, a hub data set is loaded row by row instead of being
    downloaded first. A UserError if the path does not exist, a file cannot be read, or a row is not an object.
    """
    for place, row in islice(_values(path, split, stream=max_rows is not None), max_rows):
        if not isinstance(row, dict):
            raise UserError(f"{place}: not an object but {json_type(row)}.")
        yield place, row


def _values(path: str, split: str, stream: bool) -> Iterator[tuple[str, Any]]:
    local = Path(path).expanduser()
    if local.is_dir():
        for file in _files_of_split(local, split):
            yield from _rows_of_file(file)
    elif local.is_file():
        yield from _rows_of_file(local)
    elif path.endswith(SUFFIXES) or path.startswith((".", "/", "~")):
        raise UserError(f"No such file or folder: '{path}'.")
    else:
        yield from _rows_of_hub(path, split, stream)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the order of their names; all files as "train" if no name has a split."""
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    matching = [file for file in files if re.match(rf"{re.escape(split)}(-\d.*)?\.", file.name)]
    if not matching and split == "train" and not any(_SPLIT_NAME.search(file.name) for file in files):
        matching = files
    if not matching:
        names = ", ".join(file.name for file in files) or f"no file ending in {', '.join(SUFFIXES)}"
        raise UserError(f"No file for the split '{split}' in the folder {folder} (it holds {names}).")
    formats = {next(suffix for suffix in SUFFIXES if file.name.endswith(suffix)) for file in matching}
    if len(formats) > 1:  # probably the same rows twice
        names = ", ".join(file.name for file in matching)
        raise UserError(f"More than one format for the split '{split}' in {folder}: {names}. Name one file instead.")
    return matching


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} has an unknown format. Known: {', '.join(SUFFIXES)}.")
        if file.name.endswith(".parquet"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH)
            rows: Iterable[Any] = (row for batch in batches for row in batch.to_pylist())
        else:
            with (gzip.open if file.name.endswith(".gz") else open)(file, "rt", encoding="utf-8-sig") as text:
                if file.name.removesuffix(".gz").endswith(".jsonl"):
                    yield from _rows_of_lines(text, file)
                    return
                rows = _list_in(_parse(text.read(), str(file)), file)
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: not UTF-8, or not Parquet
        raise UserError(f"{file} cannot be read: {error}") from error


def _rows_of_lines(lines: Iterable[str], file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _parse(line, place)


def _list_in(document: Any, file: Path) -> list[Any]:
    """The rows of a document that is a list, or an object with exactly one list."""
    if isinstance(document, list):
        return document
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) != 1:
        raise UserError(
            f"{file}: neither a list of objects nor an object with one list in it, but {json_type(document)}."
        )
    return lists[0]


def _rows_of_hub(name: str, split: str, stream: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=stream)
    except Exception as error:  # the exceptions of the hub and its cache have no common base
        raise UserError(
            f"'{name}' is no local file or folder, and its split '{split}' could not be loaded from the hub: "
            f"{first_line(error)}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} ({split}), row {number}", row


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        position = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {position}).{hint}") from None


def json_type(value: Any) -> str:
    """The JSON type of a parsed value, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
