"""Chat templates: which text is rendered, and which part of it is an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hft_cli.data.rows import Chat
from hft_cli.errors import UserError, choose
from hft_cli.paths import PACKAGE

Span = tuple[int, int]  # start and end, in characters of the rendered text

TEMPLATES = PACKAGE / "assets" / "chat_templates"

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@contextmanager
def _failing_at(place: str) -> Iterator[None]:
    """What a template raises, as a UserError with the place."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{place}: the chat template fails: {error}") from error


def apply_template(chat: Chat, place: str, tokenizer: Any, **options: Any) -> str:
    """The chat as its template writes it, with `options` of apply_chat_template; UserError at `place` if that fails."""
    with _failing_at(place):
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def render_chat(chat: Chat, place: str, tokenizer: Any, template: str, loss: str) -> tuple[str, list[Span]]:
    """The chat as text, and the assistant's spans of it: the answers with what ends each."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if loss == "all":
        return apply_template(chat, place, tokenizer), []
    if not MARKS.search(template):
        return rendered_by_prefixes(chat, place, tokenizer)
    with _failing_at(place):
        texts, spans = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return texts[0], _with_ends(chat, texts[0], spans[0])


def check_template(chat: Chat, place: str, tokenizer: Any) -> str:
    """What is written after an answer; UserError if that is nothing, or the answer is left out: neither would show."""
    chat_template(None, tokenizer)  # a tokenizer without one is refused here
    answer = "An answer to look for."
    text = apply_template([*chat[:-1], {"role": "assistant", "content": answer}], place, tokenizer)
    _, found, tail = text.rpartition(answer)
    other = "choose another (model.chat_template=tulu|plain|PATH)"
    if not found:
        raise UserError(f"The chat template leaves out what the assistant says (is it for images?): {other}.")
    if not tail:
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop: let it write "
            f"eos_token there, or {other}."
        )
    return tail


def _with_ends(chat: Chat, text: str, spans: list[Span]) -> list[Span]:
    """The marked spans with the end-of-turn token: where a template leaves it unmarked, stopping is never learnt."""
    if not spans or len(spans) != sum(turn["role"] == "assistant" for turn in chat):
        return spans  # not one span for a turn: what follows the last span need not be the end of a turn
    tail = text[spans[-1][1] :].rstrip()  # what follows the last answer, and so each answer
    return [(start, end + len(tail) if text.startswith(tail, end) else end) for start, end in spans]


def rendered_by_prefixes(chat: Chat, place: str, tokenizer: Any) -> tuple[str, list[Span]]:
    """Without marks: a turn is what the text has grown by since the prompt for it was written."""
    text = apply_template(chat, place, tokenizer)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = apply_template(chat[:number], place, tokenizer, add_generation_prompt=True)
        upto = text if number + 1 == len(chat) else apply_template(chat[: number + 1], place, tokenizer)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise UserError(
                f"{place}: the chat template writes turn {number + 1} differently in the whole chat than on its own "
                "(templates that leave out earlier reasoning do), so the assistant's tokens cannot be told. Put "
                "{% generation %} marks into the template, choose another (model.chat_template=tulu), or set "
                "data.loss=all."
            )
        answer = upto[len(prompt) :]
        # A newline after an end-of-turn token is never generated; but where nothing else ends the turn, it does.
        if not answer.rstrip().endswith(turn["content"].rstrip()):
            answer = answer.rstrip()
        spans.append((len(prompt), len(prompt) + len(answer)))
    return text, spans


def chat_template(name_or_path: str | None, tokenizer: Any) -> str:
    """The text of a chat template, to be set as `tokenizer.chat_template`.

    Args:
        name_or_path: "tulu" or "plain" (in `hft_cli/templates`), the path of a Jinja file, or None for the tokenizer's
            own. The built-in ones begin with the BOS token if the tokenizer puts it before plain text, as Llama's does.
        tokenizer: the one the template is for.

    Raises:
        UserError: the tokenizer has no template, or no end-of-sequence token for a built-in one; unknown name; no file.
    """
    if name_or_path is None:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError:
            raise UserError("The tokenizer has no chat template. Set model.chat_template=tulu|plain|PATH.") from None
    built_in = {file.stem: file for file in sorted(TEMPLATES.glob("*.jinja"))}
    if name_or_path not in built_in:
        file = Path(name_or_path).expanduser()
        if file.is_file():
            return file.read_text(encoding="utf-8")
        if file.suffix or len(file.parts) > 1:
            raise UserError(f"No such chat template file: '{name_or_path}'. Built in: {', '.join(built_in)}.")
        choose("model.chat_template", name_or_path, built_in)
    if not tokenizer.eos_token:
        raise UserError(f"The chat template '{name_or_path}' ends answers with the EOS token; the tokenizer has none.")
    begins = bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + built_in[name_or_path].read_text(encoding="utf-8")
