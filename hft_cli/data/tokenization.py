"""Chats -> tokens with a loss mask, for training. No row is left out or cut without being counted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.encoding import batches, check_fast, encode, question_span, surplus_tokens
from hft_cli.data.rows import Chat
from hft_cli.data.templates import Span, chat_template, check_template, render_chat
from hft_cli.errors import UserError, choose

LOSSES = ("assistant", "all")

LONG_PROMPTS = ("drop", "cut")

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Tokenized:
    """Tokens for TRL's SFTTrainer, and counts of rows and tokens.

    Attributes:
        dataset: a `datasets.Dataset` with `input_ids` and `labels` (the same ids; -100 where there is no loss), int32.
        rows: rows in `dataset`.
        dropped: rows left out because truncation would have removed everything that is trained on.
        truncated: rows in `dataset` that lost tokens at their end.
        cut: rows in `dataset` whose prompt lost tokens at its start; they may have lost some at their end as well.
        trained_tokens: tokens with a loss. The first token of a row has none, because nothing precedes it.
        total_tokens: tokens in `dataset`.
    """

    dataset: Any
    rows: int
    dropped: int
    truncated: int
    cut: int
    trained_tokens: int
    total_tokens: int


def tokenize(
    chats: Sequence[Chat],
    tokenizer: Any,
    *,
    max_length: int,
    loss: str = "assistant",
    long_prompts: str = "drop",
    where: str = "the data",
) -> Tokenized:
    """Render chats with the tokenizer's chat template, tokenize them, mask what is not trained on, and shorten them.

    Args:
        chats: as `read_chats` returns them.
        tokenizer: a fast tokenizer (any, with loss "all" and long_prompts "drop") with a chat template.
        max_length: the largest number of tokens of a row; the end of a longer row is truncated.
        loss: "assistant" trains on the assistant's turns with their end-of-turn token; "all" on every token.
        long_prompts: what happens to a row longer than max_length before truncation. "drop": nothing, so that it is
            dropped if its prompt alone fills max_length. "cut": the first user turn loses as many tokens as needed at
            its start. What the template writes before that (BOS, a system turn) stays.
        where: the name of the data in errors.

    Raises:
        UserError: for a template or a tokenizer that does not allow this, or if every row would be dropped.
    """
    import datasets

    options = _Options(max_length, loss, long_prompts)
    options.check(tokenizer)
    if not chats:
        raise UserError(f"No rows in {where}.")
    template = chat_template(None, tokenizer)
    check_template(chats[0], f"{where}, example 1", tokenizer)
    column = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"input_ids": column, "labels": column})
    parts: list[Any] = []
    dropped: list[int] = []  # tokens before the answer of each dropped row
    truncated = cut = trained = total = 0
    for batch, places in batches(chats, where):
        rows = _tokenize_batch(batch, places, tokenizer, template, options)
        dropped += [row.answer_start for row in rows if row.answer_start >= max_length]
        rows = [row for row in rows if row.answer_start < max_length]
        ids, labels = [row.ids[:max_length] for row in rows], [row.labels[:max_length] for row in rows]
        parts.append(datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}, features=features))
        truncated += sum(len(row.ids) > max_length for row in rows)
        cut += sum(row.is_cut for row in rows)
        total += sum(map(len, ids))
        trained += sum(label != IGNORED for row_labels in labels for label in row_labels)
    if len(dropped) == len(chats):
        prompts = "prompts" if long_prompts == "drop" else "prompts, without the first user turn,"
        raise UserError(
            f"All {len(chats)} rows of {where} would lose their whole answer at train.max_length={max_length}: their "
            f"{prompts} are {min(dropped)} to {max(dropped)} tokens long. Raise train.max_length above {max(dropped)}."
        )
    dataset = datasets.concatenate_datasets(parts)
    return Tokenized(dataset, len(dataset), len(dropped), truncated, cut, trained, total)


@dataclass(frozen=True)
class _Options:
    max_length: int
    loss: str
    long_prompts: str

    def check(self, tokenizer: Any) -> None:
        choose("data.loss", self.loss, LOSSES)
        choose("data.long_prompts", self.long_prompts, LONG_PROMPTS)
        if self.loss == "assistant":
            check_fast(tokenizer, "Loss on the assistant's turns", ", or set data.loss=all")
        if self.long_prompts == "cut":
            check_fast(tokenizer, "Cutting long prompts", ", or set data.long_prompts=drop")

    @property
    def need_offsets(self) -> bool:
        return self.loss == "assistant" or self.long_prompts == "cut"


@dataclass(frozen=True)
class _Row:
    """A row before truncation. `answer_start` is the index of its first token with a loss."""

    ids: list[int]
    labels: list[int]
    is_cut: bool
    answer_start: int


def _tokenize_batch(
    chats: Sequence[Chat], places: list[str], tokenizer: Any, template: str, options: _Options
) -> list[_Row]:
    rendered = [
        render_chat(chat, place, tokenizer, template, options.loss) for chat, place in zip(chats, places, strict=True)
    ]
    encoded = encode([text for text, _ in rendered], tokenizer, offsets=options.need_offsets)
    rows = []
    for number, (text, spans) in enumerate(rendered):
        ids, place = encoded["input_ids"][number], places[number]
        offsets = encoded["offset_mapping"][number] if options.need_offsets else []
        labels = _labels(ids, offsets, spans) if options.loss == "assistant" else list(ids)
        surplus = slice(0, 0)
        if options.long_prompts == "cut" and len(ids) > options.max_length:
            question = question_span(chats[number], text, place, tokenizer)
            surplus = surplus_tokens(text, offsets, question, len(ids) - options.max_length)
        del ids[surplus], labels[surplus]
        labels[:1] = [IGNORED]  # the first token: see Tokenized.trained_tokens
        answer_start = next((index for index, label in enumerate(labels) if label != IGNORED), None)
        if answer_start is None:
            raise UserError(f"{place}: the chat template leaves no token to train on.")
        rows.append(_Row(ids, labels, surplus.start < surplus.stop, answer_start))
    return rows


def _labels(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """`ids` where a token shares a character with a span, -100 elsewhere."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first = bisect_right(ends, start)
        # Some tokenizers (Llama 3's, GPT-2's) trim blanks off the offsets, so that a token of blanks only is the empty
        # span at its own end. The second term includes it.
        last = max(bisect_left(starts, end), bisect_right(ends, end))
        labels[first:last] = ids[first:last]
    return labels
