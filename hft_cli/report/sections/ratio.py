"""Section: scores over the ratio that is updated."""

from __future__ import annotations

from hft_cli.report import measures
from hft_cli.report.groups import Comparison, with_full_counterparts
from hft_cli.report.tables import Section, columns, formatted, percent

TEXT = "In the paper, scores were best near ratio 0.5, and good between 0.4 and 0.6 (Llama 2)."

RATIO = measures.Ablation(
    "Ratio updated",
    "Scores over selection.ratio, the share of the layers' matrices that is updated. Ratio 1 updates all (FFT).",
    [*columns("setting"), ("ratio", formatted("ratio")), ("of all elements (%)", percent("updated")), *columns("runs")],
    fields=("updated",),
)


def section(comparison: Comparison) -> Section | None:
    groups = [group for group in comparison.groups if group.row.method != "lora"]
    sweeps = with_full_counterparts(groups, "selection.ratio")
    if not sweeps:
        return None
    lines = []
    for sweep in sweeps:
        row = sweep[0].row
        label, style = f"{row.label} {row.level}", row.label
        if len(sweeps) > 1:
            label = style = sweep[0].label.replace(f" {sweep[0].runs[0].setting.get('selection.ratio')}", "", 1)
        points = sorted(((group.row.ratio or 0, group) for group in sweep), key=lambda point: point[0])
        lines.append(measures.Line(label, style, points))
    parts = measures.table_and_curves(comparison.stem("ratio"), RATIO, lines)
    return Section(comparison.title("Ratio"), [TEXT], parts)
