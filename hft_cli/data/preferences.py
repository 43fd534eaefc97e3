"""Rows of preference data -> a chat with its chosen answer, and the same chat with its rejected one.

Every mistake in the data is a UserError that names the file, the line or row, and the reason. Rows from which nothing
can be learned are left out and counted in `Preferences.left_out`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hft_cli.data.chats import Chat, Turn, canonical, check_chat
from hft_cli.data.files import ANY_HUB, Hub, read_rows
from hft_cli.data.rows import Row, continued, history_of, question_of, read_each, with_row_fields
from hft_cli.data.store import Codec, Rows, cache_folder, source_key, store
from hft_cli.data.turns import Names, Turns, dialogue, refuse_media, text_turn, turns_or_text
from hft_cli.errors import UserError, choose

ANSWERS = ("chosen", "rejected")

SCORES = ("score_chosen", "score_rejected")

TIES = ("keep", "drop")

# What stands before a user's turn in a dialogue that was written as one text.
USER_MARKUP = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|human|prompter)\|>"
    r"|(?:^|\n)(?:#+ ?)?(?:Human|User|USER|Instruction)\s*:"
)


@dataclass(frozen=True)
class Preference:
    """A pair: two chats that differ in their last turn, which is the assistant's."""

    chosen: Chat
    rejected: Chat

    @classmethod
    def of(cls, prompt: Iterable[Turn], chosen: Turn, rejected: Turn) -> Preference:
        """The pair of two answers to a prompt."""
        turns = tuple(prompt)
        return cls(Chat((*turns, chosen)), Chat((*turns, rejected)))


@dataclass(frozen=True)
class Preferences:
    """Preference pairs.

    Attributes:
        rows: the pairs to train on, in the order of the file.
        left_out: reason -> number of rows left out for it ("empty answer", "equal answers", "tied scores").
    """

    rows: Rows[Preference]
    left_out: dict[str, int]


def read_preferences(
    path: str,
    *,
    split: str = "train",
    max_rows: int | None = None,
    ties: str = "keep",
    names: Names | None = None,
    hub: Hub = ANY_HUB,
) -> Preferences:
    """Read rows with `chosen` and `rejected`. These shapes may be mixed:

    - a `prompt` (also `question` or `instruction`), as text or turns, and two answers, as text or as a list with one
      assistant turn;
    - two whole chats that differ in the last turn only, with or without a `prompt` that repeats their end
      (UltraFeedback); also as one text with "Human:" and "Assistant:" before the turns (hh-rlhf).

    Args:
        path, split, names, hub: as for `rows.read_chats`.
        max_rows: the largest number of rows to read, including those left out; None reads all.
        ties: "drop" leaves out rows with equal `score_chosen` and `score_rejected`; "keep" ignores the scores.

    Raises:
        UserError: if there is nothing at `path`, there are no rows, a row is bad, or all rows are left out. Rows and
            lines count from 1.
    """
    choose("dpo.ties", ties, TIES)
    left_out = {"equal answers": 0, "empty answer": 0, "tied scores": 0}
    names = names or Names()

    def read(row: Row) -> tuple[Preference, bool]:
        return read_preference(row, names), ties == "drop" and _is_tied(row)

    def pairs() -> Iterator[tuple[str, Preference]]:
        rows = read_rows(path, split, max_rows, names.bad, hub)
        for place, (preference, tied) in read_each(rows, read, names, path):
            if reason := reason_to_leave_out(preference) or ("tied scores" if tied else None):
                left_out[reason] += 1
            else:
                yield place, preference

    key = source_key(path, split, hub, max_rows, ties, names.columns, names.roles, names.bad_rows)
    rows = store(cache_folder() / "pairs" / key, pairs(), PAIRS, lambda: {**names.facts(), "left_out": left_out})
    left_out = rows.facts[0]["left_out"]
    if not rows:
        if not any(left_out.values()):
            raise UserError(f"No rows in {path}.")
        counts = ", ".join(f"{count} with {reason}" for reason, count in left_out.items() if count)
        raise UserError(f"All {sum(left_out.values())} rows of {path} are left out ({counts}): nothing to learn.")
    return Preferences(rows, left_out)


def _canonical(row: Preference) -> bytes:
    """Three lines of JSON: the prompt and both answers."""
    prompt = replace(row.chosen, turns=row.chosen.turns[:-1])
    return b"".join(canonical(chat) for chat in (prompt, Chat(row.chosen.turns[-1:]), Chat(row.rejected.turns[-1:])))


def _encode(row: Preference) -> str:
    return json.dumps([row.chosen.to_json(), row.rejected.turns[-1]], ensure_ascii=False)


def _decode(line: str) -> Preference:
    chosen, rejected = json.loads(line)
    chat = Chat.from_json(chosen)
    return Preference(chat, replace(chat, turns=(*chat.turns[:-1], rejected)))


PAIRS = Codec(_encode, _decode, _canonical)


def read_preference(row: Row, names: Names) -> Preference:
    """The pair of a row; UserError with the reason if it is bad."""
    row = {key: value for key, value in names.renamed(row).items() if value is not None or key in ANSWERS}
    if missing := [key for key in ANSWERS if key not in row]:
        raise UserError(
            f"no '{missing[0]}': preferences are rows of 'chosen' and 'rejected', which are whole chats or the answers "
            f"to a 'prompt' (keys found: {', '.join(row) or 'none'})."
        )
    refuse_media(row, "the row")
    fields = dict(row)
    prompt = history_of(fields, names) + _prompt(fields, names)
    values = [fields.pop(key) for key in ANSWERS]
    _check_texts(values, prompt)
    chats = [_whole_chat(value, key, prompt, names) for value, key in zip(values, ANSWERS, strict=True)]
    rests = [dict(fields) for _ in chats]
    chosen, rejected = (with_row_fields(chat, rest, names) for chat, rest in zip(chats, rests, strict=True))
    if chosen.turns[:-1] != rejected.turns[:-1]:
        raise UserError("'chosen' and 'rejected' differ before their last turn: they must answer the same prompt.")
    known = (*SCORES, "messages", "prompt_id")  # UltraFeedback's `messages` are the chosen chat once more
    names.unused.update(key for key, value in rests[0].items() if value not in ("", [], {}) and key not in known)
    return Preference(chosen, rejected)


def _prompt(fields: Row, names: Names) -> Turns:
    """Take the prompt out of a row; no turns if it has none."""
    if "prompt" in fields:
        return turns_or_text(fields.pop("prompt"), "prompt", "user", names)
    for column in ("question", "instruction"):
        if column in fields:
            return text_turn("user", question_of(fields, column, names))
    return Turns()


def _check_texts(values: list[Any], prompt: Turns) -> None:
    """UserError if two answers that are texts hold more than the answers."""
    texts = [value for value in values if isinstance(value, str)]
    asked = prompt.turns[-1]["content"].strip() if prompt.turns else ""
    if len(texts) < len(values):
        return
    if len(asked.split()) >= 3 and all(text.lstrip().startswith(asked) for text in texts):
        raise UserError("'chosen' and 'rejected' repeat the prompt: leave it out of them, or out of 'prompt'.")
    if all(USER_MARKUP.search(text) and not dialogue(text) for text in texts):
        raise UserError(
            "'chosen' and 'rejected' hold a whole dialogue as one text: write them as lists of turns (role, content)."
        )


def _whole_chat(value: Any, column: str, prompt: Turns, names: Names) -> Chat:
    """The prompt with one answer. A single assistant turn is an answer; anything else is the whole chat."""
    answer = (isinstance(value, str) and dialogue(value)) or turns_or_text(value, column, "assistant", names)
    prefill = prompt_turns = 0
    if len(answer.turns) == 1 and answer.turns[0]["role"] == "assistant":
        if not prompt.turns:
            raise UserError(f"no 'prompt', and '{column}' is only an answer.")
        has_text = answer.turns[0]["content"].strip()
        whole, prefill = continued(prompt, answer) if has_text else (prompt + answer, 0)
        prompt_turns = len(whole.turns) - 1 if prefill else 0
    else:
        whole = answer
        turns_before = [_stripped(turn) for turn in whole.turns[:-1]]
        if prompt.turns and turns_before[-len(prompt.turns) :] != [_stripped(turn) for turn in prompt.turns]:
            raise UserError(f"'{column}' is a chat that does not hold the 'prompt' before its last turn.")
    chat = Chat(tuple(whole.turns), prompt_turns=prompt_turns, prefill=prefill)
    try:
        # An empty answer is not a mistake here: such rows are counted and left out.
        last = chat.turns[-1] if _answer_text(chat) else {**chat.turns[-1], "content": "-"}
        check_chat(replace(chat, turns=(*chat.turns[:-1], last)))
        if len(whole.turns) - 1 in whole.masked:
            raise UserError("the answer is without a loss (weight, train, loss or mask of its turn).")
    except UserError as error:
        raise UserError(f"'{column}': {error}") from None
    return chat


def _stripped(turn: Turn) -> Turn:
    return {**turn, "content": turn["content"].strip()}


def _answer_text(chat: Chat) -> str:
    """The answer as the model has to give it; empty if there is none."""
    turn = chat.turns[-1]
    return turn["content"][chat.prefill :].strip() or ("-" if turn.get("tool_calls") else "")


def reason_to_leave_out(preference: Preference) -> str | None:
    """Why nothing can be learned from a pair: "empty answer" or "equal answers"; None if something can."""
    if not (_answer_text(preference.chosen) and _answer_text(preference.rejected)):
        return "empty answer"
    chosen, rejected = (_stripped(chat.turns[-1]) for chat in (preference.chosen, preference.rejected))
    return "equal answers" if chosen == rejected else None


def _is_tied(row: Row) -> bool:
    for key in SCORES:
        if not isinstance(row.get(key), int | float):
            raise UserError(f"dpo.ties=drop needs a number as '{key}' in every row (keys found: {', '.join(row)}).")
    return bool(row[SCORES[0]] == row[SCORES[1]])
