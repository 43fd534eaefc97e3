"""Chats and preference pairs -> tokens with a loss mask. No row is left out or cut without being counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.data.chats import LOSSES, Chat
from hft_cli.data.encoding import TokenPlaces, check_fast, encode, encode_chats, question_span, surplus_tokens
from hft_cli.data.pieces import Span, shown
from hft_cli.data.preparation import Columns, Work, prepare, tokenizer_key
from hft_cli.data.rendering import Rendered, Renderer
from hft_cli.data.store import Rows
from hft_cli.data.summary import (
    BAD,
    IGNORED,
    Summary,
    count_bad,
    ends_of_answers,
    facts_of_rows,
    lengths_of,
    nonzero,
    trained_runs,
)
from hft_cli.errors import UserError, choose

LONGEST = 2**31 - 1  # tokens: lengths are stored in 32 bits

LONG_PROMPTS = ("drop", "cut")

SPLIT = "texts longer than train.max_length were divided"

FILLED = "prompt fills max_length"  # why a row is dropped


@dataclass(frozen=True)
class TokenOptions:
    """How rows become tokens.

    Attributes:
        max_length: the largest number of tokens of a row; the end of a longer row is truncated.
        loss: what has a loss (`data.loss`): "assistant", the assistant's turns with what ends them; "last_turn", the
            last of them; "completion", those after the prompt; "all", every token.
        long_prompts: what happens to a row longer than max_length before truncation. "drop": nothing, so that it is
            dropped if its prompt alone fills max_length. "cut": the first user turn loses as many tokens as needed at
            its start. What the template writes before that (BOS, a system turn) stays.
        special_tokens: see `Renderer`.
    """

    max_length: int
    loss: str = "assistant"
    long_prompts: str = "drop"
    special_tokens: str = "refuse"

    @classmethod
    def of(cls, config: RunConfig) -> TokenOptions:
        """Those of a run."""
        loss = "last_turn" if config.data.loss == "each_turn" else config.data.loss  # the rows end with each answer
        longest = config.train.max_length or LONGEST
        return cls(longest, loss, config.data.long_prompts, config.data.special_tokens)

    def check(self, tokenizer: Any) -> None:
        """UserError for an unknown value, or one that the tokenizer does not allow."""
        choose("data.loss", self.loss, LOSSES)
        choose("data.long_prompts", self.long_prompts, LONG_PROMPTS)
        if self.loss != "all":
            check_fast(tokenizer, "Loss on the assistant's turns", ", or set data.loss=all")
        if self.long_prompts == "cut":
            check_fast(tokenizer, "Cutting long prompts", ", or set data.long_prompts=drop")


@dataclass(frozen=True)
class TokenRow:
    """A row as it is trained on.

    Attributes:
        text: the whole row, before it is cut or truncated.
        ids: its tokens, at most max_length; of a raw text all of them, which `pieces` divides.
        labels: the same ids; -100 where there is no loss. The first token has none, because nothing precedes it.
        length: number of tokens before truncation.
        answer_start: the index of the first token with a loss, before truncation. From max_length on, the row is
            dropped.
        cut: whether its prompt lost tokens at its start.
    """

    text: str
    ids: list[int]
    labels: list[int]
    length: int
    answer_start: int
    cut: bool = False
    is_text: bool = False

    def pieces(self, max_length: int) -> list[TokenRow]:
        """The row itself, or a raw text in pieces of at most `max_length` tokens.

        A piece begins with the last token of the one before it, so that each token but the first has a loss once.
        """
        if not self.is_text or len(self.ids) <= max_length:
            return [self]
        parts = (self.ids[start : start + max_length] for start in range(0, len(self.ids) - 1, max_length - 1))
        return [replace(self, ids=ids, labels=[IGNORED, *ids[1:]], length=len(ids)) for ids in parts]


@dataclass(frozen=True)
class Tokenized:
    """Tokens for TRL's SFTTrainer, and what they are.

    Attributes:
        dataset: a `datasets.Dataset` with `input_ids` and `labels` (the same ids; -100 where there is no loss), int32.
            Rows of which truncation would have removed everything that is trained on are left out.
        summary: of the rows.
        kept: the numbers of the rows in `dataset` among those that were given.
    """

    dataset: Any
    summary: Summary
    kept: tuple[int, ...]


def tokenize(
    chats: Sequence[Chat], tokenizer: Any, *, where: str = "the data", bad_rows: str = "stop", **settings: Any
) -> Tokenized:
    """Render chats with the tokenizer's chat template, tokenize them, mask what is not trained on, and shorten them.

    Args:
        chats: as `read_chats` returns them.
        tokenizer: a fast tokenizer (any, with loss "all" and long_prompts "drop") with a chat template.
        where: the name of the data in errors.
        bad_rows: "stop", or "skip" to leave out rows that cannot be trained on.
        settings: those of `TokenOptions`.

    Raises:
        UserError: for a template or a tokenizer that does not allow this, for bad rows, or if every row would be
            dropped.
    """
    import numpy as np

    options = TokenOptions(**settings)
    options.check(tokenizer)
    max_length, long_prompts = options.max_length, options.long_prompts
    if not chats:
        raise UserError(f"No rows in {where}.")
    key = (tokenizer_key(tokenizer), asdict(options))
    function = partial(tokenize_chats, renderer=Renderer(tokenizer, options.special_tokens), options=options)
    columns_of = partial(_columns, max_length=max_length)
    dataset, bad = prepare(chats, Work(function, columns_of, _features(), key, where, bad_rows))
    facts = [*(chats.facts if isinstance(chats, Rows) else ()), {"bad": bad}]
    columns = dataset.data
    start, length, cut = (columns.column(name).to_numpy() for name in ("answer_start", "length", "cut"))
    kept = np.flatnonzero(start < max_length)
    if not len(kept):
        prompts = "prompts" if long_prompts == "drop" else "prompts, without the first user turn,"
        raise UserError(
            f"All {len(chats)} rows of {where} would lose their whole answer at train.max_length={max_length}: their "
            f"{prompts} are {start.min()} to {start.max()} tokens long. Raise train.max_length above {start.max()}."
        )
    sizes = np.minimum(length[kept], max_length)
    summary = Summary(
        rows=len(start) + count_bad(facts),
        dropped=nonzero({BAD: count_bad(facts), FILLED: len(start) - len(kept)}),
        cut=int(cut[kept].sum()),
        truncated=int((length[kept] > max_length).sum()),
        tokens=int(sizes.sum()),
        trained_tokens=int(columns.column("trained").to_numpy()[kept].sum()),
        lengths=lengths_of(sizes),
        **ends_of_answers(columns, tokenizer),
        **facts_of_rows([*facts, {"notices": nonzero({SPLIT: int(columns.column("split").to_numpy().sum())})}]),
    )
    dataset = dataset.select_columns(["input_ids", "labels"])
    return Tokenized(dataset if len(kept) == len(start) else dataset.select(kept), summary, tuple(kept.tolist()))


def _features() -> Any:
    import datasets

    tokens, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {"input_ids": tokens, "labels": tokens, "length": number, "answer_start": number, "trained": number}
    flags = dict.fromkeys(("cut", "split"), datasets.Value("bool"))
    return datasets.Features({**columns, **flags, "first": tokens, "last": tokens})


def _columns(whole_rows: Sequence[TokenRow], max_length: int) -> Columns:
    pieces = [row.pieces(max_length) for row in whole_rows]
    rows = [piece for parts in pieces for piece in parts]
    runs = [trained_runs(row.labels) for row in rows]
    return {
        "first": [[row.ids[start] for start, _ in spans] for row, spans in zip(rows, runs, strict=True)],
        "last": [[row.ids[end - 1] for _, end in spans] for row, spans in zip(rows, runs, strict=True)],
        "input_ids": [row.ids for row in rows],
        "labels": [row.labels for row in rows],
        "length": [row.length for row in rows],
        "answer_start": [row.answer_start for row in rows],
        "trained": [len(row.labels) - row.labels.count(IGNORED) for row in rows],
        "cut": [row.cut for row in rows],
        "split": [len(parts) > 1 and index == 0 for parts in pieces for index in range(len(parts))],
    }


def tokenize_chats(
    chats: Sequence[Chat], places: Sequence[str], renderer: Renderer, options: TokenOptions
) -> list[TokenRow]:
    """A batch of chats as tokens.

    Raises:
        UserError: if a chat cannot be trained on; see `Renderer.render`.
    """
    rows: dict[int, TokenRow] = {}
    for is_text, make in ((True, _text_rows), (False, _chat_rows)):
        numbers = [number for number, chat in enumerate(chats) if (chat.text is not None) == is_text]
        if numbers:
            made = make([chats[n] for n in numbers], [places[n] for n in numbers], renderer, options)
            rows |= zip(numbers, made, strict=True)
    return [rows[number] for number in range(len(chats))]


def _text_rows(
    chats: Sequence[Chat], places: Sequence[str], renderer: Renderer, options: TokenOptions
) -> list[TokenRow]:
    """Raw text, with the tokens that the tokenizer adds (BOS) and the EOS token at its end; all have a loss."""
    tokenizer = renderer.tokenizer
    texts = [str(chat.text) for chat in chats]
    all_ids, _ = encode(texts, tokenizer, special=True)
    rows = []
    for text, ids, place in zip(texts, all_ids, places, strict=True):
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:  # the text has one already
            ids = ids[1:]
        if tokenizer.eos_token_id is not None and ids[-2:] == [tokenizer.eos_token_id] * 2:
            ids = ids[:-1]
        elif tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
            text += tokenizer.eos_token
        rows.append(replace(_row(text, ids, list(ids), place, replace(options, max_length=len(ids))), is_text=True))
    return rows


def _chat_rows(
    chats: Sequence[Chat], places: Sequence[str], renderer: Renderer, options: TokenOptions
) -> list[TokenRow]:
    rendered = []
    for chat, place in zip(chats, places, strict=True):
        whole = options.loss == "all"
        answers = chat.masked if whole else chat.trained(options.loss)
        if not whole and not answers:
            raise UserError(f"{place}: no answer has a loss under data.loss={options.loss}, because of its own marks.")
        rendered.append(renderer.render(chat, place, answers, whole=whole))
    all_ids, all_offsets = encode_chats(rendered, renderer.tokenizer)
    rows = []
    for chat, place, each, ids, offsets in zip(chats, places, rendered, all_ids, all_offsets, strict=True):
        labels = _labels(ids, offsets, each, place, inverted=options.loss == "all")
        surplus = slice(0, 0)
        if options.long_prompts == "cut" and len(ids) > options.max_length:
            surplus = question_surplus(chat, place, each.text, offsets, renderer, len(ids) - options.max_length)
        kept = [*ids[: surplus.start], *ids[surplus.stop :]]
        labels = [*labels[: surplus.start], *labels[surplus.stop :]]
        rows.append(_row(each.text, kept, labels, place, options, cut=surplus.start < surplus.stop))
    return rows


def _row(
    text: str, ids: list[int], labels: list[int], place: str, options: TokenOptions, cut: bool = False
) -> TokenRow:
    labels[:1] = [IGNORED]  # the first token: see TokenRow.labels
    answer_start = next((index for index, label in enumerate(labels) if label != IGNORED), None)
    if answer_start is None:
        raise UserError(f"{place}: the chat template leaves no token to train on.")
    longest = options.max_length
    return TokenRow(text, ids[:longest], labels[:longest], len(ids), answer_start, cut)


def question_surplus(chat: Chat, place: str, text: str, offsets: list[Span], renderer: Renderer, surplus: int) -> slice:
    """The tokens of the first user turn that a row loses to become shorter by `surplus` tokens, if it can."""
    turns, options = renderer.turns(chat, place), renderer.options(chat)
    question = question_span(turns, text, place, renderer.tokenizer, **options)
    return surplus_tokens(text, offsets, question, surplus)


def _labels(ids: list[int], offsets: list[Span], rendered: Rendered, place: str, *, inverted: bool) -> list[int]:
    """`ids` where a token shares a character with the span of an answer, -100 elsewhere; or the other way round."""
    labels = list(ids) if inverted else [IGNORED] * len(ids)
    places = TokenPlaces(offsets)
    for answer in rendered.answers:
        for span in answer.spans:
            is_end = span[1] == answer.end and not inverted
            tokens = places.within(span, f"{place}: what ends turn {answer.turn + 1}" if is_end else None)
            if is_end and rendered.end_token:
                _require_end_token(ids[tokens.stop - 1], rendered.text[: span[1]], rendered.end_token, place)
            labels[tokens] = [IGNORED] * (tokens.stop - tokens.start) if inverted else ids[tokens]
    return labels


def _require_end_token(token: int, text: str, end_token: tuple[str, int], place: str) -> None:
    """UserError if a text ends with the special token of a template, and its last token is another one."""
    if text.endswith(end_token[0]) and token != end_token[1]:
        raise UserError(
            f"{place}: the tokenizer does not read '{end_token[0]}' as its special token in '{shown(text[-30:])}' (is "
            "it one for single words?), so the model would not learn to stop: let the chat template write a line break "
            "before it."
        )
