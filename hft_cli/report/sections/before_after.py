"""Section: scores before and after each run."""

from __future__ import annotations

from hft_cli.report.groups import Comparison
from hft_cli.report.items import change_cell, score_cell, score_changes
from hft_cli.report.stats import RESAMPLES
from hft_cli.report.tables import Section, Table, columns, plain

CAPTION = (
    "Scores before the first round and after the last, run by run. If the score of each item was recorded, the change "
    "has a 95% interval over these items: Newcombe's for items that are right or wrong, and otherwise percentiles of a "
    f"paired bootstrap ({RESAMPLES:,} resamples, seed 0). The interval says how certain the change of this one model "
    "is, not how it varies over seeds. Lost: of the items that were right before, how many are wrong after, and the "
    "interval of their share; gained: of those that were wrong, how many are right."
)


def section(comparison: Comparison) -> Section | None:
    records = [record for run in comparison.runs for record in score_changes(run)]
    if not records:
        return None
    shown = [
        *columns("run", "method", "task", "metric"), ("before", score_cell("before")), ("after", score_cell("after")),
        ("change (points)", change_cell),
        ("items", lambda record: str(record["change_n"] or "")), ("lost", plain("lost")), ("gained", plain("gained")),
        ("note", plain("note")),
    ]  # fmt: skip
    return Section("Before and after", (), [Table("before_after", CAPTION, shown, records)])
