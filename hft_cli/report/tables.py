"""The parts of a report, independent of the format they are written in: tables of plain values, plots, sections."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hft_cli.report.stats import Estimate
from hft_cli.text import latex_table, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | float | int | None
Record = Mapping[str, Value]  # one row of a table as CSV and JSON hold it: raw values, shares in [0, 1]
Cell = Callable[[Record], str]  # the text of a cell, for people
Column = tuple[str, Cell]  # heading and cells
ESTIMATE_FIELDS = ("mean", "n", "sd", "low", "high", "least", "most")
FEW = 5  # values: with fewer, a standard deviation says less than their range


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        name: the stem of its files' names.
        caption: what the table shows, and the runs and seeds behind it.
        columns: what people see.
        records: what CSV and JSON hold.
        paper: the numbers are the paper's, not measured by the runs of this report.
        csv_only: the table is too long to read; only its CSV and JSON are written.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    records: Sequence[Record]
    paper: bool = False
    csv_only: bool = False

    @property
    def headings(self) -> list[str]:
        return [heading for heading, _ in self.columns]

    @property
    def body(self) -> list[list[str]]:
        return [[cell(record) for _, cell in self.columns] for record in self.records]

    def head(self, rows: int) -> Table:
        """The table's first rows, with a caption that says how many there are in all."""
        if len(self.records) <= rows:
            return self
        note = (
            f"{self.caption} Shown are the first {rows} of {len(self.records)} rows; {self.name}.csv has all of them."
        )
        return replace(self, caption=note, records=self.records[:rows])

    def markdown(self) -> str:
        return markdown_table(self.headings, self.body)

    def latex(self) -> str:
        return latex_table(self.headings, self.body)

    def csv(self) -> str:
        return csv_text(self.records)


@dataclass(frozen=True)
class Plot:
    """A figure, drawn when it is written. `caption` says what it shows, and the runs and seeds behind it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A part of the page. One of the `appendix` is folded until it is asked for."""

    title: str
    text: Sequence[str] = ()
    parts: Sequence[Table | Plot] = ()
    appendix: bool = False


def csv_text(records: Iterable[Record]) -> str:
    """Records as CSV with a heading. A key that a record lacks gives an empty field."""
    records = list(records)
    text = io.StringIO()
    keys = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(text, list(keys), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def columns(*keys: str) -> list[Column]:
    """Columns that show values as they are, each under its key."""
    return [(key.replace("_", " "), plain(key)) for key in keys]


def plain(key: str) -> Cell:
    """The value as it is."""
    return lambda record: "" if record.get(key) is None else str(record[key])


def formatted(key: str, form: str = "g", scale: float = 1) -> Cell:
    """A number, multiplied by `scale`, in a format of Python's."""

    def cell(record: Record) -> str:
        value = record.get(key)
        return format(value * scale, form) if isinstance(value, int | float) else ""

    return cell


def percent(key: str) -> Cell:
    """A share, as 71.3."""
    return formatted(key, ".1f", 100)


def p_value(key: str) -> Cell:
    return lambda record: "" if not isinstance(p := record.get(key), float) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def estimate_cell(key: str, signed: bool = False, scale: float = 100, deviation: bool = True) -> Cell:
    """An estimate of `estimate_fields` as mean ± standard deviation [interval], multiplied by `scale`.

    With fewer than FEW values their range stands in the place of the deviation.
    """
    form = "+.1f" if signed else ".1f"

    def cell(record: Record) -> str:
        mean, low, high, least, most = (
            formatted(f"{key}{end}", form, scale)(record) for end in ("", "_low", "_high", "_least", "_most")
        )
        sd, count = formatted(f"{key}_sd", ".1f", scale)(record), record.get(f"{key}_n")
        spread = f" ± {sd}" if sd else ""
        if isinstance(count, int) and 1 < count < FEW and least and most:
            spread = f" ({least} to {most})"
        return mean + spread * deviation + (f" [{low}, {high}]" if low and high else "")

    return cell


def estimate_fields(key: str, estimate: Estimate | None) -> dict[str, Value]:
    """An estimate as fields of a record: KEY, KEY_n, KEY_sd, KEY_low, …; all None without an estimate."""
    names = (key, *(f"{key}_{field}" for field in ESTIMATE_FIELDS[1:]))
    return {name: getattr(estimate, field, None) for name, field in zip(names, ESTIMATE_FIELDS, strict=True)}
