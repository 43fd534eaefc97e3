"""Preference pairs -> tokens, with the same checks of the answers as for SFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hft_cli.data.chats import Chat
from hft_cli.data.encoding import TokenPlaces, encode
from hft_cli.data.preferences import ANSWERS, Preference
from hft_cli.data.rendering import Renderer

FILLED = "prompt fills max_length"

ALIKE = "alike when cut"


@dataclass(frozen=True)
class PairRow:
    """A pair as it is trained on.

    Attributes:
        texts: the whole rows with the chosen and with the rejected answer.
        prompt: tokens before both answers.
        answers: tokens of the chosen and of the rejected answer, through what ends it; all have a loss. Where a token
            lies across the start of one of them, the answers begin where the tokens differ.
        left_out: why it is not trained on, FILLED or ALIKE; or None.
        truncated: whether an answer lost tokens at its end.
    """

    texts: tuple[str, str]
    prompt: list[int]
    answers: tuple[list[int], list[int]]
    left_out: str | None
    truncated: bool

    def columns(self) -> dict[str, list[int]]:
        """The row in the columns of TRL's DPOTrainer."""
        return {"prompt_ids": self.prompt, "chosen_ids": self.answers[0], "rejected_ids": self.answers[1]}


def tokenize_pairs(
    pairs: Sequence[Preference], places: Sequence[str], renderer: Renderer, max_length: int
) -> list[PairRow]:
    """A batch of pairs as tokens. More than `max_length` tokens of a prompt with an answer are cut off at the end.

    Raises:
        UserError: if a pair cannot be trained on; see `Renderer.render`.
    """
    sides = []
    for key in ANSWERS:
        chats = [getattr(pair, key) for pair in pairs]
        sides.append(_tokens(chats, [f"{place}, {key}" for place in places], renderer))
    return [_pair(chosen, rejected, max_length) for chosen, rejected in zip(*sides, strict=True)]


def _tokens(chats: Sequence[Chat], places: Sequence[str], renderer: Renderer) -> list[tuple[str, list[int], int]]:
    """Of each chat the text, the tokens through the end of its last answer, and the number of those before it."""
    rendered = [renderer.render(chat, place, chat.answers[-1:]) for chat, place in zip(chats, places, strict=True)]
    all_ids, all_offsets = encode([each.text for each in rendered], renderer.tokenizer)
    rows = []
    for each, ids, offsets, place in zip(rendered, all_ids, all_offsets, places, strict=True):
        answer = each.answers[0]
        tokens = TokenPlaces(offsets).within((answer.start, answer.end), f"{place}: what ends the answer")
        rows.append((each.text, ids[: tokens.stop], tokens.start))
    return rows


def _pair(chosen: tuple[str, list[int], int], rejected: tuple[str, list[int], int], max_length: int) -> PairRow:
    texts = (chosen[0], rejected[0])
    start = 0
    while start < min(chosen[2], rejected[2]) and chosen[1][start] == rejected[1][start]:
        start += 1
    answers = tuple(ids[start:max_length] for _, ids, _ in (chosen, rejected))
    left_out = FILLED if start >= max_length else ALIKE if answers[0] == answers[1] else None
    longest = max(len(chosen[1]), len(rejected[1]))
    return PairRow(texts, chosen[1][:start], (answers[0], answers[1]), left_out, longest > max_length)
