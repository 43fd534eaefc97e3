"""Rows as they are trained on, for people and programs to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hft_cli.data.pairs import PairRow
from hft_cli.data.preferences import ANSWERS
from hft_cli.data.summary import IGNORED, trained_runs
from hft_cli.data.tokenization import FILLED, TokenRow

PLAIN = {"trained": ("⟦", "⟧"), "special": ("", "")}  # what stands around a part without colours

COLOURS = {"trained": ("\033[30;42m", "\033[0m"), "special": ("\033[1;35m", "\033[0m")}


@dataclass(frozen=True)
class Part:
    """Tokens that follow each other and are alike: all or none have a loss; a special token is a part of its own."""

    text: str
    ids: list[int]
    trained: bool
    special: bool


@dataclass(frozen=True)
class Side:
    """A sequence of tokens that is trained on.

    Attributes:
        text: of the whole row, before it is cut or truncated.
        ids, tokens: the tokens, as numbers and as the vocabulary writes them.
        trained: 1 for each token that has a loss, 0 for the others.
        trained_text: the text of each run of tokens with a loss.
        parts: the tokens as text.
    """

    text: str
    ids: list[int]
    tokens: list[str]
    trained: list[int]
    trained_text: list[str]
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """All but the parts."""
        return {key: value for key, value in vars(self).items() if key != "parts"}


@dataclass(frozen=True)
class ShownRow:
    """A row with its number, from 1, and its place in a file; of a pair both sides.

    `dropped` is why it is not trained on, or None.
    """

    row: int
    place: str
    sides: dict[str, Side]
    dropped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as one object: of a chat its keys stand beside `row`."""
        sides = {name: side.to_json() for name, side in self.sides.items()}
        dropped = {"dropped": self.dropped} if self.dropped else {}
        return {"row": self.row, "place": self.place, **dropped, **(sides.pop("", {})), **sides}

    def lines(self, colours: bool) -> Iterator[str]:
        """The row for a terminal: a line of facts, then the text of each side."""
        if not self.sides:
            yield f"── row {self.row} · {self.place} · not trained on: {self.dropped}\n"
        for name, side in self.sides.items():
            facts = [f"row {self.row}", *([name] if name else []), self.place, f"{len(side.ids):,} tokens"]
            facts.append(f"not trained on: {self.dropped}" if self.dropped else f"{sum(side.trained):,} with a loss")
            yield f"── {' · '.join(facts)}"
            yield "".join(_shown(part, COLOURS if colours else PLAIN) for part in side.parts)
            yield ""


def show_chat(row: TokenRow, number: int, place: str, max_length: int, tokenizer: Any) -> ShownRow:
    """A row of SFT."""
    side = _side(row.text, row.ids, row.labels, tokenizer)
    return ShownRow(number, place, {"": side}, FILLED if row.answer_start >= max_length else None)


def show_pair(pair: PairRow, number: int, place: str, tokenizer: Any) -> ShownRow:
    """A row of DPO."""
    sides = {}
    for name, text, answer in zip(ANSWERS, pair.texts, pair.answers, strict=True):
        labels = [IGNORED] * len(pair.prompt) + list(answer)
        sides[name] = _side(text, [*pair.prompt, *answer], labels, tokenizer)
    return ShownRow(number, place, sides, pair.left_out)


def _side(text: str, ids: list[int], labels: list[int], tokenizer: Any) -> Side:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Side(
        text=text,
        ids=ids,
        tokens=tokenizer.convert_ids_to_tokens(ids),
        trained=[int(label != IGNORED) for label in labels],
        trained_text=[_decoded(labels[start:end], tokenizer) for start, end in trained_runs(labels)],
        parts=tuple(_parts(ids, labels, special, tokenizer)),
    )


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _parts(ids: list[int], labels: list[int], special: set[int], tokenizer: Any) -> Iterator[Part]:
    start = 0
    for index in range(1, len(ids) + 1):
        if index < len(ids):
            alike = (labels[index] == IGNORED) == (labels[start] == IGNORED)
            if alike and ids[index] not in special and ids[start] not in special:
                continue
        some = ids[start:index]
        yield Part(_decoded(some, tokenizer), some, labels[start] != IGNORED, ids[start] in special)
        start = index


def _shown(part: Part, marks: dict[str, tuple[str, str]]) -> str:
    before, after = marks["trained"] if part.trained else marks["special"] if part.special else ("", "")
    return "\n".join(f"{before}{line}{after}" if line else "" for line in _lines(part.text))


def _lines(text: str) -> list[str]:
    """The lines of a text, each with a visible sign where it ends."""
    *lines, last = text.split("\n")
    return [*(f"{line}⏎" for line in lines), last]
