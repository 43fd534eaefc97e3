"""Section: scores by the level of the selection."""

from __future__ import annotations

from hft_cli.report import measures
from hft_cli.report.groups import Comparison, with_full_counterparts
from hft_cli.report.published import is_the_papers, paper_table
from hft_cli.report.tables import Section, columns

LEVELS = ("all", "model", "layer", "category")
SHIFT = 0.12  # on the x axis, between the points of several families at one level

LEVEL = measures.Ablation(
    "Level of the draw",
    "Scores by the level of the selection, from which the updated half is drawn, with the same other settings. "
    '"all" is full fine-tuning.',
    columns("level", "setting", "runs"),
    ticks={float(i): level for i, level in enumerate(LEVELS)},
)


def section(comparison: Comparison) -> Section | None:
    families = with_full_counterparts([g for g in comparison.groups if g.row.level in LEVELS], "selection.level")
    if not families:
        return None
    lines = []
    for i, family in enumerate(families):
        shift = (i - (len(families) - 1) / 2) * SHIFT
        points = sorted(((LEVELS.index(g.row.level) + shift, g) for g in family), key=lambda point: point[0])
        last = points[-1][1]
        label = last.label.replace(f" {last.row.level}", "", 1)
        style = last.row.label if len(families) == 1 else label
        lines.append(measures.Line(label, style, points, joined=False))
    parts = measures.table_and_curves(comparison.stem("levels"), LEVEL, lines)
    parts += [paper_table("paper_levels")] * is_the_papers(comparison)
    return Section(comparison.title("Level of selection"), (), parts)
