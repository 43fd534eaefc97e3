"""The texts of a chat, found in its rendered text by private characters around them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.chats import Chat, Turn
from hft_cli.data.templates import REASONING_TAG
from hft_cli.errors import UserError

Span = tuple[int, int]  # start and end in characters of the rendered text

FIRST_MARK, LAST_MARK = 0xF0000, 0x10FF00  # private characters that mark the text of turns


@dataclass(frozen=True)
class Piece:
    """A text of a row that must be found in the rendered one.

    Attributes:
        turn: index of its turn; -1 of a tool.
        kind: "content", "reasoning", "prefill", "call" or "tool".
        text: without white space around it.
        spans: where it is.
    """

    turn: int
    kind: str
    text: str
    spans: tuple[Span, ...] = ()


def first_mark_of(turns: Sequence[Turn], place: str) -> int:
    """The first of the characters that mark pieces. None of them is in the turns."""
    contents = [text for turn in turns for text in turn.values() if isinstance(text, str) and not text.isascii()]
    highest = max((ord(max(text)) for text in contents), default=0)
    if highest >= LAST_MARK - 2 * 4 * len(turns):
        raise UserError(f"{place}: a turn holds the private character U+{highest:X}, which hft needs for itself.")
    return max(FIRST_MARK, highest + 1)


class _Marker:
    """Puts two private characters around each text, and collects the texts."""

    def __init__(self, first_mark: int) -> None:
        self.first_mark = first_mark
        self.pieces: list[Piece] = []

    def __call__(self, text: str, turn: int, kind: str, prefill: int = 0) -> str:
        parts, position = [], 0
        for start, end in _cores(text, prefill):
            mark = self.first_mark + 2 * len(self.pieces)
            self.pieces.append(Piece(turn, "prefill" if end <= prefill else kind, text[start:end]))
            parts += [text[position:start], chr(mark), text[start:end], chr(mark + 1)]
            position = end
        return "".join([*parts, text[position:]])

    def turn(self, turn: Turn, index: int, prefill: int) -> Turn:
        """A turn with marks around its content, its reasoning and the functions that it calls."""
        fields = dict(turn)
        for key in turn:
            if key == "content":
                fields[key] = self(turn[key], index, "content", prefill)
            elif key == "tool_calls":
                fields[key] = copy.deepcopy(turn[key])
                for call in fields[key]:
                    call["function"]["name"] = self(call["function"]["name"], index, "call")
            elif key not in ("role", "name", "tool_call_id"):
                fields[key] = self(turn[key], index, "reasoning")
        return fields


def mark_pieces(
    turns: Sequence[Turn], chat: Chat, first_mark: int, roles: Sequence[str] | None
) -> tuple[list[Turn], list[Any], list[Piece]]:
    """Turns and tools with marks around their texts, and those texts; of the given roles alone, if there are any."""
    marker = _Marker(first_mark)
    marked_turns: list[Turn] = []
    for index, turn in enumerate(turns):
        if roles is not None and turn["role"] not in roles:
            marked_turns.append(turn)
        else:
            marked_turns.append(marker.turn(turn, index, chat.prefill if index == chat.prompt_turns else 0))
    tools = copy.deepcopy(list(chat.tools))
    for tool in tools:
        if name := tool_name(tool):
            _function(tool)["name"] = marker(name, -1, "tool")
    return marked_turns, tools, marker.pieces


def _cores(text: str, prefill: int) -> Iterator[Span]:
    """The parts of a text between tags of reasoning, without the white space around them, and cut at `prefill`."""
    edges = [0, *(edge for tag in REASONING_TAG.finditer(text) for edge in tag.span()), len(text)]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        for left, right in ((start, prefill), (prefill, end)) if start < prefill < end else ((start, end),):
            core = text[left:right]
            if right != prefill or not prefill:
                core = core.rstrip()
            begin = left if left == prefill and prefill else right - len(text[left:right].lstrip())
            if text[left:right].strip():
                yield begin, left + len(core)


def rest_of(content: str) -> str:
    """What stands after the last text of a content: white space and tags of reasoning."""
    return content[max((end for _, end in _cores(content, 0)), default=0) :]


def take_out_marks(text: str, first_mark: int, count: int) -> tuple[str, list[tuple[Span, ...]]]:
    """The text without marks, and between which characters of it each of `count` pieces stands."""
    starts: list[list[int]] = [[] for _ in range(count)]
    ends: list[list[int]] = [[] for _ in range(count)]
    if not count:
        return text, []
    parts, position, length = [], 0, 0
    for mark in re.finditer(f"[{chr(first_mark)}-{chr(first_mark + 2 * count - 1)}]", text):
        parts.append(text[position : mark.start()])
        length += mark.start() - position
        position = mark.end()
        number, is_end = divmod(ord(mark[0]) - first_mark, 2)
        (ends if is_end else starts)[number].append(length)
    spans = [
        tuple(zip(piece_starts, piece_ends, strict=True)) if len(piece_starts) == len(piece_ends) else ()
        for piece_starts, piece_ends in zip(starts, ends, strict=True)
    ]
    return "".join([*parts, text[position:]]), spans


def search_pieces(turns: Sequence[Turn], text: str) -> list[Piece]:
    """The turns that are not the assistant's, where they are found in the text one after the other."""
    pieces, position = [], 0
    for index, turn in enumerate(turns):
        core = turn["content"].strip()
        if turn["role"] == "assistant" or not core:
            continue
        start = text.find(core, position)
        pieces.append(Piece(index, "content", core, ((start, start + len(core)),) if start >= 0 else ()))
        position = max(position, start + len(core))
    return pieces


def shown(text: str) -> str:
    """A text in one line of an error."""
    return text.replace("\n", "\\n")


def leaves(value: Any) -> Iterator[str]:
    """The texts in lists and objects, such as the arguments of a call."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value


def _function(tool: Any) -> Any:
    function = tool.get("function")
    return function if isinstance(function, dict) else tool


def tool_name(tool: Any) -> str:
    name = _function(tool).get("name")
    return name if isinstance(name, str) else ""
