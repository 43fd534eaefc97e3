"""Reasoning before an answer, and the answer without it."""

from __future__ import annotations

import re
from typing import Any

from hft_cli.data.templates import REASONING_TAG

# OpenAI's harmony format (gpt-oss) names the channel of each message; the answer is in the channel "final".
_CHANNEL, _FINAL = "<|channel|>", "<|channel|>final<|message|>"
_NAMES = "think|thinking|thought|reasoning|reflection"
_OPENING = re.compile(rf"\s*(?:<(?:{_NAMES})>|\[THINK\]|◁think▷)")
_OPENED = re.compile(rf"{_OPENING.pattern}\s*$")
_CLOSING = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷")


def has_reasoning(tokenizer: Any) -> bool:
    """Whether the chat template knows of reasoning before an answer."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any(REASONING_TAG.search(text) or _CHANNEL in text for text in texts)


def split_reasoning(text: str, prompt: str = "") -> tuple[str | None, str]:
    """The reasoning at the start of a generated text, and the answer after it.

    Args:
        text: with its special tokens.
        prompt: the end of the prompt, which may have opened the reasoning already.

    Returns:
        The reasoning, None if there is none; and the answer, "" if the reasoning does not end.
    """
    before, final, answer = text.rpartition(_FINAL)
    if final:
        return before.rpartition("<|message|>")[2].split("<|")[0], answer
    if text.lstrip().startswith(_CHANNEL):
        return text, ""
    opened = _OPENING.match(text)
    if opened is None and not _OPENED.search(prompt):
        closed = _CLOSING.search(text)  # of what the prompt has opened
        return (None, text) if closed is None else (text[: closed.start()], text[closed.end() :].lstrip())
    reasoning, answer = _first_block(text[opened.end() :] if opened else text)
    while opened := _OPENING.match(answer):  # some models write several, often empty ones
        more, answer = _first_block(answer[opened.end() :])
        reasoning += more
    return reasoning, answer


def _first_block(text: str) -> tuple[str, str]:
    """The text up to the first closing tag, and the text after it, "" without one."""
    closed = _CLOSING.search(text)
    return (text, "") if closed is None else (text[: closed.start()], text[closed.end() :].lstrip())


def decode_answer(tokens: list[int], tokenizer: Any, prompt: str = "") -> tuple[str | None, str]:
    """The reasoning and the answer in generated tokens, as text without special tokens."""
    reasoning, answer = split_reasoning(tokenizer.decode(tokens, skip_special_tokens=False), prompt)
    if reasoning is None:
        return None, str(tokenizer.decode(tokens, skip_special_tokens=True))
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            answer = answer.replace(str(token), "")
    return reasoning.strip(), answer
