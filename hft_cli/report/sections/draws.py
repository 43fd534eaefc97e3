"""The sections of a report on what was updated: shares of the variance, effects, draws, size of the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from hft_cli.checkpoint.naming import category, layer_and_matrix, short_names
from hft_cli.report.groups import count_of
from hft_cli.report.runs import Matrix, Run
from hft_cli.report.tables import Plot, Record, Section, Table, percent, plain, short
from hft_cli.text import natural_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ledger(run: Run) -> tuple[frozenset[str], ...]:
    return tuple(drawn.updated for drawn in run.draws)


def layers_by_matrices(values: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[str, ...], Matrix]:
    """Layers, matrices by category and the values by parameter name as a matrix; None where there is no such one."""
    at: dict[tuple[int, str], float] = {}
    for name, value in values.items():
        where = layer_and_matrix(name)
        if where is not None and (where not in at or name.endswith("weight")):  # a bias goes with its matrix
            at[where] = value
    layers = sorted({layer for layer, _ in at})
    names = short_names(sorted({matrix for _, matrix in at}, key=natural_order))
    kinds, usual = ("attention", "feed-forward", "norm", "other"), ("q", "k", "v", "o", "gate", "up", "down")
    matrices = sorted(
        names, key=lambda m: (kinds.index(category(m)), usual.index(names[m]) if names[m] in usual else 9)
    )
    cells = tuple(tuple(at.get((layer, matrix)) for matrix in matrices) for layer in layers)
    return tuple(map(str, layers)), tuple(names[matrix] for matrix in matrices), cells


def draws(runs: Sequence[Run]) -> Section | None:
    distinct: dict[tuple[frozenset[str], ...], list[Run]] = {}
    for run in runs:
        if run.draws and any(drawn.frozen for drawn in run.draws) and run.row.level not in ("all", "lora"):
            distinct.setdefault(ledger(run), []).append(run)
    if not distinct:
        return None
    lots = list(distinct.values())
    parts: list[Table | Plot] = []
    records: list[Record] = []
    for own in lots:
        for drawn in own[0].draws:
            inside = [name for name in drawn.updated | drawn.frozen if layer_and_matrix(name)]
            records.append({
                "run": own[0].row.run, "runs": len(own), "round": drawn.round, "name": drawn.name, "level": drawn.level,
                "ratio": own[0].row.ratio, "draw_seed": own[0].draw_seed, "updated": len(drawn.updated),
                "frozen": len(drawn.frozen), "share": sum(name in drawn.updated for name in inside) / len(inside),
            })  # fmt: skip
    columns = [("draw of run", plain("run")), ("runs with it", plain("runs")), ("draw seed", plain("draw_seed")),
               ("level", plain("level")), ("ratio", short("ratio")), ("round", plain("round")), ("of", plain("name")),
               ("tensors updated", plain("updated")), ("frozen", plain("frozen")),
               ("of the layers' tensors (%)", percent("share"))]  # fmt: skip
    parts.append(Table("draws", f"Every different draw, as in draws.json: {len(lots)}.", columns, records))
    single = [own for own in lots if len(own[0].draws) == 1][:8]
    if single:
        runs_with = "; ".join(f"{own[0].row.run}, {count_of(len(own), 'run')}" for own in single)
        caption = f"What single rounds updated (dark, dotted) and froze (light), as in {runs_with}."
        parts.append(Plot("draws", caption, partial(_draw_maps, [own[0] for own in single])))
    several = [own for own in lots if len(own[0].draws) > 1][:2]
    for i, own in enumerate(several):
        run = own[0]
        caption = (
            f"What each round updated (dark, dotted) and froze (light): {run.row.label}, {run.row.selection}, draw "
            f"seed {run.draw_seed}, as in {run.row.run}; {count_of(len(own), 'run')} with this draw."
        )
        parts.append(Plot(f"draws_{i + 1}", caption, partial(_draw_maps, [run])))
    if len(lots) > 1:
        caption = f"How often each matrix was updated (% of rounds), over the {len(lots)} different draws."
        parts.append(Plot("draws_often", caption, lambda: _often([own[0] for own in lots])))
    return Section("What was updated", (), parts)


def _draw_maps(runs: Sequence[Run]) -> Figure:
    from hft_cli.report import figures
    from hft_cli.report.figures import Map

    panels = []
    for run in runs:
        for drawn in run.draws:
            values = {name: float(name in drawn.updated) for name in drawn.updated | drawn.frozen}
            one = (
                f"{run.row.selection}, draw {run.draw_seed}" if len(runs) > 1 else f"round {drawn.round}: {drawn.name}"
            )
            panels.append(Map(one, *layers_by_matrices(values)))
    return figures.signs(panels)


def _often(runs: Sequence[Run]) -> Figure:
    from hft_cli.report import figures
    from hft_cli.report.figures import Map

    by: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        by.setdefault((run.row.level, f"{run.row.ratio:g}", run.setting.get("model.name", "")), []).append(run)
    panels = []
    for (level, ratio, model), own in by.items():
        rounds = [drawn for run in own for drawn in run.draws]
        values: dict[str, list[float]] = {}
        for drawn in rounds:
            for name in drawn.updated | drawn.frozen:
                values.setdefault(name, []).append(100.0 * (name in drawn.updated))
        title = f"{level} {ratio}, {count_of(len(rounds), 'round')}"
        title = f"{model}: {title}" if len({key[2] for key in by}) > 1 else title
        panels.append(Map(title, *layers_by_matrices({name: fmean(v) for name, v in values.items()})))
    return figures.maps(panels, "Updated (% of rounds)", ".0f", 0, 100)
