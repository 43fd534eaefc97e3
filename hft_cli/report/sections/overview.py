"""Section: every run, and what is wrong with some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hft_cli.report.groups import Comparison
from hft_cli.report.runs import RunRow
from hft_cli.report.tables import Column, Record, Section, Table, columns, formatted, plain
from hft_cli.text import mebibytes, natural_order

TEXT = (
    "Learned is the change of the score on the test sets of the data that was trained on, in points. Retained is what "
    "is left of the score on the evaluation suites, in percent of that before (of a loss or bits per byte: before as "
    "percent of after). Both are means over tasks, measured after the last round. The means in the sections below "
    "include only runs that are verified, and runs that were scored without writing a model."
)

PROBLEMS_CAPTION = "Runs with a problem. Runs that are not verified are left out of all means below."

RUNS_CAPTION = (
    'Every run. Scores are in %. "updated" is the share of all elements of the model that a round updates, including '
    "embeddings and head. OP and BWT are measured for sequences of tasks."
)


def section(comparison: Comparison) -> Section:
    rows = [run.row for run in comparison.runs]
    counts = Counter(row.status for row in rows)
    summary = f"{len(rows)} runs: " + ", ".join(f"{count} {status}" for status, count in counts.most_common()) + "."
    tables = [runs_table(rows)]
    if problems := [run.row for run in comparison.runs if not run.counted or run.row.note]:
        keys = ("run", "status", "note")
        records = [{key: getattr(row, key) for key in keys} for row in problems]
        tables.insert(0, Table("problems", PROBLEMS_CAPTION, columns(*keys), records))
    return Section("The runs", [summary, TEXT], tables)


def runs_table(rows: Sequence[RunRow]) -> Table:
    """The runs in the order of method, selection, learning rate and seed."""
    sequence: list[Column] = [("OP", formatted("op", ".1%")), ("BWT", formatted("bwt", "+.1f", 100))]
    shown: list[Column] = [
        ("method", _method),
        *columns("selection"),
        ("learning rate", formatted("learning_rate")),
        ("seed", _seed),
        ("learned", formatted("skill", "+.1f", 100)),
        ("retained", formatted("retained", ".1%")),
        ("updated", formatted("updated", ".1%")),
        ("seconds", formatted("train_seconds", ".1f")),
        ("peak memory", _memory),
        *(sequence if any(row.op is not None for row in rows) else []),
        *columns("status"),
    ]
    records = [
        {**{key: value for key, value in vars(row).items() if key != "scores"}, "additions": " + ".join(row.additions)}
        for row in sorted(rows, key=_order)
    ]
    return Table("runs", RUNS_CAPTION, shown, records)


def _method(record: Record) -> str:
    return " + ".join(filter(None, [str(record["method"] or record["run"]), str(record["additions"])]))


def _seed(record: Record) -> str:
    draw_seed = plain("draw_seed")(record)
    return plain("seed")(record) + (f", draw {draw_seed}" if draw_seed else "")


def _memory(record: Record) -> str:
    size = record["peak_memory_bytes"]
    return mebibytes(size) if isinstance(size, int) else ""


def _order(row: RunRow) -> tuple[Any, ...]:
    seeds = row.learning_rate or 0, row.seed or 0, row.draw_seed or 0, natural_order(row.run)
    return not row.method, row.method, row.additions, row.selection, *seeds
