"""Rendered chats as tokens, and the part of a long prompt that can be cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from hft_cli.data.rows import Chat
from hft_cli.data.templates import Span, apply_template
from hft_cli.errors import UserError

BATCH = 1000  # rows tokenized at a time: enough for the threads of the tokenizer, few enough to hold with offsets


def check_fast(tokenizer: Any, purpose: str, alternative: str = "") -> None:
    """Raise a UserError unless the tokenizer is a fast one, which gives each token's span in the text."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{purpose} needs a fast tokenizer, which gives each token's place in the text; "
            f"{type(tokenizer).__name__} is not one. Convert it to tokenizer.json{alternative}."
        )


def batches(chats: Sequence[Chat], where: str) -> Iterator[tuple[Sequence[Chat], list[str]]]:
    """Batches of chats, with the name of each chat in errors: WHERE, example N."""
    for start in range(0, len(chats), BATCH):
        batch = chats[start : start + BATCH]
        yield batch, [f"{where}, example {start + number}" for number in range(1, len(batch) + 1)]


def encode(texts: list[str], tokenizer: Any, *, offsets: bool) -> Any:
    """`input_ids` of each text, and with `offsets` the `offset_mapping`: each token's span in the text."""
    return tokenizer(
        texts,
        add_special_tokens=False,  # the template has written them: another BOS would be one too many
        return_offsets_mapping=offsets,
        return_attention_mask=False,
        verbose=False,
    )


def question_span(chat: Chat, text: str, place: str, tokenizer: Any) -> Span:
    """The span of the first user turn's content in the rendered chat; (0, 0) if there is no user turn."""
    number = next((number for number, turn in enumerate(chat) if turn["role"] == "user"), None)
    if number is None:
        return 0, 0
    # A search for the content itself could find it in a system turn or a header, and would miss it where it is
    # stripped. So the chat is rendered once more with a unique text in its place.
    marker = next(marker for n in count() if (marker := f"[question {n}]") not in text)
    marked = [*chat[:number], {**chat[number], "content": marker}, *chat[number + 1 :]]
    before, marker_found, after = apply_template(marked, place, tokenizer).partition(marker)
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
