"""Rows of any shape, read and checked: JSON, JSONL, Parquet, a folder or a hub name -> chats."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hft_cli.config.schema import DataConfig
from hft_cli.errors import UserError, choose
from hft_cli.paths import resolve_path


@dataclass(frozen=True)
class Source:
    """Rows at `path`: all of them, a share in (0, 1], or a number of them, drawn under the run's seed.

    A `general` set is no task's: data.format and data.max_rows do not hold for it.
    """

    path: str
    share: float = 1.0
    rows: int | None = None
    general: bool = False
    split: str = "train"


def read_sources(sources: Iterable[Source], data: DataConfig, seed: int) -> list[Chat]:
    """The rows that a step trains on, source by source, each in the order of its file.

    Raises:
        UserError: for a bad row, with file, line and reason.
    """
    chats: list[Chat] = []
    for source in sources:
        if source.general:
            chats += read_chats(resolve_path(source.path))
            continue
        own = read_chats(resolve_path(source.path), format=data.format, split=source.split, max_rows=data.max_rows)
        count = round(source.share * len(own)) if source.rows is None else source.rows
        chats += [own[index] for index in rows_of_source(len(own), max(count, 1), f"{seed}\0{source.path}")]
    return chats


def rows_of_source(rows: int, count: int, key: str) -> list[int]:
    """`count` of the indices below `rows` (all, if there are fewer), drawn uniformly under `key`, in order.

    As in selection: the first of an order by hash, so that it hangs on no state and is the same everywhere.
    """

    def order(index: int) -> bytes:
        return hashlib.blake2b(f"{key}\0{index}".encode(), digest_size=16).digest()

    return sorted(sorted(range(rows), key=order)[:count]) if count < rows else list(range(rows))


Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

BATCH = 1000  # rows tokenised at once: enough for the tokenizer's threads, little enough to hold with offsets

_SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev|eval)[-_.]")

_TURN_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_TURN_ROLES}


def read_chats(path: str, *, format: str = "auto", split: str = "train", max_rows: int | None = None) -> list[Chat]:
    """Read rows of one of the `SHAPES` as chats.

    Args:
        path: a .json (a list of objects, or an object with one list in it), .jsonl or .parquet file, the first two
            also gzipped; a folder of such files; or the name of a data set on the hub.
        format: one of `SHAPES`, or "auto": the shape of the first row, which every row must then have.
        split: which files of a folder (train.jsonl, train-00000-of-00002.parquet, …) or which split of a hub data set.
            A folder whose files carry no split names is read whole as "train". A single file is read whatever its name.
        max_rows: read no more than this many rows (at least 1); None reads all.

    Raises:
        UserError: nothing at `path`, no rows, or a bad row. Rows and lines are counted from 1.
    """
    choose("data.format", format, ("auto", *SHAPES))
    shape = format
    chats: list[Chat] = []
    for place, row in islice(read_rows(path, split, stream=max_rows is not None), max_rows):
        try:
            if not isinstance(row, dict):
                raise UserError(f"not an object but {json_type(row)}.")
            if shape == "auto":
                shape = _shape_of(row)
            keys, read = READERS[shape]
            if missing := [key for key in keys if key not in row]:
                raise UserError(f"no '{missing[0]}', which the shape '{shape}' needs (keys found: {', '.join(row)}).")
            chats.append(check_chat(read(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not chats:
        raise UserError(f"No rows in {path}.")
    return chats


def content_hash(chats: Iterable[Chat]) -> str:
    """The sha256 (hex) of the examples in their order: the same data give the same hash, from whatever file."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(_line(chat))
    return digest.hexdigest()


def count_repeats(train: Sequence[Chat], test: Sequence[Chat]) -> tuple[int, int]:
    """How many rows of `train` repeat an earlier one exactly, and how many are in `test` as well."""
    own, tested = ([hashlib.sha256(_line(chat)).digest() for chat in chats] for chats in (train, test))
    others = set(tested)
    return len(own) - len(set(own)), sum(row in others for row in own)


def _line(chat: Chat) -> bytes:
    """The turns as a line: two chats have the same one if roles and texts are the same."""
    return json.dumps([(turn["role"], turn["content"]) for turn in chat]).encode() + b"\n"


def read_rows(path: str, split: str, *, stream: bool) -> Iterator[tuple[str, Any]]:
    """(place, row) for each row at `path` (see `read_chats`); an error message begins with the place."""
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
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file())
    found = [file for file in files if re.match(rf"{re.escape(split)}(-\d.*)?\.", file.name)]
    if not found and split == "train" and not any(_SPLIT_NAME.search(file.name) for file in files):
        found = files
    if not found:
        names = ", ".join(file.name for file in files) or f"no file ending in {', '.join(SUFFIXES)}"
        raise UserError(f"No file for the split '{split}' in the folder {folder} (it holds {names}).")
    if len({next(s for s in SUFFIXES if file.name.endswith(s)) for file in found}) > 1:  # likely the same rows twice
        names = ", ".join(file.name for file in found)
        raise UserError(f"More than one format for the split '{split}' in {folder}: {names}. Name one file instead.")
    return found


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        if file.name.endswith(".parquet"):
            import pyarrow.parquet

            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH)
            rows: Iterable[Any] = (row for batch in batches for row in batch.to_pylist())
        elif not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}.")
        else:
            opened = gzip.open if file.name.endswith(".gz") else open
            with opened(file, "rt", encoding="utf-8-sig") as text:
                if file.name.removesuffix(".gz").endswith(".jsonl"):
                    for number, line in enumerate(text, 1):
                        if line.strip():
                            place = f"{file}, line {number}"
                            yield place, _parsed(line, place)
                    return
                rows = _list_in(_parsed(text.read(), str(file)), file)
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", row
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: not UTF-8, or not parquet
        raise UserError(f"{file} cannot be read: {error}") from error


def _rows_of_hub(name: str, split: str, stream: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=stream)
    except Exception as error:  # what the hub and its cache raise has no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{name}' is no file or folder here, and its split '{split}' could not be loaded from the hub: {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} ({split}), row {number}", row


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " One object a line? Then name the file .jsonl." if error.msg == "Extra data" else ""
        at = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{place}: not JSON ({error.msg} at {at}).{hint}") from None


def _list_in(document: Any, file: Path) -> list[Any]:
    if isinstance(document, list):
        return document
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) != 1:
        raise UserError(
            f"{file}: neither a list of objects nor an object with one list in it, but {json_type(document)}."
        )
    return lists[0]


def _shape_of(row: Row) -> str:
    for shape, (keys, _) in READERS.items():
        if all(key in row for key in keys):
            return shape
    known = ", ".join(f"{shape} ({' + '.join(keys)})" for shape, (keys, _) in READERS.items())
    raise UserError(f"unknown shape (keys found: {', '.join(row) or 'none'}). Known: {known}.")


def check_chat(chat: Chat) -> Chat:
    """The chat itself; UserError unless it can be learnt from: it ends with an answer, and no answer is empty."""
    for number, turn in enumerate(chat, 1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UserError(f"turn {number}: the assistant's answer is empty.")
        if not turn["content"].isascii():
            try:
                turn["content"].encode()
            except UnicodeEncodeError as error:
                raise UserError(f"turn {number}: half a surrogate pair at character {error.start}.") from None
    roles = [turn["role"] for turn in chat]
    if "assistant" not in roles:
        raise UserError("no assistant turn, so nothing to learn.")
    if roles[-1] != "assistant":
        raise UserError(f"the last turn is the {roles[-1]}'s, not the assistant's.")
    if roles[0] == "assistant":
        raise UserError("the first turn is the assistant's: there is nothing for it to answer.")
    return chat


def json_type(value: Any) -> str:
    """What a parsed JSON value is, as an error message says it."""
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def text_of(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {json_type(value)}, not a string.")
    return value


def _turns(value: Any, column: str, role: str, content: str, roles: dict[str, str]) -> Chat:
    if not isinstance(value, list) or not value:
        raise UserError(f"'{column}' is {'empty' if value == [] else json_type(value)}, not a list of turns.")
    chat = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} of '{column}' is {json_type(turn)}, not an object.")
        for key in (role, content):
            if key not in turn:
                raise UserError(f"turn {number} of '{column}' has no '{key}' (keys found: {', '.join(turn)}).")
        name = roles[choose(f"role in turn {number} of '{column}':", turn[role], roles)]
        chat.append({"role": name, "content": text_of(turn[content], f"'{content}' in turn {number} of '{column}'")})
    return chat


def turns_or_text(value: Any, column: str, role: str) -> Chat:
    """A list of turns as a chat, or a string as one turn of `role`; UserError naming the column otherwise."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, column, "role", "content", _TURN_ROLES)


def _messages(row: Row) -> Chat:
    return _turns(row["messages"], "messages", "role", "content", _TURN_ROLES)


def _prompt_completion(row: Row) -> Chat:
    prompt = turns_or_text(row["prompt"], "prompt", "user")
    return prompt + turns_or_text(row["completion"], "completion", "assistant")


def _alpaca(row: Row) -> Chat:
    question = text_of(row["instruction"], "'instruction'")
    extra = text_of(row.get("input") or "", "'input'")
    return _pair(f"{question}\n\n{extra}" if extra.strip() else question, text_of(row["output"], "'output'"))


def _sharegpt(row: Row) -> Chat:
    return _turns(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)


def _trace(row: Row) -> Chat:
    answer = row["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):  # as arithmetic tasks may have it
        answer = str(answer)
    return _pair(text_of(row["prompt"], "'prompt'"), text_of(answer, "'answer'"))


def _pair(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# shape: (the keys by which it is known, its reader). The first whose keys a row has is its shape.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Row], Chat]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "trace": (("prompt", "answer"), _trace),
}

SHAPES = tuple(READERS)
