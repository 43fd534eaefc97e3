"""Section: sequences of tasks, with the matrix R, OP and BWT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from hft_cli.report import measures
from hft_cli.report.figures.heatmaps import Heatmap, heatmaps
from hft_cli.report.groups import Comparison, Group, batches, group_runs
from hft_cli.report.published import is_the_papers, paper_table
from hft_cli.report.runs import Matrix
from hft_cli.report.tables import Plot, Record, Section, Table, columns, percent

CAPTION = "Overall performance and backward transfer. A negative BWT is forgetting."

MAP_CAPTION = (
    "R: the score (%) on each task (column) after each round (row), mean over seeds. A cell is blank if the task was "
    "not scored after that round. OP is the mean of the last row, BWT the mean difference between the last row and the "
    "diagonal."
)


def section(comparison: Comparison) -> Section | None:
    groups = group_runs(run for run in comparison.runs if run.tasks is not None)
    if not groups:
        return None
    keys = ("op", "bwt", "retained")
    records = [measures.setting_fields(group) | measures.measure_fields(group, keys) for group in groups]
    retained = any(record["retained"] is not None for record in records)
    shown = [*columns("setting", "runs"), *measures.measure_columns(keys if retained else keys[:2])]
    caption = f"{CAPTION} {measures.sample_note(groups)} {measures.INTERVAL_NOTE}"
    parts: list[Table | Plot] = [Table(comparison.stem("sequences"), caption, shown, records)]
    for stem, batch in batches("r", groups):
        draw = partial(heatmaps, [_mean_map(group) for group in batch], "Score (%)", ".0f", 0, 100)
        parts.append(Plot(comparison.stem(stem), f"{MAP_CAPTION} {measures.sample_note(batch)}", draw))
    cells = [cell for group in groups for cell in _cells(group)]
    shown = [*columns("setting", "seed", "after", "task"), ("score", percent("score"))]
    parts.append(Table(comparison.stem("r"), "Every cell of R, run by run.", shown, cells, csv_only=True))
    parts += [paper_table("paper_trace")] * is_the_papers(comparison)
    return Section(comparison.title("Sequences of tasks"), (), parts)


def _cells(group: Group) -> list[Record]:
    return [
        {
            "run": run.row.run, "setting": group.label, "seed": run.row.seed, "draw_seed": run.draw_seed,
            "after": run.tasks.names[i], "task": run.tasks.names[j], "metric": run.tasks.metrics[j], "score": score,
        }
        for run in group.runs if run.tasks
        for i, row in enumerate(run.tasks.scores)
        for j, score in enumerate(row)
    ]  # fmt: skip


def _mean_map(group: Group) -> Heatmap:
    tasks = [run.tasks for run in group.runs if run.tasks]
    op, bwt = (measures.over_seeds(group, measures.MEASURES[key].score)[0] for key in ("op", "bwt"))
    title = group.label
    if op is not None and bwt is not None:
        title += f"\nOP {100 * op.mean:.1f}, BWT {100 * bwt.mean:+.1f}, n = {op.n}"
    cells = mean_matrix([entry.scores for entry in tasks])
    percents = tuple(tuple(None if value is None else 100 * value for value in row) for row in cells)
    return Heatmap(title, tasks[0].names, tasks[0].names, percents)


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """The mean of each cell over the matrices that have it; None where none has."""
    return tuple(
        tuple(fmean(scores) if (scores := [value for value in cell if value is not None]) else None
              for cell in zip(*rows, strict=True))
        for rows in zip(*matrices, strict=True)
    )  # fmt: skip
