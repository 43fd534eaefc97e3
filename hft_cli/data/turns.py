"""Turns as data sets write them -> turns as chat templates read them. Standard library only.

Every field of a turn is either read, refused by name, or counted as unused.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hft_cli.data.bad_rows import BadRows
from hft_cli.data.chats import Turn
from hft_cli.data.files import BadValueError, json_type, parse_json, without_nulls
from hft_cli.errors import UserError, choose

# The names that data sets give to the roles, in lower case.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "chatgpt", "bard", "claude", "ai", "answer", "output"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}

# Our names of columns and of fields of turns, for which `data.columns` has the data set's.
COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "question", "response"),
    *("answer", "text", "chosen", "rejected", "score_chosen", "score_rejected", "system", "history", "tools"),
    *("chat_template_kwargs", "role", "content", "from", "value", "weight", "train", "loss", "mask"),
    *("reasoning_content", "tool_calls", "function_call", "tool_call_id", "name"),
)

ROLE_KEYS = ("role", "from")

CONTENT_KEYS = ("content", "value")

LOSS_KEYS = ("weight", "train", "loss", "mask")  # 0 or false: the turn has no loss

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

MEDIA = ("images", "image", "videos", "video", "audios", "audio")

DIALOGUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")  # as in hh-rlhf


@dataclass(frozen=True)
class Names:
    """What a data set calls things, and what is bad in it, not used, or not read as it is written.

    Attributes:
        columns: our name -> the data set's, of columns and of fields of turns (`data.columns`).
        roles: the data set's name of a role -> ours (`data.roles`), besides ROLES.
        unused: counts of fields that are not empty and not used, by their name.
        found: the names of `columns` that a row or a turn had.
        notices: counts of values that were read in another form, by what was done.
        bad_rows: "stop", or "skip" to leave bad rows out.
        bad: the bad rows.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    found: set[str] = field(default_factory=set)
    notices: Counter[str] = field(default_factory=Counter)
    bad_rows: str = "stop"
    bad: BadRows = field(default_factory=BadRows)

    def facts(self) -> dict[str, Any]:
        """What was seen in the rows, as JSON."""
        return {"bad": self.bad.rows, "unused": self.unused, "notices": self.notices}

    def renamed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row or a turn by our names. A field that another one replaces counts as unused."""
        renamed = dict(fields)
        for ours, theirs in self.columns.items():
            if theirs in fields:
                self.found.add(theirs)
                if ours in renamed and ours != theirs and ours not in self.columns.values():
                    self.unused[ours] += 1
                if theirs not in self.columns:
                    renamed.pop(theirs, None)
                renamed[ours] = fields[theirs]
        return renamed

    def __post_init__(self) -> None:
        for ours in self.columns:
            choose("key of data.columns:", ours, COLUMNS)
        for theirs, ours in self.roles.items():
            choose(f"role in data.roles for {theirs}:", ours, sorted(set(ROLES.values())))

    def role(self, said: str, place: str) -> str:
        """Our name of a role: "system", "user", "assistant", "tool", or "function_call" for a turn that is a call.

        Raises:
            UserError: for a name that is not known.
        """
        roles = {**ROLES, **self.roles}
        if said in roles:
            return roles[said]
        try:
            return roles[choose(f"role in {place}:", said.lower(), roles)]
        except UserError as error:
            raise UserError(f"{error} Another name: data.roles.{said}=user|assistant|system|tool.") from None

    def number_text(self, value: float, column: str) -> str:
        """A number as text: 5.0, as tables write 5 in a column with a gap, is 5, and float32's 0.1 is 0.1.

        Raises:
            UserError: if it is not finite.
        """
        if isinstance(value, int):
            return str(value)
        if not math.isfinite(value):
            raise UserError(f"'{column}' is {value}, not a number or a text.")
        if value.is_integer():
            self.notices[f"whole numbers in '{column}' read without .0"] += 1
            return str(int(value))
        short = _float32_text(value)
        if len(short) + 4 < len(repr(value)):
            self.notices[f"float32 numbers in '{column}' read with the digits that they have"] += 1
            return short
        return repr(value)

    def check_columns(self) -> None:
        """UserError for a name in `columns` that nothing had."""
        for ours, theirs in self.columns.items():
            if theirs not in self.found:
                raise UserError(f"data.columns.{ours}={theirs}: no row and no turn has '{theirs}'.")


def _float32_text(value: float) -> str:
    """The shortest text of the float32 that a number is; of a number that is none, its own."""
    single = struct.unpack("f", struct.pack("f", value))[0] if abs(value) < 3e38 else None
    if single != value:
        return repr(value)
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if struct.unpack("f", struct.pack("f", float(text)))[0] == value)


@dataclass
class Turns:
    """The turns of a row, and the indices of those without a loss."""

    turns: list[Turn] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)

    def __add__(self, other: Turns) -> Turns:
        start = len(self.turns)
        return Turns(self.turns + other.turns, self.masked + [start + index for index in other.masked])


def text_turn(role: str, text: str) -> Turns:
    """A single turn."""
    return Turns([{"role": role, "content": text}])


def turns_or_text(value: Any, column: str, role: str, names: Names) -> Turns:
    """A list of turns, one turn, or a text or a number as one turn of `role`.

    A prompt that ends with "Assistant:" is a dialogue, as in hh-rlhf; others may quote one.

    Raises:
        UserError: for anything else, with the column.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = names.number_text(value, column)
    if isinstance(value, str):
        turns = dialogue(value) if role == "user" else None
        if turns is not None and not value.rstrip().endswith("Assistant:"):
            names.notices[f"'{column}' that quotes 'Human:' and 'Assistant:' read as one turn"] += 1
            turns = None
        return turns or text_turn(role, value)
    if isinstance(value, dict):
        value = [value]
    return read_turns(value, column, names)


def dialogue(text: str) -> Turns | None:
    """The turns of a text that writes "Human:" and "Assistant:" before each; None for another text."""
    marks = list(DIALOGUE.finditer(text))
    if not marks or text[: marks[0].start()].strip() or marks[0][1] != "Human" or len(marks) < 2:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": ROLES[mark[1].lower()], "content": text[mark.end() : end]}
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # a prompt that ends with "Assistant:"
    return Turns(turns)


def read_turns(value: Any, column: str, names: Names) -> Turns:
    """A list of turns, or its text as JSON.

    Raises:
        UserError: if it is no list of turns, or a turn holds something that is not known or cannot be trained on.
    """
    if isinstance(value, str):
        value = json_or_text(value, f"'{column}'")
    if not isinstance(value, list) or not value:
        raise UserError(f"'{column}' is {'empty' if value == [] else json_type(value)}, not a list of turns.")
    read = Turns()
    for number, turn in enumerate(value, 1):
        place = f"turn {number} of '{column}'"
        if not isinstance(turn, dict):
            raise UserError(f"{place} is {json_type(turn)}, not an object.")
        fields, has_loss = _turn(names.renamed(turn), place, names)
        read.turns.append(fields)
        if not has_loss:
            read.masked.append(number - 1)
    return read


def json_or_text(text: str, what: str) -> Any:
    """The value of a text that is a JSON list or object; any other text as it is.

    Raises:
        UserError: if it is JSON but for NaN, Infinity or a key that comes twice; `what` names the text.
    """
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return parse_json(text)
        except BadValueError as error:
            raise UserError(f"the JSON text of {what}: {error}") from None
        except (ValueError, RecursionError):
            return text
    return text


def _turn(fields: dict[str, Any], place: str, names: Names) -> tuple[Turn, bool]:
    """A turn as chat templates read it, and whether it has a loss as far as the row says."""
    fields = {key: value for key, value in fields.items() if value is not None} | {
        key: None for key in CONTENT_KEYS if fields.get(key, "") is None
    }
    role_key, content_key = (_first_key(fields, keys, place) for keys in (ROLE_KEYS, CONTENT_KEYS))
    said = fields.pop(role_key)
    if not isinstance(said, str):
        raise UserError(f"'{role_key}' in {place} is {json_type(said)}, not a string.")
    role = names.role(said, place)
    turn: Turn = {"role": "assistant" if role == "function_call" else role}
    calls = _tool_calls(fields, place, names)
    reasoning = [fields.pop(key) for key in REASONING_KEYS if _is_filled(fields.get(key))]
    reasoning = [value for value in reasoning if not (isinstance(value, str) and not value.strip())]
    content = fields.pop(content_key, None)
    if role == "function_call":
        calls, content = _calls_in(content, place, names), ""
    if content is None and calls:
        content = ""
    name = f"'{content_key}' in {place}"
    turn["content"], thoughts = _content(content, name)
    reasoning += [thoughts] if thoughts else []
    if reasoning:
        turn["reasoning_content"] = _reasoning(reasoning, turn["role"], place)
    if calls:
        if turn["role"] != "assistant":
            raise UserError(f"{place} is the {turn['role']}'s and has 'tool_calls', which only the assistant makes.")
        turn["tool_calls"] = calls
    has_loss = _has_loss(fields, turn["role"], place)
    refuse_media(fields, place)
    for key in ("name", "tool_call_id"):
        if turn["role"] == "tool" and isinstance(fields.get(key), str):
            turn[key] = fields.pop(key)
    names.unused.update(f"{key} (of turns)" for key, value in fields.items() if _is_filled(value))
    return turn, has_loss


def _first_key(fields: Mapping[str, Any], keys: Sequence[str], place: str) -> str:
    for key in keys:
        if key in fields:
            return key
    if keys is CONTENT_KEYS and any(fields.get(key) for key in ("tool_calls", "function_call")):
        return keys[0]
    raise UserError(f"{place} has no '{keys[0]}' (keys found: {', '.join(fields)}).")


def _content(value: Any, name: str) -> tuple[str, str]:
    """The text of a content, and the reasoning in it: a string, or OpenAI's list of parts."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise UserError(f"{name} is {json_type(value)}, not a string.")
        return value, ""
    text, reasoning = [], []
    for part in value:
        if isinstance(part, str):
            text.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            reasoning.append(part[kind])
        else:
            raise UserError(f"{name} has a part of type {kind!r}; only parts of text (type, text) can be trained on.")
    return "".join(text), "".join(reasoning)


def _reasoning(values: list[Any], role: str, place: str) -> str:
    if role != "assistant":
        raise UserError(f"{place} is the {role}'s and has reasoning, which only the assistant has.")
    texts = set(values) if all(isinstance(value, str) for value in values) else set()
    if len(texts) != 1:
        raise UserError(f"the reasoning of {place} is not one string.")
    return str(texts.pop())


def _has_loss(fields: dict[str, Any], role: str, place: str) -> bool:
    """Take the fields that say whether a turn has a loss out of `fields`, and return what they say."""
    said = {key: fields.pop(key) for key in LOSS_KEYS if key in fields}
    for key, value in said.items():
        if value not in (0, 1):
            raise UserError(f"'{key}' of {place} is {value!r}: a turn has a loss (1, true) or none (0, false).")
        if value and role != "assistant":
            raise UserError(
                f"'{key}' of {place} gives a loss to the {role}'s turn. Only the assistant's turns have one; "
                "data.loss=all trains on every token."
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise UserError(f"{place} has {' and '.join(said)}, which contradict each other.")
    return all(said.values()) or role != "assistant"


def refuse_media(fields: Mapping[str, Any], place: str) -> None:
    """UserError for images, audio or video: the models are of text."""
    for key in MEDIA:
        if _is_filled(fields.get(key)):
            raise UserError(f"{place} has '{key}', and hft trains on text only. Take such rows out of the file.")


def _is_filled(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


# ------------------------------------------------------------------------------------------------------------- tools


def _tool_calls(fields: dict[str, Any], place: str, names: Names) -> list[dict[str, Any]]:
    """Take the calls out of `fields`: `tool_calls`, or the older `function_call`."""
    calls = fields.pop("tool_calls", None)
    call = fields.pop("function_call", None)
    if isinstance(calls, str):
        calls = json_or_text(calls, f"'tool_calls' of {place}") if calls.strip() else []
    calls = calls or ([call] if call else [])
    if not isinstance(calls, list):
        raise UserError(f"'tool_calls' of {place} is {json_type(calls)}, not a list.")
    return [_tool_call(each, f"'tool_calls' of {place}", names) for each in calls]


def _calls_in(value: Any, place: str, names: Names) -> list[dict[str, Any]]:
    """The calls of a turn whose role is a function call, and whose text is JSON."""
    calls = json_or_text(value, place) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return [_tool_call(each, place, names) for each in calls]


def _tool_call(call: Any, place: str, names: Names) -> dict[str, Any]:
    """A call as OpenAI writes it, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, str) and isinstance(call, dict):
        function = {"name": function, "arguments": call.get("arguments")}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise UserError(f"{place}: a call is an object with a function's 'name' and 'arguments'.")
    arguments: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    if isinstance(arguments, str):
        name = f"the arguments of {function['name']}"
        arguments = json_or_text(arguments.strip() or "{}", f"{name} in {place}")
        if isinstance(arguments, str):
            raise UserError(f"{place}: {name} are not JSON.")
    if not isinstance(arguments, dict):
        raise UserError(f"{place}: the arguments of {function['name']} are {json_type(arguments)}, not an object.")
    arguments = _without_nulls(arguments, "the arguments of calls", names)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _without_nulls(value: Any, what: str, names: Names) -> Any:
    """The value without null fields, which JSON files have that were written from a table."""
    shorter = without_nulls(value, ("default", "const"))  # a JSON schema may say null there
    if shorter != value:
        names.notices[f"null fields in {what} left out"] += 1
    return shorter


def read_tools(value: Any, column: str, names: Names) -> tuple[Any, ...]:
    """The functions that an assistant may call: a list of JSON schemas, or its text.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(value, str):
        value = json_or_text(value, f"'{column}'") if value.strip() else []
    tools = value if isinstance(value, list) else [value]
    tools = [json_or_text(tool, f"'{column}'") if isinstance(tool, str) else tool for tool in tools]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        what = f"a list with {json_type(wrong[0])} in it" if isinstance(value, list) else json_type(value)
        raise UserError(f"'{column}' is {what}, not a list of functions (JSON schemas).")
    return tuple(_without_nulls(tool, f"'{column}'", names) for tool in tools)
