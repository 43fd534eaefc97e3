"""Section: scores before and after each run."""

from __future__ import annotations

from hft_cli.report.groups import Comparison
from hft_cli.report.items import score_changes
from hft_cli.report.stats import RESAMPLES
from hft_cli.report.tables import Section, Table, columns, estimate_cell, percent, plain

CAPTION = (
    "Scores before the first round and after the last, run by run. If the score of each item was recorded, the change "
    f"has a 95% interval from a paired bootstrap over these items ({RESAMPLES:,} resamples, percentiles, seed 0). The "
    "interval says how certain the change of this one model is, not how it varies over seeds. Lost: of the items that "
    "were right before, how many are wrong after; gained: of those that were wrong, how many are right."
)


def section(comparison: Comparison) -> Section | None:
    records = [record for run in comparison.runs for record in score_changes(run)]
    if not records:
        return None
    shown = [
        *columns("run", "method", "task", "metric"), ("before (%)", percent("before")), ("after (%)", percent("after")),
        ("change (points)", estimate_cell("change", signed=True, deviation=False)),
        ("items", lambda record: str(record["change_n"] or "")), ("lost", plain("lost")), ("gained", plain("gained")),
    ]  # fmt: skip
    return Section("Before and after", (), [Table("before_after", CAPTION, shown, records)])
