"""Chat templates: the text of a chat, and the spans of it that are answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hft_cli.data.compat import render_with_marks
from hft_cli.data.rows import Chat
from hft_cli.errors import UserError, choose
from hft_cli.paths import PACKAGE

Span = tuple[int, int]  # start and end in characters of the rendered text

TEMPLATES = PACKAGE / "assets" / "chat_templates"

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

OTHER_TEMPLATE = "choose another template (model.chat_template=tulu|plain|PATH)"


def chat_template(name_or_path: str | None, tokenizer: Any) -> str:
    """The text of a chat template, to assign to `tokenizer.chat_template`.

    Args:
        name_or_path: "tulu" or "plain" (in `hft_cli/assets/chat_templates`), the path of a Jinja file, or None for the
            tokenizer's own. The built-in ones begin with the BOS token if the tokenizer puts it before plain text, as
            Llama's does.
        tokenizer: the tokenizer that will use the template.

    Raises:
        UserError: if the name is unknown, the file is missing, or the tokenizer has no template or no end-of-sequence
            token for a built-in one.
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
    begins_with_bos = bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins_with_bos else "") + built_in[name_or_path].read_text(encoding="utf-8")


@contextmanager
def _template_errors(place: str) -> Iterator[None]:
    """Turn what a template raises into a UserError that names the place."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{place}: the chat template fails: {error}") from error


def apply_template(chat: Chat, place: str, tokenizer: Any, **options: Any) -> str:
    """Render a chat as text, with `options` for `apply_chat_template`; UserError at `place` if the template fails."""
    with _template_errors(place):
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def check_template(chat: Chat, place: str, tokenizer: Any) -> str:
    """What the template writes after an answer; UserError if that is nothing, or the answer is left out."""
    chat_template(None, tokenizer)  # raises if the tokenizer has none
    answer = "An answer to look for."
    text = apply_template([*chat[:-1], {"role": "assistant", "content": answer}], place, tokenizer)
    _, answer_found, tail = text.rpartition(answer)
    if not answer_found:
        raise UserError(f"The chat template leaves out the assistant's turns (is it for images?): {OTHER_TEMPLATE}.")
    if not tail:
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop: let it write "
            f"eos_token there, or {OTHER_TEMPLATE}."
        )
    return tail


def render_chat(chat: Chat, place: str, tokenizer: Any, template: str, loss: str) -> tuple[str, list[Span]]:
    """Render a chat as text, with the spans of the answers and of what ends each of them.

    Args:
        chat: the turns.
        place: the name of the chat in errors.
        tokenizer: a tokenizer whose chat template is `template`.
        loss: "assistant", or "all", for which there are no spans.

    Raises:
        UserError: if the template fails, or the answers cannot be found.
    """
    if loss == "all":
        return apply_template(chat, place, tokenizer), []
    if not MARKS.search(template):
        return _render_by_prefixes(chat, place, tokenizer)
    with _template_errors(place):
        text, spans = render_with_marks(chat, template, tokenizer.special_tokens_map)
    return text, _include_ends(chat, text, spans)


def _include_ends(chat: Chat, text: str, spans: list[Span]) -> list[Span]:
    """Extend marked spans by the end-of-turn token; if it were left out, the model would never learn to stop."""
    if not spans or len(spans) != sum(turn["role"] == "assistant" for turn in chat):
        return spans  # not one span for each turn: the text after the last span need not end a turn
    tail = text[spans[-1][1] :].rstrip()  # what follows the last answer, and therefore each answer
    return [(start, end + len(tail) if text.startswith(tail, end) else end) for start, end in spans]


def _render_by_prefixes(chat: Chat, place: str, tokenizer: Any) -> tuple[str, list[Span]]:
    """Find the answers without marks: an answer is what its turn adds to the prompt for it."""
    text = apply_template(chat, place, tokenizer)
    spans = []
    for number, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = apply_template(chat[:number], place, tokenizer, add_generation_prompt=True)
        through_turn = text if number + 1 == len(chat) else apply_template(chat[: number + 1], place, tokenizer)
        if not (text.startswith(through_turn) and through_turn.startswith(prompt)):
            raise UserError(
                f"{place}: the chat template writes turn {number + 1} differently in the whole chat than at its end "
                "(as templates do that drop earlier reasoning), so the assistant's tokens cannot be found. Put "
                "{% generation %} marks into the template, choose another (model.chat_template=tulu), or set "
                "data.loss=all."
            )
        answer = through_turn[len(prompt) :]
        # A newline after an end-of-turn token is never generated. If nothing else ends the turn, the newline does.
        if not answer.rstrip().endswith(turn["content"].rstrip()):
            answer = answer.rstrip()
        spans.append((len(prompt), len(prompt) + len(answer)))
    return text, spans
