"""Rows of any supported shape -> chats.

To add a shape, write one function and add one row to READERS at the foot of this file. Every mistake in the data is a
UserError that names the file, the line or row, and the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.config.schema import DataConfig
from hft_cli.data.files import json_type, read_rows
from hft_cli.errors import UserError, choose
from hft_cli.paths import resolve_path

Chat = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]

Row = dict[str, Any]

_MESSAGE_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_MESSAGE_ROLES}


@dataclass(frozen=True)
class Source:
    """Training rows of one path.

    Attributes:
        path: a file, a folder or a hub name; see `read_chats`.
        share: the share of the rows to use, in (0, 1], drawn under the run's seed.
        rows: the number of rows to use, which takes precedence over `share`.
        general: whether it is a general set instead of a task's: data.format and data.max_rows do not apply to it.
        split: the split of a folder or a hub data set.
    """

    path: str
    share: float = 1.0
    rows: int | None = None
    general: bool = False
    split: str = "train"


def read_sources(sources: Iterable[Source], data: DataConfig, seed: int) -> list[Chat]:
    """The training rows of a phase, source by source, each in the order of its file."""
    chats: list[Chat] = []
    for source in sources:
        if source.general:
            chats += read_chats(resolve_path(source.path))
            continue
        rows = read_chats(resolve_path(source.path), format=data.format, split=source.split, max_rows=data.max_rows)
        count = round(source.share * len(rows)) if source.rows is None else source.rows
        chats += [rows[index] for index in draw_rows(len(rows), max(count, 1), f"{seed}\0{source.path}")]
    return chats


def draw_rows(rows: int, count: int, key: str) -> list[int]:
    """Draw `count` of the indices 0 to `rows` - 1 uniformly, in ascending order; all if there are fewer.

    As in `method.selection`, the indices are sorted by a hash, so that the draw depends on `key` alone.
    """

    def order(index: int) -> bytes:
        return hashlib.blake2b(f"{key}\0{index}".encode(), digest_size=16).digest()

    return sorted(sorted(range(rows), key=order)[:count]) if count < rows else list(range(rows))


def read_chats(path: str, *, format: str = "auto", split: str = "train", max_rows: int | None = None) -> list[Chat]:
    """Read rows as chats.

    Args:
        path: a .json file (a list of objects, or an object with one list in it), a .jsonl or .parquet file, the first
            two also gzipped; a folder of such files; or the name of a hub data set.
        format: the shape of the rows, a key of READERS, or "auto": that of the first row, which all rows must have.
        split: which files of a folder (train.jsonl, train-00000-of-00002.parquet, …) or which split of a hub data set.
            A folder whose file names have no split is read whole as "train". A single file is read whatever its name.
        max_rows: the largest number of rows to read, at least 1; None reads all.

    Raises:
        UserError: if there is nothing at `path`, there are no rows, or a row is bad. Rows and lines count from 1.
    """
    choose("data.format", format, ("auto", *READERS))
    chats: list[Chat] = []
    for place, row in read_rows(path, split, max_rows):
        try:
            if format == "auto":
                format = _shape_of(row)
            keys, read = READERS[format]
            if missing := [key for key in keys if key not in row]:
                raise UserError(f"no '{missing[0]}', which the shape '{format}' needs (keys found: {', '.join(row)}).")
            chats.append(check_chat(read(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not chats:
        raise UserError(f"No rows in {path}.")
    return chats


def _shape_of(row: Row) -> str:
    for name, (keys, _) in READERS.items():
        if all(key in row for key in keys):
            return name
    known = ", ".join(f"{name} ({' + '.join(keys)})" for name, (keys, _) in READERS.items())
    raise UserError(f"unknown shape (keys found: {', '.join(row) or 'none'}). Known: {known}.")


def check_chat(chat: Chat) -> Chat:
    """Return the chat; UserError unless a model can learn from it: it ends with an answer, and no answer is empty."""
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


def content_hash(chats: Iterable[Chat]) -> str:
    """SHA-256 (hex) of the chats in their order. The same data give the same hash, from whatever file."""
    digest = hashlib.sha256()
    for chat in chats:
        digest.update(_canonical(chat))
    return digest.hexdigest()


def count_repeats(train: Sequence[Chat], test: Sequence[Chat]) -> tuple[int, int]:
    """The number of rows of `train` that repeat an earlier row exactly, and of those that `test` contains as well."""
    train_hashes, test_hashes = ([hashlib.sha256(_canonical(chat)).digest() for chat in set_] for set_ in (train, test))
    in_test = set(test_hashes)
    return len(train_hashes) - len(set(train_hashes)), sum(row in in_test for row in train_hashes)


def _canonical(chat: Chat) -> bytes:
    """Roles and texts as one line of JSON: equal for equal chats."""
    return json.dumps([(turn["role"], turn["content"]) for turn in chat]).encode() + b"\n"


def turns_or_text(value: Any, column: str, role: str) -> Chat:
    """A list of turns as a chat, or a string as one turn of `role`; UserError naming the column otherwise."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, column, ("role", "content"), _MESSAGE_ROLES)


def _turns(value: Any, column: str, keys: tuple[str, str], roles: dict[str, str]) -> Chat:
    """A list of turns as a chat. `keys` are those of role and text; `roles` maps the roles to ours."""
    if not isinstance(value, list) or not value:
        raise UserError(f"'{column}' is {'empty' if value == [] else json_type(value)}, not a list of turns.")
    chat = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise UserError(f"turn {number} of '{column}' is {json_type(turn)}, not an object.")
        for key in keys:
            if key not in turn:
                raise UserError(f"turn {number} of '{column}' has no '{key}' (keys found: {', '.join(turn)}).")
        role, text = (turn[key] for key in keys)
        name = roles[choose(f"role in turn {number} of '{column}':", role, roles)]
        chat.append({"role": name, "content": _text(text, f"'{keys[1]}' in turn {number} of '{column}'")})
    return chat


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {json_type(value)}, not a string.")
    return value


def _question_and_answer(question: str, answer: str) -> Chat:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(row: Row) -> Chat:
    return _turns(row["messages"], "messages", ("role", "content"), _MESSAGE_ROLES)


def _prompt_completion(row: Row) -> Chat:
    prompt = turns_or_text(row["prompt"], "prompt", "user")
    return prompt + turns_or_text(row["completion"], "completion", "assistant")


def _alpaca(row: Row) -> Chat:
    question = _text(row["instruction"], "'instruction'")
    context = _text(row.get("input") or "", "'input'")
    question = f"{question}\n\n{context}" if context.strip() else question
    return _question_and_answer(question, _text(row["output"], "'output'"))


def _sharegpt(row: Row) -> Chat:
    return _turns(row["conversations"], "conversations", ("from", "value"), _SHAREGPT_ROLES)


def _trace(row: Row) -> Chat:
    answer = row["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):  # arithmetic tasks may have numbers
        answer = str(answer)
    return _question_and_answer(_text(row["prompt"], "'prompt'"), _text(answer, "'answer'"))


# data.format -> (the keys that identify the shape, its reader). The first entry whose keys a row has is its shape.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Row], Chat]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "trace": (("prompt", "answer"), _trace),
}
