"""What a set of rows is trained as: counts of rows and tokens, lengths, and where answers begin and end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hft_cli.data.bad_rows import listing
from hft_cli.data.sources import Part

PERCENTILES = (5, 50, 95, 100)

COMMON = 5  # tokens that are named

BAD = "bad"  # why a row is dropped: see data/bad_rows.py

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Summary:
    """Facts of the rows of a phase.

    Attributes:
        rows: rows that were read, without those of `dropped` that were left out before they were tokenized.
        dropped: reason -> number of rows that are not trained on.
        cut: rows whose prompt lost tokens at its start.
        truncated: rows that lost tokens at their end.
        tokens: tokens of the rows that are trained on; of a pair the prompt counts twice.
        trained_tokens: tokens with a loss.
        lengths: percentile -> tokens of a row that is trained on; of a pair the longer side.
        first, last: the most common first and last tokens of what has a loss, each with its number.
        unused: columns and fields of turns that are not empty and not used -> number of rows or turns.
        shapes: shape of rows -> number of rows.
        notices: what was read in another form than it is written -> number of values.
        bad: place and reason of the rows that data.bad_rows=skip leaves out.
        parts: what was taken of each set.
    """

    rows: int
    dropped: dict[str, int]
    cut: int
    truncated: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]
    first: list[tuple[str, int]]
    last: list[tuple[str, int]]
    unused: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    notices: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    @property
    def used(self) -> int:
        """Rows that are trained on."""
        return self.rows - sum(self.dropped.values())

    @property
    def held_out(self) -> int:
        """Rows that are split off for validation."""
        return sum(part.held_out for part in self.parts)

    @property
    def repeats(self) -> int:
        """Rows that data.deduplicate leaves out."""
        return sum(part.repeats for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """The summary as it stands in a run's directory."""
        return {**asdict(self), "used": self.used, "line": self.line()}

    def line(self) -> str:
        """The summary in one line."""
        left_out = sum(self.dropped.values())
        of_sets = f" ({', '.join(f'{part.taken:,} of {part.path}' for part in self.parts)})"
        parts = [
            f"{self.used:,} rows" + of_sets * (len(self.parts) > 1) + (f" ({left_out:,} dropped)" if left_out else ""),
            f"{self.tokens:,} tokens",
            f"{self.trained_tokens / max(self.tokens, 1):.0%} with a loss",
            f"answers begin with {_quoted(self.first[:2])}",
            f"end with {_quoted(self.last[:2])}",
        ]
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        notices = "".join(f"; {count:,} {notice}" for notice, count in self.notices.items())
        notices += f"; {self.held_out:,} more held out for validation" if self.held_out else ""
        notices += f"; {self.repeats:,} repeats left out" if self.repeats else ""
        return ", ".join(parts) + unused + notices

    def text(self) -> str:
        """The summary in several lines."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count)
        lengths = ", ".join(f"{'max' if name == '100' else name + '%'} {size:,}" for name, size in self.lengths.items())
        lines = {
            "rows": f"{self.rows:,} read, {self.used:,} trained on",
            "sets": "; ".join(part.text() for part in self.parts) * (len(self.parts) > 1 or self.repeats > 0),
            "shapes": ", ".join(f"{name} {count:,}" for name, count in self.shapes.items()),
            "dropped": dropped,
            "shortened": f"{self.cut:,} at the prompt, {self.truncated:,} at the end" * bool(self.cut + self.truncated),
            "length": f"{lengths} tokens",
            "tokens": f"{self.tokens:,}, with a loss {self.trained_tokens:,} "
            f"({self.trained_tokens / max(self.tokens, 1):.1%})",
            "first": _counted(self.first),
            "last": _counted(self.last),
            "not used": ", ".join(f"{name} ({count:,})" for name, count in self.unused.items()),
        }
        lines |= {"held out": f"{self.held_out:,} more for validation" if self.held_out else ""}
        lines |= {"read": ", ".join(f"{count:,} {notice}" for notice, count in self.notices.items())}
        facts = "\n".join(f"{name + ':':<11}{text}" for name, text in lines.items() if text)
        return f"{facts}\nbad rows, which are left out:\n{listing(self.bad)}" if self.bad else facts


def _quoted(tokens: Sequence[tuple[str, int]]) -> str:
    return ", ".join(visible(text) for text, _ in tokens) or "nothing"


def _counted(tokens: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{visible(text)} {count:,}" for text, count in tokens)


def visible(text: str) -> str:
    """A token between quotes, with its newlines and tabs written out."""
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"'{escaped}'"


def trained_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each run of tokens that have a loss and follow each other."""
    runs: list[tuple[int, int]] = []
    for index, label in enumerate(labels):
        if label == IGNORED:
            continue
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def lengths_of(sizes: Any) -> dict[str, int]:
    """The percentiles of the numbers in an array."""
    import numpy as np

    return {str(percent): int(np.percentile(sizes, percent, method="nearest")) for percent in PERCENTILES}


def ends_of_answers(columns: Any, tokenizer: Any) -> dict[str, Any]:
    """`first` and `last` of a summary, from Arrow columns of these names with lists of token ids."""
    return {name: _most_common(columns.column(name), tokenizer) for name in ("first", "last")}


def _most_common(column: Any, tokenizer: Any) -> list[tuple[str, int]]:
    """The most common of the token ids in an Arrow column of lists, as text."""
    import numpy as np

    values, counts = np.unique(column.combine_chunks().flatten().to_numpy(), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:COMMON]
    return [(tokenizer.decode([int(values[index])]), int(counts[index])) for index in order]


def facts_of_rows(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`unused`, `shapes`, `notices` and `bad` of the sets that rows were read from, added up."""
    names = ("unused", "shapes", "notices")
    totals: dict[str, Counter[str]] = {name: Counter() for name in names}
    bad: list[tuple[str, str]] = []
    for each in facts:
        bad += [(place, reason) for place, reason in each.get("bad", ())]
        for name in names:
            totals[name].update(each.get(name, {}))
    return {**{name: dict(total) for name, total in totals.items()}, "bad": bad}


def count_bad(facts: Iterable[Mapping[str, Any]]) -> int:
    """The number of bad rows in sets."""
    return sum(len(each.get("bad", ())) for each in facts)


def nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts that are not 0."""
    return {name: count for name, count in counts.items() if count}
