"""Chat templates: which one a run uses, and what one does with a chat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from hft_cli.data.chats import Turn
from hft_cli.data.turns import REASONING_KEYS
from hft_cli.errors import UserError, choose, short
from hft_cli.paths import PACKAGE, expanded

TEMPLATES = PACKAGE / "assets" / "chat_templates"

MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

NO_TEMPLATE = (
    "The tokenizer has no chat template. Set model.chat_template=tulu|plain|PATH. (Rows of raw text need none.)"
)

OTHER_TEMPLATE = "choose another template (model.chat_template=tulu|plain|PATH)"

# The tags between which models write their reasoning. Templates split an answer at them.
REASONING_TAG = re.compile(r"</?(?:think|thinking|thought|reasoning|reflection)>|\[/?THINK\]|◁/?think▷")

PROBE, QUESTION = "An answer to look for.", "A question."

# The forms of the arguments of a call that templates read.
ARGUMENTS: dict[str, Any] = {"object": {"key": "a value"}, "string": '{"key": "a value"}'}


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "a_function", "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


# Chats with turns that others do not have.
_ROLES = ("system", "user", "assistant", "user", "assistant")
WITH_SYSTEM: list[Turn] = [{"role": role, "content": QUESTION} for role in _ROLES]
WITH_CALL: list[list[Turn]] = [
    [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]},
        {"role": "tool", "content": "1", "name": "a_function", "tool_call_id": "call00001"},
        {"role": "assistant", "content": PROBE},
    ]
    for arguments in ARGUMENTS.values()
]


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a model's folder or hub repository.

    Raises:
        UserError: if there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # broken files fail in many ways
        raise UserError(f"{path} has no tokenizer that transformers can read: {short(error)}") from error


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
        return own_template(tokenizer)
    file = template_file(name_or_path)
    if file.parent != TEMPLATES:
        return read_template(file)
    if not tokenizer.eos_token:
        raise UserError(f"The chat template '{name_or_path}' ends answers with the EOS token; the tokenizer has none.")
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + read_template(file)


def read_template(file: Path) -> str:
    """The text of a template; UserError if it is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The chat template {file} is not UTF-8 ({error}). Fetch or write it again.") from None


def template_file(name_or_path: str) -> Path:
    """The file of a chat template: one of `TEMPLATES` by its name, or the user's own by its path.

    Raises:
        UserError: if there is none.
    """
    built_in = {file.stem: file for file in sorted(TEMPLATES.glob("*.jinja"))}
    if name_or_path in built_in:
        return built_in[name_or_path]
    file = expanded(name_or_path)
    if not file.is_file():
        if file.suffix or len(file.parts) > 1:
            raise UserError(f"No such chat template file: '{name_or_path}'. Built in: {', '.join(built_in)}.")
        choose("model.chat_template", name_or_path, built_in)
    return file


def own_template(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """The tokenizer's template; of several named ones the default, or with `tools` the one for tools.

    Raises:
        UserError: if it has none.
    """
    try:
        return str(tokenizer.get_chat_template(tools=list(tools) or None))
    except ValueError:
        raise UserError(NO_TEMPLATE) from None


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the BOS token before plain text."""
    return bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@contextmanager
def _template_errors(place: str) -> Iterator[None]:
    """Turn what a template raises into a UserError that names the place."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: the chat template fails: {error}") from error


TODAY = "strftime_now"  # the function by which chat templates write the date

_CALL = re.compile(rf"{TODAY}\(\s*(['\"])(.*?)\1\s*\)")


def fix_date(template: str, day: date) -> str:
    """A chat template that writes a day in the place of today.

    Raises:
        UserError: if it does not call the function with a text, so that what it writes cannot be known.
    """
    fixed = _CALL.sub(lambda call: repr(datetime.combine(day, time()).strftime(call[2])), template)
    if f"{TODAY}(" in fixed:
        raise UserError(
            f"The chat template writes the date by {TODAY} in a format that is no text, so it cannot be held to one "
            f"day: {OTHER_TEMPLATE}."
        )
    return fixed


def apply_template(turns: Sequence[Turn], place: str, tokenizer: Any, **options: Any) -> str:
    """Render turns as text, with `options` for `apply_chat_template`; UserError at `place` if the template fails."""
    with _template_errors(place):
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))


@dataclass(frozen=True)
class Template:
    """What a chat template does, as seen on one chat.

    Attributes:
        marked: the template with a character, START and END, in the place of each `{% generation %}` mark; None if it
            has no marks.
        header: what stands before an answer and is no generation prompt, because the template has none.
        end: what ends an answer: the text after it up to and including the first special token, or the EOS token if it
            follows that one directly, wherever the answer stands.
        tail: all that it writes after the last answer.
        end_token: the special token with which `end` ends, and its id; None if there is none.
        tokens: the added tokens of the tokenizer that it writes around these turns, the special ones that it can
            write around others, and the EOS token, with whether each is a special one.
    """

    marked: str | None
    header: str
    end: str
    tail: str
    end_token: tuple[str, int] | None
    tokens: Mapping[str, bool]


START, END = "\U0010fff0", "\U0010fff1"  # private characters in the place of {% generation %} marks


def examine(turns: Sequence[Turn], place: str, tokenizer: Any, options: Mapping[str, Any]) -> Template:
    """Find out what the template does, on a chat with another last answer; UserError if it omits or never ends it."""
    probe = [*turns[:-1], {"role": "assistant", "content": PROBE}]
    text = apply_template(probe, place, tokenizer, **options)
    before, answer_found, tail = text.rpartition(PROBE)
    if not answer_found:
        raise UserError(f"The chat template leaves out the assistant's turns (is it for images?): {OTHER_TEMPLATE}.")
    if not tail:
        raise UserError(
            "The chat template writes nothing after an answer, so the model would not learn to stop: let it write "
            f"eos_token there, or {OTHER_TEMPLATE}."
        )
    history, prompt = (
        apply_template(probe[:-1], place, tokenizer, add_generation_prompt=wanted, **options)
        for wanted in (False, True)
    )
    header = before[len(history) :] if prompt == history and before.startswith(history) else ""
    header = REASONING_TAG.split(header)[0]
    special = first_special(tail, tokenizer)
    end = tail[: special[1]] if special else tail.rstrip() or tail
    end_token = (tail[special[0] : special[1]], special[2]) if special else None
    if special and tokenizer.eos_token and tail.startswith(tokenizer.eos_token, special[1]):
        longer, more = end + tokenizer.eos_token, [{"role": "user", "content": QUESTION}, probe[-1]]
        if apply_template([*probe, *more], place, tokenizer, **options).partition(PROBE)[2].startswith(longer):
            end, end_token = longer, (tokenizer.eos_token, tokenizer.eos_token_id)
    source = own_template(tokenizer, options.get("tools", ()))
    return Template(
        marked=MARKS.sub(_visible_mark, source) if MARKS.search(source) else None,
        header=header if header.strip() else "",
        end=end,
        tail=tail,
        end_token=end_token,
        tokens=_tokens(source, turns, place, tokenizer, options),
    )


def _tokens(
    source: str, turns: Sequence[Turn], place: str, tokenizer: Any, options: Mapping[str, Any]
) -> dict[str, bool]:
    """See `Template.tokens`. The BOS token at the start of a chat is none of them."""
    plain = [*({**turn, "content": QUESTION} for turn in turns[:-1]), {"role": "assistant", "content": PROBE}]
    written = apply_template(plain, place, tokenizer, **without_tools(options)).removeprefix(tokenizer.bos_token or "")
    of_others = source.replace(tokenizer.bos_token or "\0", "")
    for chat in (WITH_SYSTEM, *WITH_CALL):  # names of tokens may be joined out of parts, as '<|' + role + '|>'
        with suppress(UserError):  # the template has no such turns
            text = apply_template(chat, place, tokenizer, **without_tools(options))
            of_others += "\n" + text.removeprefix(tokenizer.bos_token or "")
    added = {str(token): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return {
        token: special
        for token, special in added.items()
        if token.strip() and (token in written or (special and token in of_others) or token == tokenizer.eos_token)
    }


def without_tools(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "tools"}


def _visible_mark(mark: re.Match[str]) -> str:
    """A character in the place of a mark. The block around it keeps the mark's effect on the white space beside it."""
    opening = "{%-" if mark[0].startswith("{%-") else "{%"
    closing = "-%}" if mark[0].endswith("-%}") else "%}"
    return f"{opening} if true %}}{{{{ '{END if mark[1] else START}' }}}}{{% endif {closing}"


def first_special(text: str, tokenizer: Any) -> tuple[int, int, int] | None:
    """Start, end and id of the first special token in a text; of two at one place the longer one."""
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    at = {text.find(token): token for token in sorted(special, key=len) if token and token in text}
    if not at:
        return None
    start = min(at)
    return start, start + len(at[start]), special[at[start]]


def answer_end(tokenizer: Any) -> tuple[str, int] | None:
    """The special token that ends an answer, and its id; None if text ends it."""
    chat = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": PROBE}]
    return examine(chat, "the chat template", tokenizer, {}).end_token


def reasoning_key(turns: Sequence[Turn], place: str, tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """The name under which the template reads the reasoning of an answer; None if it does not."""
    for key in REASONING_KEYS:
        probe = [*turns[:-1], {"role": "assistant", "content": PROBE, key: "A thought to look for."}]
        if "A thought to look for." in apply_template(probe, place, tokenizer, **options):
            return key
    return None


def arguments_form(turns: Sequence[Turn], place: str, tokenizer: Any, options: Mapping[str, Any]) -> str:
    """Whether the template writes a call's arguments as JSON from an "object" or from its text, a "string".

    Raises:
        UserError: if it writes no calls.
    """
    reasons = []
    for form, arguments in ARGUMENTS.items():
        probe = [*turns[:-1], {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}]
        try:
            text = apply_template(probe, place, tokenizer, **options)
        except UserError as error:
            reasons.append(str(error))
            continue
        if "a_function" not in text or "a value" not in text:
            reasons.append(f"{place}: the chat template leaves out 'tool_calls'")
        elif "{'key'" not in text and '\\"key' not in text:
            return form
    raise UserError(
        f"{reasons[0] if reasons else f'{place}: the chat template does not write calls as JSON'}. The row has "
        f"'tool_calls': {OTHER_TEMPLATE}."
    )
