"""Prompts for evaluation: what precedes the last answer of a chat, as in training, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.chats import Chat
from hft_cli.data.encoding import TokenPlaces, batches, check_fast, encode_chats
from hft_cli.data.rendering import Renderer
from hft_cli.data.templates import first_special
from hft_cli.data.tokenization import question_surplus
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


def make_prompts(
    chats: Sequence[Chat], tokenizer: Any, *, max_length: int, where: str, special_tokens: str = "refuse"
) -> Prompts:
    """Tokenize what precedes the last answer of each chat, up to the token at which `tokenize` starts to train.

    A token across that border is left to the model, for example the blank that many tokenizers join with the next word.
    The tokens are those of the whole row, because a text that breaks off after the prompt may be tokenized differently:
    GPT-2 has one token for two newlines at the end of a text, and two tokens if a word follows.

    Args:
        chats: as `read_chats` returns them.
        tokenizer: a fast tokenizer with a chat template.
        max_length: the largest number of tokens of a prompt. Longer ones are cut like long_prompts "cut" in `tokenize`.
        where: the name of the data in errors.
        special_tokens: see `Renderer`.

    Raises:
        UserError: for a row or a template that does not allow this, or a prompt that is too long.
    """
    check_fast(tokenizer, "Asking for answers")
    if not chats:
        raise UserError(f"No rows in {where}.")
    if any(chat.text is not None for chat in chats):
        raise UserError(f"{where}: rows of raw text have no answers to score.")
    renderer = Renderer(tokenizer, special_tokens)
    ends, stop = answer_ends(renderer.template(chats[0], f"{where}, example 1").tail, tokenizer)
    prompts: list[list[int]] = []
    cut = 0
    for batch, places in batches(chats, where):
        rendered = [renderer.render(chat, place, chat.answers[-1:]) for chat, place in zip(batch, places, strict=True)]
        all_ids, all_offsets = encode_chats(rendered, tokenizer)
        for chat, place, each, ids, offsets in zip(batch, places, rendered, all_ids, all_offsets, strict=True):
            answer = each.answers[0]
            prompt = ids[: TokenPlaces(offsets).before(answer.spans[0][0] if answer.spans else answer.start)]
            if len(prompt) > max_length:
                del prompt[question_surplus(chat, place, each.text, offsets, renderer, len(prompt) - max_length)]
                cut += 1
            if not prompt:
                raise UserError(f"{place}: the chat template writes nothing before the answer.")
            if len(prompt) > max_length:
                raise UserError(
                    f"{place}: the prompt is {len(prompt)} tokens long even without its first user turn, more than the "
                    f"{max_length} that are available. Lower generation.max_new_tokens, or shorten the row."
                )
            prompts.append(prompt)
    user_turns = [[turn["content"] for turn in chat.turns[:-1] if turn["role"] == "user"] for chat in chats]
    texts = [contents[-1] if contents else "" for contents in user_turns]
    return Prompts(prompts, texts, [_answer_text(chat) for chat in chats], cut, ends, stop)


def _answer_text(chat: Chat) -> str:
    """The last answer, without what its prompt gives of it."""
    content: str = chat.turns[-1]["content"]
    return content[chat.prefill :] if chat.prompt_turns == len(chat.turns) - 1 else content


def answer_ends(tail: str, tokenizer: Any) -> tuple[tuple[int, ...], str | None]:
    """The tokens or the text that end an answer, from what the template writes after it; see `Prompts`."""
    eos = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    special = first_special(tail, tokenizer)
    text = tail[: special[0]] if special else tail
    if special and not text.strip():
        return tuple(sorted(eos | {special[2]})), None
    return tuple(sorted(eos)), text.strip() or text
