"""Rows of preference data -> a prompt, the answer that was chosen and the one that was rejected.

Reading needs the standard library only, as in `data`. Every mistake in the data is a `UserError` which names the file,
the row and the reason; rows that teach nothing are left out, and counted in `Preferences.left_out`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from hft_cli.data.rows import Chat, Row, check_chat, content_hash, json_type, read_rows, turns_or_text
from hft_cli.errors import UserError, choose

Preference = dict[str, Chat]  # {"prompt": turns, "chosen": the assistant's answer, "rejected": the other answer}

ANSWERS = ("chosen", "rejected")

SCORES = ("score_chosen", "score_rejected")

TIES = ("keep", "drop")


@dataclass(frozen=True)
class Preferences:
    """What was read: each answer is one turn, without the prompt; TRL calls this the conversational format.

    Attributes:
        rows: those to train on, in the order of the file.
        left_out: reason -> rows left out for it ("empty answer", "equal answers", "tied scores").
    """

    rows: list[Preference]
    left_out: dict[str, int]


def read_preferences(
    path: str, *, split: str = "train", max_rows: int | None = None, ties: str = "keep"
) -> Preferences:
    """Read rows with `chosen` and `rejected`, in any of these shapes, which may be mixed:

    - a `prompt`, as text or turns, and the two answers as text or as a list with one turn of the assistant's;
    - two whole chats, equal but for their last turn, with or without a `prompt` that repeats their end (UltraFeedback).

    Args:
        path, split, max_rows: as for `data.read_chats`; max_rows counts the rows read, those left out as well.
        ties: "drop" leaves out rows whose two scores are equal (`score_chosen`, `score_rejected`), "keep" ignores them.

    Raises:
        UserError: nothing at `path`, no rows, a bad row, or all rows left out. Rows and lines are counted from 1.
    """
    choose("ties", ties, TIES)
    rows: list[Preference] = []
    left_out = {"equal answers": 0, "empty answer": 0, "tied scores": 0}
    for place, row in islice(read_rows(path, split, stream=max_rows is not None), max_rows):
        try:
            if not isinstance(row, dict):
                raise UserError(f"not an object but {json_type(row)}.")
            preference = _preference(row)
            reason = _reason(preference) or ("tied scores" if ties == "drop" and _tied(row) else None)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if reason:
            left_out[reason] += 1
        else:
            rows.append(preference)
    if not rows:
        if not any(left_out.values()):
            raise UserError(f"No rows in {path}.")
        counts = ", ".join(f"{count} with {reason}" for reason, count in left_out.items() if count)
        raise UserError(f"All {sum(left_out.values())} rows of {path} are left out ({counts}): nothing to learn.")
    return Preferences(rows, left_out)


def preferences_hash(rows: Iterable[Preference]) -> str:
    """The sha256 (hex) of the rows in their order, as `data.content_hash` is of chats."""
    return content_hash(row[key] for row in rows for key in ("prompt", *ANSWERS))


def _preference(row: Row) -> Preference:
    if missing := [key for key in ANSWERS if key not in row]:
        raise UserError(
            f"no '{missing[0]}': preferences are rows of 'chosen' and 'rejected', which are whole chats or the answers "
            f"to a 'prompt' (keys found: {', '.join(row) or 'none'})."
        )
    given = turns_or_text(row["prompt"], "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (_chat(row[key], key, given) for key in ANSWERS)
    if chosen[:-1] != rejected[:-1]:
        raise UserError("'chosen' and 'rejected' differ before their last turn: they must answer the same prompt.")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _chat(value: Any, column: str, given: Chat) -> Chat:
    """The prompt with the answer: an answer alone is one turn of the assistant's, anything else is the whole chat."""
    turns = turns_or_text(value, column, "assistant")
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        if not given:
            raise UserError(f"no 'prompt', and '{column}' is only an answer.")
        chat = [*given, *turns]
    else:
        chat = turns
        own = [_stripped(turn) for turn in chat[:-1]]
        if given and own[-len(given) :] != [_stripped(turn) for turn in given]:
            raise UserError(f"'{column}' is a chat that does not hold the 'prompt' before its last turn.")
    try:
        # An empty answer is no mistake here: such rows are counted and left out.
        last = chat[-1] if chat[-1]["content"].strip() else {**chat[-1], "content": "-"}
        check_chat([*chat[:-1], last])
    except UserError as error:
        raise UserError(f"'{column}': {error}") from None
    return chat


def _stripped(turn: dict[str, str]) -> tuple[str, str]:
    return turn["role"], turn["content"].strip()


def _reason(preference: Preference) -> str | None:
    chosen, rejected = (preference[key][0]["content"].strip() for key in ANSWERS)
    if not (chosen and rejected):
        return "empty answer"
    return "equal answers" if chosen == rejected else None


def _tied(row: Row) -> bool:
    for key in SCORES:
        if not isinstance(row.get(key), int | float):
            raise UserError(f"ties=drop needs a number as '{key}' in every row (keys found: {', '.join(row)}).")
    return bool(row[SCORES[0]] == row[SCORES[1]])
