"""Rows of any supported shape -> chats.

To add a shape, write one function and add one row to READERS at the foot of this file. Every mistake in the data is a
UserError that names the file, the line or row, and the reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from hft_cli.data.chats import CHATS, Chat, check_chat
from hft_cli.data.files import ANY_HUB, Hub, json_type, read_rows
from hft_cli.data.store import Rows, cache_folder, key_of, source_key, store
from hft_cli.data.turns import (
    LOSS_KEYS,
    REASONING_KEYS,
    Names,
    Turns,
    read_tools,
    read_turns,
    refuse_media,
    text_turn,
    turns_or_text,
)
from hft_cli.errors import UserError, choose

Row = dict[str, Any]


Item = TypeVar("Item")


def read_chats(
    path: str,
    *,
    format: str = "auto",
    split: str = "train",
    max_rows: int | None = None,
    names: Names | None = None,
    hub: Hub = ANY_HUB,
) -> Rows[Chat]:
    """Read rows as chats, or find them in the cache if they were read before.

    Args:
        path: a file with one of `files.SUFFIXES`, a folder of such files, a folder that save_to_disk of datasets wrote,
            or the name of a hub data set.
        format: the shape of the rows, a key of READERS, or "auto": that of the first row. A row without its keys is
            read in another shape, if it has the keys of one; but not as raw text.
        split: which files of a folder (train.jsonl, train-00000-of-00002.parquet, …) or which split of a hub data set.
            A folder whose file names have no split is read whole as "train". A single file is read whatever its name.
        max_rows: the largest number of rows to read, at least 1; None reads all.
        names: what the data set calls things, and whether bad rows are left out. What is seen in the rows is in their
            `facts`.
        hub: the subset and the revision of a hub data set.

    Raises:
        UserError: if there is nothing at `path`, there are no rows, or a row is bad. Rows and lines count from 1.
    """
    choose("data.format", format, ("auto", *READERS))
    names = names or Names()
    read = ChatReader(format, names)
    key = source_key(path, split, hub, max_rows, format, names.columns, names.roles, names.bad_rows)
    chats = read_each(read_rows(path, split, max_rows, names.bad, hub), read, names, path)
    rows = store(cache_folder() / "rows" / key, chats, CHATS, lambda: {**names.facts(), "shapes": read.shapes})
    if not rows:
        raise UserError(f"No rows in {path}.")
    return rows


def each_answer(rows: Rows[Chat]) -> Rows[Chat]:
    """A row for each answer of the chats in one set of the cache, which ends with it; see `Chat.each_answer`."""

    def parts() -> Iterator[tuple[str, Chat]]:
        for place, chat in zip(rows.places(), rows, strict=True):
            if chat.text is not None:
                yield place, chat
            for index, part in chat.each_answer().items():
                yield f"{place}, turn {index + 1}", part

    (folder,), (facts,) = rows.folders, rows.facts
    kept = {name: value for name, value in facts.items() if name not in ("rows", "sha256")}
    return store(cache_folder() / "rows" / key_of("each answer", folder.name), parts(), CHATS, lambda: kept)


def chat_of_answer(place: str) -> str | None:
    """The place of the chat of which `each_answer` made a row; None for another row."""
    answer = re.search(r", turn \d+$", place)
    return place[: answer.start()] if answer else None


def read_each(
    rows: Iterable[tuple[str, Row]], read: Callable[[Row], Item], names: Names, where: str
) -> Iterator[tuple[str, Item]]:
    """What `read` makes of each row, with its place. Bad rows are added to `names.bad`.

    Raises:
        UserError: after the last row, if bad rows are to stop, or a name of `data.columns` was not found.
    """
    good = 0
    for place, row in rows:
        try:
            item = read(row)
        except UserError as error:
            names.bad.add(place, error)
        else:
            good += 1
            yield place, item
    names.bad.refuse(names.bad_rows, good + len(names.bad.rows), where)
    names.check_columns()


def count_repeats(train: Iterable[bytes], test: Iterable[bytes]) -> tuple[int, int]:
    """The number of rows of `train` that repeat an earlier row exactly, and of those that `test` contains as well.

    Both are the digests of rows; see `Rows.digests`.
    """
    in_test, seen = set(test), set()
    repeated = shared = 0
    for digest in train:
        repeated += digest in seen
        shared += digest in in_test
        seen.add(digest)
    return repeated, shared


class ChatReader:
    """Reads one row after another as chats.

    Args:
        format: as for `read_chats`.
        names: of the data set.
    """

    def __init__(self, format: str, names: Names) -> None:
        self.format, self.names = format, names
        self.detect = format == "auto"
        self.shapes: Counter[str] = Counter()  # rows read in each

    def __call__(self, row: Row) -> Chat:
        """The chat of a row; UserError with the reason if it is bad."""
        fields = self.names.renamed(row)
        row = {key: value for key, value in fields.items() if value is not None}
        if self.format == "auto":
            self.format = _shape_of(row)
        shape = self.format
        if self.detect and not _has_shape(row, shape):
            shape = next((name for name in READERS if name != "text" and _has_shape(row, name)), shape)
        keys, read = READERS[shape]
        if missing := [key for key in keys if key not in row]:
            what = f"'{missing[0]}' is null" if missing[0] in fields else f"no '{missing[0]}'"
            raise UserError(f"{what}, which the shape '{shape}' needs (keys found: {', '.join(row) or 'none'}).")
        refuse_media(row, "the row")
        fields = dict(row)
        chat = check_chat(with_row_fields(read(fields, self.names), fields, self.names))
        self.names.unused.update(key for key, value in fields.items() if value not in ("", [], {}))
        self.shapes[shape] += 1
        return chat


def _has_shape(row: Row, name: str) -> bool:
    return all(key in row for key in READERS[name][0])


def _shape_of(row: Row) -> str:
    for name in READERS:
        if _has_shape(row, name):
            return name
    known = ", ".join(f"{name} ({' + '.join(keys)})" for name, (keys, _) in READERS.items())
    raise UserError(
        f"unknown shape (keys found: {', '.join(row) or 'none'}). Known: {known}. Other names: "
        "'data.columns={prompt: question, …}'."
    )


def with_row_fields(chat: Chat, row: Row, names: Names) -> Chat:
    """The chat with what else its row says: tools, a system turn, variables of the template."""
    for key in LOSS_KEYS:
        if key in row and row.pop(key) not in (1,):
            raise UserError(f"the row has '{key}', and hft has no weights of rows. Take it out of the file.")
    label = str(row.get("label")).lower()  # 0 and 1 are classes
    if chat.text is None and label == "false":
        raise UserError(
            "'label' is false, by which data for KTO mark an answer to avoid, and it would be learnt. Leave such rows "
            "out (data.bad_rows=skip)."
        )
    if chat.text is None and label == "true":
        del row["label"]
    for key in REASONING_KEYS:
        if row.get(key) not in (None, ""):
            raise UserError(f"the row has '{key}': put it into the assistant's turn, as its 'reasoning_content'.")
    tools = [column for column in ("tools", "functions") if row.get(column)]
    if tools:
        chat = replace(chat, tools=read_tools(row.pop(tools[0]), tools[0], names))
    options = row.pop("chat_template_kwargs", None) or {}
    if not isinstance(options, dict):
        raise UserError(f"'chat_template_kwargs' is {json_type(options)}, not an object.")
    system = row.pop("system", row.pop("system_prompt", None)) or ""
    if not isinstance(system, str):
        raise UserError(f"'system' is {json_type(system)}, not a string.")
    if system.strip() and chat.turns:
        chat = _with_system(chat, system)
    aliases = row.pop("aliases", None) or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        raise UserError("'aliases' is no list of texts, which are further right answers.")
    return replace(chat, options=options or chat.options, aliases=tuple(aliases))


def _with_system(chat: Chat, system: str) -> Chat:
    if chat.turns[0]["role"] == "system":
        if chat.turns[0]["content"].strip() == system.strip():
            return chat
        raise UserError("the row has a 'system' and a first turn of the system, which differ.")
    return replace(
        chat,
        turns=({"role": "system", "content": system}, *chat.turns),
        masked=tuple(index + 1 for index in chat.masked),
        prompt_turns=chat.prompt_turns + 1 if chat.prompt_turns else 0,
    )


def text_of(row: Row, column: str, names: Names) -> str:
    """Take a text out of a row. A number, as in tables of arithmetic, is its text; UserError for anything else."""
    value = row.pop(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return names.number_text(value, column)
    if not isinstance(value, str):
        raise UserError(f"'{column}' is {json_type(value)}, not a string.")
    return value


def question_of(row: Row, column: str, names: Names) -> str:
    """Take the question of an instruction out of a row, with the further text that Alpaca gives as `input`."""
    question = text_of(row, column, names)
    context = text_of(row, "input", names) if row.get("input") is not None else ""
    return "\n\n".join(text for text in (question, context) if text.strip()) or question


def history_of(row: Row, names: Names) -> Turns:
    """Take the earlier turns of a dialogue out of a row: pairs of question and answer, or turns."""
    history = row.pop("history", None)
    if not history:
        return Turns()
    if isinstance(history, list) and all(isinstance(pair, list | tuple) for pair in history):
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history):
            raise UserError("'history' is not a list of pairs of question and answer.")
        roles = ("user", "assistant")
        return Turns([{"role": roles[index], "content": pair[index]} for pair in history for index in (0, 1)])
    return read_turns(history, "history", names)


def continued(prompt: Turns, answer: Turns) -> tuple[Turns, int]:
    """Prompt and completion as one chat, and the characters of the first answer that the prompt gives beforehand."""
    if not (prompt.turns and prompt.turns[-1]["role"] == answer.turns[0]["role"] == "assistant"):
        return prompt + answer, 0
    start, rest = prompt.turns[-1], answer.turns[0]
    if set(start) != {"role", "content"} or 0 in answer.masked:
        raise UserError("the prompt ends with an assistant's turn that the completion cannot continue.")
    joined = {**rest, "content": start["content"] + rest["content"]}
    prompt = Turns(prompt.turns[:-1], [index for index in prompt.masked if index < len(prompt.turns) - 1])
    return prompt + Turns([joined, *answer.turns[1:]], answer.masked), len(start["content"])


def _chat(turns: Turns, **fields: Any) -> Chat:
    return Chat(tuple(turns.turns), tuple(turns.masked), **fields)


def _messages(row: Row, names: Names) -> Chat:
    return _chat(history_of(row, names) + read_turns(row.pop("messages"), "messages", names))


def _conversations(row: Row, names: Names) -> Chat:
    return _chat(read_turns(row.pop("conversations"), "conversations", names))


def _prompt_completion(row: Row, names: Names) -> Chat:
    prompt = history_of(row, names) + turns_or_text(row.pop("prompt"), "prompt", "user", names)
    completion = turns_or_text(row.pop("completion"), "completion", "assistant", names)
    if completion.turns[0]["role"] != "assistant":
        raise UserError(f"'completion' begins with the {completion.turns[0]['role']}'s turn, not the assistant's.")
    if completion.turns[0]["content"].strip() == "" and not completion.turns[0].get("tool_calls"):
        raise UserError(f"turn {len(prompt.turns) + 1}: the assistant's answer is empty.")
    turns, prefill = continued(prompt, completion)
    return _chat(turns, prompt_turns=len(turns.turns) - len(completion.turns), prefill=prefill)


def _alpaca(row: Row, names: Names) -> Chat:
    return _question_and_answer(row, names, "instruction", "output")


def _orca(row: Row, names: Names) -> Chat:
    return _question_and_answer(row, names, "question", "response")


def _trace(row: Row, names: Names) -> Chat:
    return _question_and_answer(row, names, "prompt", "answer")


def _question_and_answer(row: Row, names: Names, question: str, answer: str) -> Chat:
    asked = history_of(row, names) + text_turn("user", question_of(row, question, names))
    return _chat(asked + text_turn("assistant", text_of(row, answer, names)))


def _text(row: Row, names: Names) -> Chat:
    text = row.pop("text")
    if not isinstance(text, str):
        raise UserError(f"'text' is {json_type(text)}, not a string.")
    if "role" in row:
        said = "the row is one turn of a chat, of the role"
        raise UserError(f"{said} {row['role']!r}: put the turns of a chat into 'messages' of one row.")
    return Chat(text=text)


# data.format -> (the keys that identify the shape, its reader). The first entry whose keys a row has is its shape. A
# reader takes what it uses out of the row; what is left is counted as unused.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Row, Names], Chat]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _conversations),
    "orca": (("question", "response"), _orca),
    "trace": (("prompt", "answer"), _trace),
    "text": (("text",), _text),
}
