"""Chats as text, with the proof that the text says what the row says and that the answers are where the loss is.

A chat is rendered twice: as it is, and with private characters around the text of each turn. Without these characters
the second text must be the first. Where they stand is where the turns are. For each answer that has a loss, three
things are checked on every row:

- the text of every turn is in the rendered text, unchanged but for white space around it;
- what stands before the answer is what the template writes as the prompt for it, as in generation;
- the answer is followed by what ends an answer.

Further renderings check the prompt and, in templates without marks, that a turn in a chat is written as it is at the
end of one. What was seen between two turns is remembered, so that their number does not grow with that of the turns.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hft_cli.data.chats import Chat, Turn
from hft_cli.data.model_template import SWITCHES
from hft_cli.data.pieces import (
    Piece,
    Span,
    first_mark_of,
    leaves,
    mark_pieces,
    rest_of,
    search_pieces,
    shown,
    take_out_marks,
    tool_name,
)
from hft_cli.data.reasoning import split_reasoning
from hft_cli.data.special_tokens import SPECIAL_TOKENS, literal_spans
from hft_cli.data.templates import (
    END,
    OTHER_TEMPLATE,
    START,
    Template,
    apply_template,
    arguments_form,
    examine,
    own_template,
    reasoning_key,
)
from hft_cli.errors import UserError, choose

REMEMBERED = 10_000  # texts between turns, or kinds of chats: rows may have variables of their own each

EMPTY_REASONING = re.compile(r"<(think|thinking|thought|reasoning)>\s*</\1>|\[THINK\]\s*\[/THINK\]")

_Kind = tuple[str, str, bool]  # of chats that a template treats alike


@dataclass(frozen=True)
class Answer:
    """An assistant's turn in the rendered text.

    Attributes:
        turn: index of the turn.
        start, end: what the model has to generate: from the end of the prompt to the end of what ends the answer.
        spans: the parts of it that have a loss: all, or what the template's `{% generation %}` marks leave of it.
    """

    turn: int
    start: int
    end: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: what is tokenized.
        answers: those that were asked for, in order.
        literal: the spans, in order, of special tokens in the texts of the turns, which are to be read as text.
        end_token: see `Template.end_token`.
    """

    text: str
    answers: tuple[Answer, ...]
    literal: tuple[Span, ...] = ()
    end_token: tuple[str, int] | None = None


class Renderer:
    """Renders chats with the chat template of a tokenizer.

    Args:
        tokenizer: with a `chat_template`; of several named ones that for tools renders the chats with tools.
        special_tokens: what to do with turns that hold special tokens of the template, a value of SPECIAL_TOKENS.
    """

    def __init__(self, tokenizer: Any, special_tokens: str = "refuse") -> None:
        choose("data.special_tokens", special_tokens, SPECIAL_TOKENS)
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        self._templates: dict[_Kind, Template] = {}
        self._reasoning: dict[_Kind, str | None] = {}
        self._arguments: dict[_Kind, str] = {}
        self._seen: dict[tuple[_Kind, str, str], int] = {}

    def template(self, chat: Chat, place: str) -> Template:
        """What the template for this chat does."""
        kind = self._kind(chat)
        if kind not in self._templates:
            _forget(self._templates)
            self._templates[kind] = examine(_plain(chat), place, self.tokenizer, self.options(chat))
        return self._templates[kind]

    def render(self, chat: Chat, place: str, answers: Sequence[int], *, whole: bool = False) -> Rendered:
        """Render a chat, and find the answers in it.

        Args:
            chat: with turns.
            place: the name of the chat in errors.
            answers: indices of the assistant's turns to find.
            whole: whether the reasoning of every turn must be in the text, not only of those in `answers`.

        Raises:
            UserError: if the template fails, leaves something out, or writes an answer in another place or form than
                in generation.
        """
        template = self.template(chat, place)
        turns = self.turns(chat, place)
        text = self._text(turns, chat, place)
        pieces = self._locate(turns, chat, place, text)
        needed = set(chat.answers) if whole else set(answers)
        for piece in pieces:
            _check_piece(piece, text, chat, place, needed)
        self._check_tools(turns, chat, place, text)
        literal = literal_spans(chat, place, text, pieces, template.tokens, self.special_tokens)
        row = _Row(chat, turns, place, text, pieces, template)
        without_text = [index for index in answers if not row.spans(index)]
        if without_text:
            raise UserError(f"{place}: turn {without_text[0] + 1}, the assistant's, has no text but tags of reasoning.")
        if whole:  # the answers are taken out of the loss, however they are written
            found = tuple(self._answer(row, index, True, None, learnt=False) for index in answers)
            return Rendered(text, found, literal)
        marks = self._marks(row) if answers else None
        found = tuple(self._answer(row, index, index == answers[-1], marks) for index in answers)
        return Rendered(text, found, literal, template.end_token)

    def turns(self, chat: Chat, place: str) -> list[Turn]:
        """The turns in the form that the template reads: the name of the reasoning, the form of calls' arguments."""
        if not any("reasoning_content" in turn or "tool_calls" in turn for turn in chat.turns):
            return list(chat.turns)
        return [self._turn(turn, chat, place) for turn in chat.turns]

    def _turn(self, turn: Turn, chat: Chat, place: str) -> Turn:
        kind, options = self._kind(chat), self.options(chat)
        if "reasoning_content" in turn:
            if kind not in self._reasoning:
                _forget(self._reasoning)
                self._reasoning[kind] = reasoning_key(_plain(chat), place, self.tokenizer, options)
            if (key := self._reasoning[kind]) is None:
                raise UserError(
                    f"{place}: the chat template leaves out the reasoning of turn {chat.turns.index(turn) + 1} "
                    f"('reasoning_content'). Write it into the content, or {OTHER_TEMPLATE}."
                )
            turn = {key if name == "reasoning_content" else name: value for name, value in turn.items()}
        if "tool_calls" in turn:
            if kind not in self._arguments:
                _forget(self._arguments)
                self._arguments[kind] = arguments_form(_plain(chat), place, self.tokenizer, options)
            if self._arguments[kind] == "string":
                turn = copy.deepcopy(turn)
                for call in turn["tool_calls"]:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return turn

    def _kind(self, chat: Chat) -> _Kind:
        """What one template does to a chat depends on: its text, the chat's variables, and whether there are tools."""
        variables = json.dumps(chat.options, sort_keys=True)
        return own_template(self.tokenizer, chat.tools), variables, bool(chat.tools)

    def options(self, chat: Chat) -> dict[str, Any]:
        """What `apply_template` needs besides the turns."""
        return {**({"tools": list(chat.tools)} if chat.tools else {}), **chat.options}

    def _text(self, turns: Sequence[Turn], chat: Chat, place: str, **options: Any) -> str:
        return apply_template(turns, place, self.tokenizer, **{**self.options(chat), **options})

    # --------------------------------------------------------------------------------------------- where the turns are

    def _locate(self, turns: list[Turn], chat: Chat, place: str, text: str) -> list[Piece]:
        """The pieces of a chat, with their places in `text`.

        Some templates ask how a turn of the user begins (Qwen 3: with <tool_response>?), so that marks there would
        change what they write. Then only the assistant's turns are marked, and the others are looked for.
        """
        first_mark = first_mark_of(turns, place)
        for roles in (None, ("assistant",)):
            marked, tools, pieces = mark_pieces(turns, chat, first_mark, roles)
            marked_text = self._text(marked, chat, place, **({"tools": tools} if tools else {}))
            clean, spans = take_out_marks(marked_text, first_mark, len(pieces))
            if clean == text:
                found = [replace(piece, spans=places) for piece, places in zip(pieces, spans, strict=True)]
                return found if roles is None else [*found, *search_pieces(turns, text)]
        raise UserError(
            f"{place}: the chat template changes the text of the turns, so the answers cannot be found in it: "
            f"{OTHER_TEMPLATE}."
        )

    def _check_tools(self, turns: list[Turn], chat: Chat, place: str, text: str) -> None:
        """UserError if the template leaves out the row's tools, or arguments of calls."""
        if chat.tools and not all(tool_name(tool) for tool in chat.tools):
            without = apply_template(turns, place, self.tokenizer, **chat.options)
            if without == text:
                raise UserError(f"{place}: the chat template leaves out the row's 'tools': {OTHER_TEMPLATE}.")
        for number, turn in enumerate(chat.turns, 1):
            for call in turn.get("tool_calls", ()):
                for leaf in leaves(call["function"]["arguments"]):
                    forms = (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], repr(leaf)[1:-1])
                    if not any(form in text for form in forms):
                        raise UserError(
                            f"{place}: the chat template leaves out '{shown(leaf)}' of the call in turn {number}: "
                            f"{OTHER_TEMPLATE}."
                        )

    def _marks(self, row: _Row) -> list[Span] | None:
        """The spans between the template's `{% generation %}` marks; None without marks."""
        if row.template.marked is None:
            return None
        marked = self._text(row.turns, row.chat, row.place, chat_template=row.template.marked)
        clean = marked.replace(START, "").replace(END, "")
        parts = re.split(f"([{START}{END}])", marked)
        if clean != row.text or parts[1::2] != [START, END] * (len(parts) // 4):
            raise UserError(
                f"{row.place}: the {{% generation %}} marks of the chat template change what it writes, or are nested: "
                f"{OTHER_TEMPLATE}."
            )
        ends = [0]
        for part in parts[::2]:
            ends.append(ends[-1] + len(part))
        spans = list(zip(ends[1:-1:2], ends[2:-1:2], strict=True))
        for piece in row.pieces:
            for start, end in spans:
                for place in piece.spans:
                    is_inside = start <= place[0] and place[1] <= end
                    if place[0] < end and start < place[1] and not (is_inside and row.is_answer(piece)):
                        raise UserError(
                            f"{row.place}: a {{% generation %}} mark of the chat template cuts through turn "
                            f"{piece.turn + 1} or includes a turn that is not the assistant's: {OTHER_TEMPLATE}."
                        )
        return spans

    # ----------------------------------------------------------------------------------------------------- the answers

    def _answer(self, row: _Row, index: int, is_last: bool, marks: list[Span] | None, learnt: bool = True) -> Answer:
        first, last = row.bounds(index)
        before, after = row.text[row.end_before(first) : first], row.text[last : row.start_after(last)]
        key = (self._kind(row.chat), before, after)
        extra = self._seen.get(key)
        if extra is None or is_last:
            extra = self._prompt_distance(row, index, first)
        start = first - extra
        header = row.template.header
        if header and not row.text.startswith(header, start):
            raise UserError(
                f"{row.place}: the chat template writes '{shown(row.text[start:first])}' before turn {index + 1}, and "
                f"'{shown(header)}' before other answers: {OTHER_TEMPLATE}."
            )
        start = min(start + len(header), first)
        if EMPTY_REASONING.search(before) and _has_reasoning(row.chat.turns[index]):
            raise UserError(
                f"{row.place}: the chat template writes an empty place for reasoning before that of turn {index + 1}: "
                f"{OTHER_TEMPLATE}."
            )
        end = self._end(row, index, last)
        if learnt and marks is None and key not in self._seen and index + 1 < len(row.turns):
            through_turn = self._text(row.turns[: index + 1], row.chat, row.place)
            if through_turn[:end] != row.text[:end]:
                raise UserError(
                    f"{row.place}: the chat template writes turn {index + 1} differently in the whole chat than at its "
                    "end (as templates do that drop earlier reasoning), so the model would learn an answer that it "
                    f"must not give. Put {{% generation %}} marks into the template, {self._fixes(row, index)}."
                )
        if learnt:
            _forget(self._seen)
            self._seen[key] = extra
        if index == row.chat.prompt_turns and row.chat.prefill:
            start = row.after_prefill(index)
        spans = ((start, end),) if marks is None else _within(marks, row.spans(index), start, end)
        return Answer(index, start, end, spans)

    def _fixes(self, row: _Row, index: int) -> str:
        """What to do about an answer that the template writes in another form than in generation."""
        fixes = ["data.loss=all"]
        if index < row.chat.answers[-1]:
            fixes = ["data.loss=each_turn (a row for each answer)", "data.loss=last_turn", *fixes]
        if any(switch in self._kind(row.chat)[0] for switch in SWITCHES):
            fixes = ["model.thinking=true or false (reasoning)", *fixes]
        return f"set {', '.join(fixes)}, or {OTHER_TEMPLATE}"

    def _prompt_distance(self, row: _Row, index: int, first: int) -> int:
        """How many characters the template writes between the prompt for an answer and its text, at `first`."""
        prompt = self._text(row.turns[:index], row.chat, row.place, add_generation_prompt=True)
        if not row.text.startswith(prompt) or len(prompt) > first:
            common = _common(prompt, row.text)
            asked, written = (shown(text[common : common + 30]) for text in (prompt, row.text))
            raise UserError(
                f"{row.place}: the chat template writes the prompt for an answer differently than in the whole chat "
                f"(turn {index + 1}: '{asked}' instead of '{written}'), so the model would be asked in another form "
                f"than it was trained on: {self._fixes(row, index)}."
            )
        return first - len(prompt)

    def _end(self, row: _Row, index: int, last: int) -> int:
        """Where what ends the answer ends. `last` is the end of its last text."""
        end, limit = row.template.end, row.start_after(last)
        if "tool_calls" in row.chat.turns[index]:
            found = row.text.find(end, last, limit) if row.template.end_token else -1
            if found >= 0:
                return found + len(end)
            through_turn = self._text(row.turns[: index + 1], row.chat, row.place)
            length = len(through_turn.rstrip()) or len(through_turn)
            if length > last and through_turn[:length] == row.text[:length]:
                return length
        else:
            rest = rest_of(row.chat.turns[index]["content"])
            for position in range(last + _common(row.text[last : last + len(rest)], rest), last - 1, -1):
                if row.text.startswith(end, position):
                    return position + len(end)
        raise UserError(
            f"{row.place}: the chat template does not write '{shown(end)}' after turn {index + 1} as it does after "
            f"the last answer, so the model would not learn to stop there: {self._fixes(row, index)}."
        )


class _Row:
    """A chat and its text, with the pieces that were found."""

    def __init__(
        self, chat: Chat, turns: list[Turn], place: str, text: str, pieces: Sequence[Piece], template: Template
    ) -> None:
        self.chat, self.turns, self.place, self.text, self.template = chat, turns, place, text, template
        self.pieces = pieces
        self._starts = sorted(start for piece in pieces for start, _ in piece.spans)
        self._ends = sorted(end for piece in pieces for _, end in piece.spans)
        self._by_turn: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._by_turn.setdefault(piece.turn, []).append(piece)

    def is_answer(self, piece: Piece) -> bool:
        return piece.turn >= 0 and self.turns[piece.turn]["role"] == "assistant"

    def spans(self, index: int) -> list[Span]:
        """The places of a turn's pieces, in order."""
        return sorted(span for piece in self._by_turn.get(index, ()) for span in piece.spans)

    def bounds(self, index: int) -> Span:
        """Start and end of a turn's text."""
        spans = self.spans(index)
        return spans[0][0], max(end for _, end in spans)

    def after_prefill(self, index: int) -> int:
        """Where the part of an answer begins that its prompt does not give."""
        ends = [end for piece in self._by_turn[index] if piece.kind == "prefill" for _, end in piece.spans]
        return max(ends, default=self.bounds(index)[0])

    def end_before(self, position: int) -> int:
        """The end of the last piece before a position; 0 if there is none."""
        place = bisect_right(self._ends, position)
        return self._ends[place - 1] if place else 0

    def start_after(self, position: int) -> int:
        """The start of the first piece from a position on; the end of the text if there is none."""
        place = bisect_left(self._starts, position)
        return self._starts[place] if place < len(self._starts) else len(self.text)


def _forget(memory: dict[Any, Any]) -> None:
    """Make room in what is remembered."""
    if len(memory) >= REMEMBERED:
        memory.clear()


def _plain(chat: Chat) -> list[Turn]:
    """A short chat to examine the template on: the first turns of this one, through its first question."""
    users = [index for index, turn in enumerate(chat.turns) if turn["role"] == "user"]
    history = chat.turns[: users[0] + 1] if users else chat.turns[:-1]
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in history]
    return [*turns, {"role": "assistant", "content": "-"}]


def _check_piece(piece: Piece, text: str, chat: Chat, place: str, needed: set[int]) -> None:
    """UserError unless the text of a piece is in the rendered text: of an answer in `needed` exactly once."""
    if piece.turn < 0:
        if not piece.spans:
            raise UserError(f"{place}: the chat template leaves out the row's tool '{piece.text}': {OTHER_TEMPLATE}.")
        return
    role = chat.turns[piece.turn]["role"]
    written = [text[start:end] for start, end in piece.spans]
    if piece.turn in needed:
        good = written == [piece.text]
    elif role == "assistant" and _is_reasoning(piece, chat):
        good = True  # history without its reasoning, as in generation
    else:
        good = any(part in (piece.text, json.dumps(piece.text, ensure_ascii=False)[1:-1]) for part in written)
    if not good:
        what = "leaves out" if not written else "repeats" if piece.text in written else "changes"
        part = "the reasoning of " if _is_reasoning(piece, chat) else ""
        raise UserError(
            f"{place}: the chat template {what} {part}turn {piece.turn + 1}, the {role}'s, so the model would not "
            f"learn what the row says: {OTHER_TEMPLATE}."
        )


def _is_reasoning(piece: Piece, chat: Chat) -> bool:
    """Whether a piece is reasoning: a field of its own, or between tags in the content, where the answer comes last."""
    if piece.kind != "content":
        return piece.kind == "reasoning"
    return not chat.turns[piece.turn]["content"].rstrip().endswith(piece.text)


def _has_reasoning(turn: Turn) -> bool:
    return "reasoning_content" in turn or bool((split_reasoning(turn["content"])[0] or "").strip())


def _within(marks: Sequence[Span], pieces: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """The parts of an answer from `start` to `end` that marks cover; the one with its last text goes on to `end`."""
    spans = []
    for first, last in marks:
        covered = [piece for piece in pieces if first <= piece[0] and piece[1] <= last and piece[1] > start]
        if covered:
            spans.append((max(first, start), end if covered[-1] == pieces[-1] else last))
    return tuple(spans)


def _common(text: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(text), len(other)))
