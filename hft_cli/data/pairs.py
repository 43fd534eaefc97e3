"""Preference pairs -> tokens, with the same checks of the answers as for SFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hft_cli.data.chats import Chat
from hft_cli.data.encoding import TokenPlaces, check_fast, encode_chats
from hft_cli.data.preferences import ANSWERS, Preference
from hft_cli.data.preparation import Columns, Work, prepare, tokenizer_key
from hft_cli.data.rendering import Renderer
from hft_cli.data.store import Rows
from hft_cli.data.summary import BAD, Summary, count_bad, ends_of_answers, facts_of_rows, lengths_of, nonzero
from hft_cli.data.tokenization import FILLED
from hft_cli.errors import UserError

ALIKE = "alike when cut"

NUMBERS = ("prompt", "trained", "truncated", "length")

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # of TRL's DPOTrainer


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


@dataclass(frozen=True)
class TokenizedPairs:
    """Tokens for TRL's DPOTrainer, and what they are.

    Attributes:
        dataset: a `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `rejected_ids`, int32.
        summary: of the rows.
    """

    dataset: Any
    summary: Summary


def prepare_pairs(
    pairs: Sequence[Preference],
    tokenizer: Any,
    max_length: int,
    where: str,
    bad_rows: str = "stop",
    special_tokens: str = "refuse",
) -> TokenizedPairs:
    """Render pairs with the tokenizer's chat template, tokenize them, and leave out those that teach nothing.

    Args:
        pairs: as `read_preferences` returns them.
        tokenizer: a fast tokenizer with a chat template.
        max_length: see `tokenize_pairs`.
        where: the name of the data in errors.
        bad_rows: "stop", or "skip" to leave out rows that cannot be trained on.
        special_tokens: see `Renderer`.

    Raises:
        UserError: for a template or a tokenizer that does not allow this, for bad rows, or if no row is left.
    """
    import datasets
    import numpy as np

    check_fast(tokenizer, "DPO")
    if not pairs:
        raise UserError(f"No rows in {where}.")
    tokens, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {**dict.fromkeys((*COLUMNS, "first", "last"), tokens), **dict.fromkeys(NUMBERS, number)}
    features = datasets.Features({**columns, "left_out": datasets.Value("string")})
    key = ("pairs", tokenizer_key(tokenizer), max_length, special_tokens)
    function = partial(tokenize_pairs, renderer=Renderer(tokenizer, special_tokens), max_length=max_length)
    dataset, bad = prepare(pairs, Work(function, _columns, features, key, where, bad_rows))
    data = dataset.data
    reasons = data.column("left_out").to_pylist()
    counts = {reason: reasons.count(reason) for reason in (FILLED, ALIKE)}
    kept = np.flatnonzero([reason == "" for reason in reasons])
    if not len(kept):
        raise UserError(
            f"No row of {where} can be trained on at train.max_length={max_length}: the prompt fills it in "
            f"{counts[FILLED]} of {len(pairs)} rows, and both answers have the same tokens in {counts[ALIKE]}. Raise "
            "train.max_length."
        )
    prompt, trained, truncated, length = (data.column(name).to_numpy()[kept] for name in NUMBERS)
    facts = [*(pairs.facts if isinstance(pairs, Rows) else ()), {"bad": bad}]
    left_out = Counter({BAD: count_bad(facts)})
    for each in facts:
        left_out.update(each.get("left_out", {}))
    summary = Summary(
        rows=len(reasons) + sum(left_out.values()),
        dropped=nonzero({**left_out, **counts}),
        cut=0,
        truncated=int(truncated.sum()),
        tokens=int(trained.sum() + 2 * prompt.sum()),
        trained_tokens=int(trained.sum()),
        lengths=lengths_of(length),
        **ends_of_answers(data, tokenizer),
        **facts_of_rows(facts),
    )
    return TokenizedPairs(dataset.select_columns(list(COLUMNS)).select(kept), summary)


def _columns(rows: Sequence[PairRow]) -> Columns:
    ids = [(row.prompt, *row.answers) for row in rows]
    return {
        **{name: [row[index] for row in ids] for index, name in enumerate(COLUMNS)},
        "prompt": [len(row.prompt) for row in rows],
        "trained": [sum(map(len, row.answers)) for row in rows],
        "truncated": [int(row.truncated) for row in rows],
        "length": [len(row.prompt) + max(map(len, row.answers)) for row in rows],
        "first": [[answer[0] for answer in row.answers if answer] for row in rows],
        "last": [[answer[-1] for answer in row.answers if answer] for row in rows],
        "left_out": [row.left_out or "" for row in rows],
    }


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
    all_ids, all_offsets = encode_chats(rendered, renderer.tokenizer)
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
