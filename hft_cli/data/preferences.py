"""Rows of preference data -> a prompt, its chosen answer and its rejected answer.

Every mistake in the data is a UserError that names the file, the line or row, and the reason. Rows from which nothing
can be learned are left out and counted in `Preferences.left_out`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hft_cli.data.files import read_rows
from hft_cli.data.rows import Chat, Row, check_chat, content_hash, turns_or_text
from hft_cli.errors import UserError, choose

Preference = dict[str, Chat]  # {"prompt": turns, "chosen": [one assistant turn], "rejected": [one assistant turn]}

ANSWERS = ("chosen", "rejected")

SCORES = ("score_chosen", "score_rejected")

TIES = ("keep", "drop")


@dataclass(frozen=True)
class Preferences:
    """Preference pairs in what TRL calls the conversational format.

    Attributes:
        rows: the pairs to train on, in the order of the file.
        left_out: reason -> number of rows left out for it ("empty answer", "equal answers", "tied scores").
    """

    rows: list[Preference]
    left_out: dict[str, int]


def read_preferences(
    path: str, *, split: str = "train", max_rows: int | None = None, ties: str = "keep"
) -> Preferences:
    """Read rows with `chosen` and `rejected`. These shapes may be mixed:

    - a `prompt`, as text or turns, and two answers, as text or as a list with one assistant turn;
    - two whole chats that differ in the last turn only, with or without a `prompt` that repeats their end
      (UltraFeedback).

    Args:
        path, split: as for `rows.read_chats`.
        max_rows: the largest number of rows to read, including those left out; None reads all.
        ties: "drop" leaves out rows with equal `score_chosen` and `score_rejected`; "keep" ignores the scores.

    Raises:
        UserError: if there is nothing at `path`, there are no rows, a row is bad, or all rows are left out. Rows and
            lines count from 1.
    """
    choose("dpo.ties", ties, TIES)
    rows: list[Preference] = []
    left_out = {"equal answers": 0, "empty answer": 0, "tied scores": 0}
    for place, row in read_rows(path, split, max_rows):
        try:
            preference = _preference(row)
            reason = _reason_to_leave_out(preference) or ("tied scores" if ties == "drop" and _is_tied(row) else None)
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
    """SHA-256 (hex) of the pairs in their order, like `rows.content_hash`."""
    return content_hash(row[key] for row in rows for key in ("prompt", *ANSWERS))


def _preference(row: Row) -> Preference:
    if missing := [key for key in ANSWERS if key not in row]:
        raise UserError(
            f"no '{missing[0]}': preferences are rows of 'chosen' and 'rejected', which are whole chats or the answers "
            f"to a 'prompt' (keys found: {', '.join(row) or 'none'})."
        )
    prompt = turns_or_text(row["prompt"], "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (_whole_chat(row[key], key, prompt) for key in ANSWERS)
    if chosen[:-1] != rejected[:-1]:
        raise UserError("'chosen' and 'rejected' differ before their last turn: they must answer the same prompt.")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _whole_chat(value: Any, column: str, prompt: Chat) -> Chat:
    """The prompt with one answer. A single assistant turn is an answer; anything else is the whole chat."""
    chat = turns_or_text(value, column, "assistant")
    if len(chat) == 1 and chat[0]["role"] == "assistant":
        if not prompt:
            raise UserError(f"no 'prompt', and '{column}' is only an answer.")
        chat = [*prompt, *chat]
    else:
        turns_before = [_stripped(turn) for turn in chat[:-1]]
        if prompt and turns_before[-len(prompt) :] != [_stripped(turn) for turn in prompt]:
            raise UserError(f"'{column}' is a chat that does not hold the 'prompt' before its last turn.")
    try:
        # An empty answer is not a mistake here: such rows are counted and left out.
        last = chat[-1] if chat[-1]["content"].strip() else {**chat[-1], "content": "-"}
        check_chat([*chat[:-1], last])
    except UserError as error:
        raise UserError(f"'{column}': {error}") from None
    return chat


def _stripped(turn: dict[str, str]) -> tuple[str, str]:
    return turn["role"], turn["content"].strip()


def _reason_to_leave_out(preference: Preference) -> str | None:
    chosen, rejected = (preference[key][0]["content"].strip() for key in ANSWERS)
    if not (chosen and rejected):
        return "empty answer"
    return "equal answers" if chosen == rejected else None


def _is_tied(row: Row) -> bool:
    for key in SCORES:
        if not isinstance(row.get(key), int | float):
            raise UserError(f"dpo.ties=drop needs a number as '{key}' in every row (keys found: {', '.join(row)}).")
    return bool(row[SCORES[0]] == row[SCORES[1]])
