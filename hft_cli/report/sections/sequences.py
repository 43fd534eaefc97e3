"""Report: sequences of tasks, R with OP and BWT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from hft_cli.report import published
from hft_cli.report.groups import (
    INTERVAL,
    MEASURES,
    Comparison,
    Group,
    comparisons,
    groups,
    over_seeds,
    sample_note,
    setting_of,
)
from hft_cli.report.runs import Matrix
from hft_cli.report.tables import Plot, Record, Section, Table, estimated, percent, plain, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def matrices_section(lot: Comparison) -> Section | None:
    found = groups([run for run in lot.runs if run.tasks is not None])
    if not found:
        return None
    cells: list[Record] = []
    for group in found:
        for run in group.runs:
            assert run.tasks is not None
            for i, row in enumerate(run.tasks.scores):
                for j, value in enumerate(row):
                    cells.append({
                        "run": run.row.run, "setting": group.label, "seed": run.row.seed, "draw_seed": run.draw_seed,
                        "after": run.tasks.names[i], "task": run.tasks.names[j], "metric": run.tasks.metrics[j],
                        "score": value,
                    })  # fmt: skip
    measures = []
    for group in found:
        record = setting_of(group)
        for key in ("op", "bwt", "retained"):
            record |= estimated(key, over_seeds(group, MEASURES[key][1])[0])
        measures.append(record)
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("OP (%)", spread("op")),
               ("BWT (points)", spread("bwt", signed=True))]  # fmt: skip
    if any(record["retained"] is not None for record in measures):
        columns.append(("retained (%)", spread("retained")))
    caption = f"Overall performance and backward transfer (below 0 is forgetting). {sample_note(found)} {INTERVAL}"
    parts: list[Table | Plot] = [Table(lot.stem("sequences"), caption, columns, measures)]
    for part, few in enumerate(comparisons(found)):
        parts.append(
            Plot(
                lot.stem("r" if part == 0 else f"r_{part + 1}"),
                "R: the score (%) on each task (column) after each round (row); blank where it was not scored. The "
                f"last row makes OP, the last row less the diagonal BWT. Means over seeds. {sample_note(few)}",
                partial(_r_maps, few),
            )
        )
    long_columns = [(key, plain(key)) for key in ("setting", "seed", "after", "task")] + [("score", percent("score"))]
    parts.append(Table(lot.stem("r"), "Every cell of R, run by run.", long_columns, cells, data=True))
    parts.append(published.trace())
    return Section(lot.title("Sequences of tasks"), (), parts)


def _r_maps(found: Sequence[Group]) -> Figure:
    from hft_cli.report import figures
    from hft_cli.report.figures import Map

    panels = []
    for group in found:
        tasks = [run.tasks for run in group.runs if run.tasks is not None]
        op, bwt = (over_seeds(group, MEASURES[key][1])[0] for key in ("op", "bwt"))
        title = group.label
        if op is not None and bwt is not None:
            title += f"\nOP {100 * op.mean:.1f}, BWT {100 * bwt.mean:+.1f}, n = {op.n}"
        cells = mean_matrix([own.scores for own in tasks])
        names = tasks[0].names
        panels.append(Map(title, names, names, tuple(tuple(None if v is None else 100 * v for v in r) for r in cells)))
    return figures.maps(panels, "Score (%)", ".0f", 0, 100)


def mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    """Cell by cell over those matrices that have it; None where none has."""
    return tuple(
        tuple(fmean(known) if (known := [value for value in cell if value is not None]) else None
              for cell in zip(*rows, strict=True))
        for rows in zip(*matrices, strict=True)
    )  # fmt: skip
