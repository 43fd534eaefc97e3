"""Prompts for evaluation: what precedes the last answer of a chat, as in training, and what ends an answer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.encoding import batches, check_fast, encode, question_span, surplus_tokens
from hft_cli.data.rows import Chat
from hft_cli.data.templates import MARKS, apply_template, chat_template, check_template, render_chat
from hft_cli.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Prompts in the form that the model was trained on.

    Attributes:
        ids: tokens of each chat up to its last answer.
        texts: the last user turn before that answer ("" if there is none), whole, even if `ids` are cut.
        answers: the last answers.
        cut: number of prompts that lost tokens at their start.
        ends: tokens that end an answer, in ascending order: the EOS token, and the special token that the template
            writes after an answer. Empty if the tokenizer has no EOS token and the template writes text.
        stop: the text that ends an answer, if the template writes no special token after it, stripped unless it is
            white space only; otherwise None.
    """

    ids: list[list[int]]
    texts: list[str]
    answers: list[str]
    cut: int
    ends: tuple[int, ...]
    stop: str | None


def make_prompts(chats: Sequence[Chat], tokenizer: Any, *, max_length: int, where: str) -> Prompts:
    """Tokenize what precedes the last answer of each chat, up to the token at which `tokenize` starts to train.

    A token across that border is left to the model, for example the blank that many tokenizers join with the next word.
    The tokens are those of the whole row, because a text that breaks off after the prompt may be tokenized differently:
    GPT-2 has one token for two newlines at the end of a text, and two tokens if a word follows.

    Args:
        chats: as `read_chats` returns them.
        tokenizer: a fast tokenizer with a chat template.
        max_length: the largest number of tokens of a prompt. Longer ones are cut like long_prompts "cut" in `tokenize`.
        where: the name of the data in errors.

    Raises:
        UserError: for a row or a template that does not allow this, or a prompt that is too long.
    """
    check_fast(tokenizer, "Asking for answers")
    if not chats:
        raise UserError(f"No rows in {where}.")
    template = chat_template(None, tokenizer)
    ends, stop = _answer_ends(check_template(chats[0], f"{where}, example 1", tokenizer), tokenizer)
    prompts: list[list[int]] = []
    cut = 0
    for batch, places in batches(chats, where):
        rendered = [
            _render_with_answer(chat, place, tokenizer, template) for chat, place in zip(batch, places, strict=True)
        ]
        encoded = encode([text for text, _ in rendered], tokenizer, offsets=True)
        for number, (text, answer_start) in enumerate(rendered):
            offsets, place = encoded["offset_mapping"][number], places[number]
            ids = encoded["input_ids"][number][: bisect_right([end for _, end in offsets], answer_start)]
            if len(ids) > max_length:
                question = question_span(batch[number], text, place, tokenizer)
                del ids[surplus_tokens(text, offsets, question, len(ids) - max_length)]
                cut += 1
            if not ids:
                raise UserError(f"{place}: the chat template writes nothing before the answer.")
            if len(ids) > max_length:
                raise UserError(
                    f"{place}: the prompt is {len(ids)} tokens long even without its first user turn, more than the "
                    f"{max_length} that are available. Lower generation.max_new_tokens, or shorten the row."
                )
            prompts.append(ids)
    user_turns = [[turn["content"] for turn in chat[:-1] if turn["role"] == "user"] for chat in chats]
    texts = [contents[-1] if contents else "" for contents in user_turns]
    return Prompts(prompts, texts, [chat[-1]["content"] for chat in chats], cut, ends, stop)


def _render_with_answer(chat: Chat, place: str, tokenizer: Any, template: str) -> tuple[str, int]:
    """The chat as text, and the index of the character at which its last answer begins."""
    has_marks = bool(MARKS.search(template))
    text, spans = render_chat(chat, place, tokenizer, template, "assistant" if has_marks else "all")
    prompt = apply_template(chat[:-1], place, tokenizer, add_generation_prompt=True)
    starts = [len(prompt)] if text.startswith(prompt) else []
    if len(spans) == sum(turn["role"] == "assistant" for turn in chat):
        # For a template without a generation prompt, the marks show the place. Some marks (SmolLM3's) begin before the
        # header of the answer; there the generation prompt is longer.
        starts.append(spans[-1][0])
    if not starts:
        raise UserError(
            f"{place}: the chat template writes the prompt for an answer differently than in the whole chat, so the "
            "model would be asked in another form than it was trained on. Put {% generation %} marks into the "
            "template, or choose another (model.chat_template=tulu|plain|PATH)."
        )
    return text, max(starts)


def _answer_ends(tail: str, tokenizer: Any) -> tuple[tuple[int, ...], str | None]:
    """The tokens or the text that end an answer, from what the template writes after it; see `Prompts`."""
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    eos = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    # Sorted by length, so that of two special tokens at one place the longer one counts.
    at = {tail.find(token): token for token in sorted(special, key=len) if token in tail}
    text = tail[: min(at)] if at else tail
    if at and not text.strip():
        return tuple(sorted(eos | {special[at[min(at)]]})), None
    return tuple(sorted(eos)), text.strip() or text
