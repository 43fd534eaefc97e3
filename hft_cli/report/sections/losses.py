"""Section: the loss while training, run by run."""

from __future__ import annotations

from functools import partial

from hft_cli.report.figures.charts import Line, lines
from hft_cli.report.groups import MOST_MAPS, Comparison, group_runs
from hft_cli.report.tables import Plot, Section

CAPTION = (
    "Training loss: a line for each run, over its optimizer steps, and a panel for each learning rate. A point is the "
    "mean since the one before (train.log_every)."
)
LEFT_OUT = "Of {all} learning rates {shown} are shown, at equal distances."


def section(comparison: Comparison) -> Section | None:
    groups = [group for group in group_runs(comparison.runs) if any(len(run.losses) > 1 for run in group.runs)]
    if not groups:
        return None
    found = sorted({group.row.learning_rate or 0.0 for group in groups})
    last = len(found) - 1
    rates = found if last < MOST_MAPS else [found[round(i * last / (MOST_MAPS - 1))] for i in range(MOST_MAPS)]
    panels = {
        f"Learning rate {rate:g}": [
            Line(group.label_without_rate, run.losses)
            for group in groups if group.row.learning_rate == rate
            for run in group.runs if run.losses
        ]
        for rate in rates
    }  # fmt: skip
    note = LEFT_OUT.format(all=len(found), shown=len(rates)) if len(rates) < len(found) else ""
    plot = Plot(comparison.stem("losses"), f"{CAPTION} {note}".strip(), partial(lines, panels, "Step", "Training loss"))
    return Section(comparison.title("Training"), (), [plot])
