"""A chat: the turns that a chat template renders, and which of them have a loss. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hft_cli.data.store import Codec
from hft_cli.errors import UserError

# What chat templates read: `role` ("system", "user", "assistant" or "tool") and `content`; of an assistant's turn also
# `reasoning_content` and `tool_calls`; of a tool's also `name` and `tool_call_id`.
Turn = dict[str, Any]

LOSSES = ("assistant", "each_turn", "last_turn", "completion", "all")


@dataclass(frozen=True)
class Chat:
    """A row for SFT.

    Attributes:
        turns: see `Turn`.
        masked: indices of assistant's turns that the row itself takes out of the loss (`weight: 0`, `train: false`).
        prompt_turns: of a row with prompt and completion, how many turns belong to the prompt; otherwise 0.
        prefill: how many characters of the turn after them belong to the prompt too, because the completion continues
            an assistant's turn.
        tools: JSON schemas of the functions that the assistant may call.
        options: further variables of the chat template (the row's `chat_template_kwargs`).
        text: a row of raw text, which no template renders. It has no turns.
        aliases: further answers that are as right as the last one, in scoring.
    """

    turns: tuple[Turn, ...] = ()
    masked: tuple[int, ...] = ()
    prompt_turns: int = 0
    prefill: int = 0
    tools: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[int, ...]:
        """Indices of the assistant's turns."""
        return tuple(index for index, turn in enumerate(self.turns) if turn["role"] == "assistant")

    def trained(self, loss: str) -> tuple[int, ...]:
        """Indices of the assistant's turns that have a loss under `data.loss`.

        The completion of a row without a prompt of its own is what follows its last turn of another speaker than the
        assistant and its tools.
        """
        start = self.prompt_turns
        if loss == "completion" and not start:
            asked = [index for index, turn in enumerate(self.turns) if turn["role"] in ("system", "user")]
            start = asked[-1] + 1 if asked else 0
        answers = [index for index in self.answers if index >= (0 if loss == "all" else start)]
        return tuple(index for index in answers[-1 if loss == "last_turn" else 0 :] if index not in self.masked)

    def each_answer(self) -> dict[int, Chat]:
        """A chat for each answer that has a loss, which ends with it, by the index of its turn: data.loss=each_turn."""
        return {index: self._through(index) for index in self.trained("assistant")}

    def _through(self, index: int) -> Chat:
        masked = tuple(turn for turn in self.masked if turn < index)
        if not self.prompt_turns or index == self.prompt_turns:
            return replace(self, turns=self.turns[: index + 1], masked=masked)
        return replace(self, turns=self.turns[: index + 1], masked=masked, prompt_turns=index, prefill=0)

    def to_json(self) -> str:
        """One line of JSON, which `from_json` reads."""
        fields = {name: value for name, value in vars(self).items() if value or value == ""}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Chat:
        """Read what `to_json` has written."""
        fields = json.loads(line)
        lists = {name: tuple(fields[name]) for name in ("turns", "masked", "tools", "aliases") if name in fields}
        return cls(**{**fields, **lists})


def check_chat(chat: Chat) -> Chat:
    """Return the chat; UserError unless a model can learn from it: it ends with an answer, and no answer is empty."""
    for text, place in [(turn["content"], f"turn {number}: ") for number, turn in enumerate(chat.turns, 1)] + [
        (chat.text or "", "")
    ]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{place}half a surrogate pair at character {error.start}.") from None
    if chat.text is not None:
        if not chat.text.strip():
            raise UserError("'text' is empty, so nothing to learn.")
        return chat
    for number, turn in enumerate(chat.turns, 1):
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise UserError(f"turn {number}: the assistant's answer is empty.")
    roles = [turn["role"] for turn in chat.turns]
    if "assistant" not in roles:
        raise UserError("no assistant turn, so nothing to learn.")
    if roles[-1] != "assistant":
        raise UserError(f"the last turn is the {roles[-1]}'s, not the assistant's.")
    if roles[0] == "assistant" and 0 not in chat.masked:
        raise UserError(
            "the first turn is the assistant's: there is nothing for it to answer. With 'weight': 0 in that turn it is "
            "read, and not learnt."
        )
    if set(chat.answers) <= set(chat.masked):
        raise UserError("every answer is without a loss (weight, train, loss or mask of its turn): nothing to learn.")
    return chat


def canonical(chat: Chat) -> bytes:
    """One line of JSON: equal for equal chats. Of roles and texts alone, if nothing else has an effect."""
    turns: list[Any] = [
        [turn["role"], turn["content"], *([further] if (further := _further(turn)) else [])] for turn in chat.turns
    ]
    others = {name: value for name, value in vars(chat).items() if name != "turns" and value}
    if chat.prompt_turns and not chat.prefill:
        whole = replace(chat, prompt_turns=0)
        if all(whole.trained(loss) == chat.trained(loss) for loss in LOSSES):
            del others["prompt_turns"]
    return json.dumps([*turns, *([others] if others else [])], sort_keys=True).encode() + b"\n"


def _further(turn: Turn) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in ("role", "content")}


CHATS = Codec(Chat.to_json, Chat.from_json, canonical)
