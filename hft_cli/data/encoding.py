"""Rendered chats as tokens, and the part of a long prompt that can be cut."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import count, pairwise
from typing import Any

from hft_cli.data.chats import Turn
from hft_cli.data.pieces import Span
from hft_cli.data.rendering import Rendered
from hft_cli.data.templates import apply_template
from hft_cli.errors import UserError

BATCH = 1000  # rows tokenized at a time: enough for the threads of the tokenizer, few enough to hold with offsets


def check_fast(tokenizer: Any, purpose: str, alternative: str = "") -> None:
    """Raise a UserError unless the tokenizer is a fast one, which gives each token's span in the text."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{purpose} needs a fast tokenizer, which gives each token's place in the text; "
            f"{type(tokenizer).__name__} is not one. Convert it to tokenizer.json{alternative}."
        )


def batches(rows: Sequence[Any], where: str) -> Iterator[tuple[Sequence[Any], list[str]]]:
    """Batches of rows, with the name of each row in errors: WHERE, example N."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        yield batch, [f"{where}, example {start + number}" for number in range(1, len(batch) + 1)]


def encode_chats(rendered: Sequence[Rendered], tokenizer: Any) -> tuple[list[list[int]], list[list[Span]]]:
    """As `encode`, of rendered chats, in whose literal spans no special token is read as one."""
    all_ids, all_offsets = encode([each.text for each in rendered], tokenizer)
    for number, each in enumerate(rendered):
        if each.literal:
            check_fast(tokenizer, "data.special_tokens=text")
            all_ids[number], all_offsets[number] = _encode_in_parts(each.text, each.literal, tokenizer)
    return all_ids, all_offsets


def _encode_in_parts(text: str, literal: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Tokens and spans of a text, whose literal spans and the parts between them are tokenized one by one."""
    ids: list[int] = []
    offsets: list[Span] = []
    edges = [0, *(edge for span in literal for edge in span), len(text)]
    for number, (start, end) in enumerate(pairwise(edges)):
        part, spans = _encode_part(text[start:end], tokenizer, is_first=number == 0, split=number % 2 == 1)
        ids += part
        offsets += [(first + start, last + start) for first, last in spans]
    return ids, offsets


BEFORE = ("\n", ".", "x")  # put before a part of a text, where it is not joined with the part


def _encode_part(part: str, tokenizer: Any, *, is_first: bool, split: bool) -> tuple[list[int], list[Span]]:
    """Tokens and spans of a part of a text. Tokenizers like SentencePiece put a blank before the start of a text."""
    for before in () if is_first else BEFORE:
        (alone, ids), (_, spans) = encode([before, before + part], tokenizer, split=split)
        if ids[: len(alone)] == alone:
            return ids[len(alone) :], [(start - 1, end - 1) for start, end in spans[len(alone) :]]
    (ids,), (spans,) = encode(
        [part], tokenizer, split=split
    )  # the first part, or one that all of these are joined with
    return ids, spans


def encode(
    texts: list[str], tokenizer: Any, *, special: bool = False, split: bool = False
) -> tuple[list[list[int]], list[list[Span]]]:
    """Tokens of each text, and each token's span in it; no spans if the tokenizer is not a fast one.

    A special token that takes in the white space beside it (`lstrip`, `rstrip`) has the span of its own text.

    Args:
        special: whether the tokenizer adds its BOS token and the like. The template of a chat has written them.
        split: whether special tokens in the texts are tokenized as other text is.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=special,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        split_special_tokens=split,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    if not tokenizer.is_fast:
        return ids, [[] for _ in ids]
    offsets: list[list[Span]] = encoded["offset_mapping"]
    greedy = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if (token.lstrip or token.rstrip) and str(token).strip()
    }
    if greedy:
        for row, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
            offsets[row] = [
                _own_span(text, span) if token in greedy else span
                for token, span in zip(tokens, offsets[row], strict=True)
            ]
    return ids, offsets


def _own_span(text: str, span: Span) -> Span:
    start, end = span
    token = text[start:end]
    return start + len(token) - len(token.lstrip()), end - (len(token) - len(token.rstrip()))


class TokenPlaces:
    """Where the tokens of a text are in it, from their spans in order."""

    def __init__(self, offsets: Sequence[Span]) -> None:
        self.starts, self.ends = [start for start, _ in offsets], [end for _, end in offsets]

    def before(self, position: int) -> int:
        """How many tokens end before a character, or at it."""
        return bisect_right(self.ends, position)

    def within(self, span: Span, what: str | None = None) -> slice:
        """The tokens that share a character with a span; UserError, calling its end `what`, if that has no token."""
        start, end = span
        first = bisect_right(self.ends, start)
        # Some tokenizers (Llama 3's, GPT-2's) trim blanks off the offsets, so that a token of blanks only is the empty
        # span at its own end. The second term includes it.
        last = max(bisect_left(self.starts, end), bisect_right(self.ends, end))
        if what and (last <= first or self.ends[last - 1] < end):
            raise UserError(
                f"{what} has no token of its own, because the special token after it takes in white space (lstrip), so "
                "the model would not learn to stop: let the chat template write eos_token there."
            )
        return slice(first, last)


def question_span(turns: Sequence[Turn], text: str, place: str, tokenizer: Any, **options: Any) -> Span:
    """The span of the first user turn's content in the rendered chat; (0, 0) if there is no user turn.

    `options` are those with which the chat was rendered: its tools, variables of the template.
    """
    number = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), None)
    if number is None:
        return 0, 0
    # A search for the content itself could find it in a system turn or a header, and would miss it where it is
    # stripped. So the chat is rendered once more with a unique text in its place.
    marker = next(marker for n in count() if (marker := f"[question {n}]") not in text)
    marked = [*turns[:number], {**turns[number], "content": marker}, *turns[number + 1 :]]
    before, marker_found, after = apply_template(marked, place, tokenizer, **options).partition(marker)
    start, end = len(before), len(text) - len(after)
    if not (marker_found and start <= end and text.startswith(before) and text.endswith(after)):
        raise UserError(
            f"{place}: too long, and its first user turn cannot be cut, because the chat template does not write it "
            "exactly once and unchanged. Choose another template (model.chat_template=tulu|plain|PATH), or a larger "
            "train.max_length."
        )
    return start, end


def surplus_tokens(text: str, offsets: list[Span], question: Span, number: int) -> slice:
    """The first `number` tokens of the question (all, if it has fewer), which are to be cut from the row."""
    start, end = question
    token_ends = [stop for _, stop in offsets]
    first, last = bisect_right(token_ends, start), bisect_right(token_ends, end)
    if first < last:
        # A token across the start belongs to the question if it holds no more of the header than a blank before a word.
        # Tokenizers that trim blanks off the offsets give it to the question anyway.
        first += bool(text[offsets[first][0] : start].strip(" "))
    return slice(first, min(last, first + number))
