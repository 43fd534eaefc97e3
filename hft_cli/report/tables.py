"""The parts of a report, before they are Markdown, CSV, JSON or HTML: tables of plain values, figures, sections."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hft_cli.report.stats import Estimate
from hft_cli.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Value = str | float | int | None

Record = Mapping[str, Value]  # the raw values of a row, shares in [0, 1]; what CSV and JSON hold

Column = tuple[str, Callable[[Record], str]]  # head, and a row's cell for people


@dataclass(frozen=True)
class Table:
    """`name` is its files' stem. `paper` marks figures that are the paper's and not of our runs; `data` a table that is
    too long to read, of which a report has the CSV alone.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    records: Sequence[Record]
    paper: bool = False
    data: bool = False

    @property
    def heads(self) -> list[str]:
        return [head for head, _ in self.columns]

    @property
    def body(self) -> list[list[str]]:
        return [[cell(record) for _, cell in self.columns] for record in self.records]

    def markdown(self) -> str:
        return markdown_table(self.heads, self.body)

    def csv(self) -> str:
        """Every raw value; a key that a record lacks is empty."""
        keys = list(dict.fromkeys(key for record in self.records for key in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, keys, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()

    def html(self, most: int) -> str:
        """The first `most` rows."""
        heads = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in self.heads)
        rows = "\n".join(
            "<tr>" + "".join(f"<td{' class=n' if _numeric(cell) else ''}>{html.escape(cell)}</td>" for cell in line)
            + "</tr>"
            for line in self.body[:most]
        )  # fmt: skip
        return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


@dataclass(frozen=True)
class Plot:
    """A figure, drawn only when asked for. `caption` says what is shown and the runs and seeds behind it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    parts: Sequence[Table | Plot] = ()


def _numeric(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "+-−")


def plain(key: str) -> Callable[[Record], str]:
    """The value as it is."""
    return lambda record: "" if record.get(key) is None else str(record[key])


def short(key: str, form: str = "g") -> Callable[[Record], str]:
    """A number in a format of Python's."""

    def cell(record: Record) -> str:
        value = record.get(key)
        return "" if value is None else format(value, form)

    return cell


def percent(key: str) -> Callable[[Record], str]:
    """A share, as 71.3."""
    return lambda record: "" if not isinstance(value := record.get(key), int | float) else f"{100 * value:.1f}"


def chance(key: str) -> Callable[[Record], str]:
    """A p value."""
    return lambda record: "" if not isinstance(p := record.get(key), float) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def spread(key: str, signed: bool = False, scale: float = 100) -> Callable[[Record], str]:
    """An estimate put in by `estimated`: mean ± standard deviation [interval], in percent unless `scale` says."""

    def cell(record: Record) -> str:
        values = [record.get(f"{key}{end}") for end in ("", "_sd", "_low", "_high")]
        mean, sd, low, high = (scale * value if isinstance(value, int | float) else None for value in values)
        if mean is None:
            return ""
        sign = "+" if signed else ""
        text = f"{mean:{sign}.1f}" if sd is None else f"{mean:{sign}.1f} ± {sd:.1f}"
        return text if low is None or high is None else f"{text} [{low:{sign}.1f}, {high:{sign}.1f}]"

    return cell


def interval(key: str, signed: bool = True, scale: float = 100) -> Callable[[Record], str]:
    """An estimate as mean [interval], without the standard deviation."""
    full = spread(key, signed, scale)
    return lambda record: full({**record, f"{key}_sd": None})


def estimated(key: str, found: Estimate | None) -> dict[str, Value]:
    """An estimate as columns: KEY, KEY_n, KEY_sd, KEY_low, KEY_high."""
    if found is None:
        return dict.fromkeys((key, f"{key}_n", f"{key}_sd", f"{key}_low", f"{key}_high"))
    return {
        key: found.mean,
        f"{key}_n": found.n,
        f"{key}_sd": found.sd,
        f"{key}_low": found.low,
        f"{key}_high": found.high,
    }
