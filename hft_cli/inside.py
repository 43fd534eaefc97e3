"""The sections of a report on what was updated: shares of the variance, effects, draws, size of the change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from hft_cli import stats
from hft_cli.compare import MEASURES, Lot, behind, cells_of, count_of, lots, measured_in
from hft_cli.gather import Group, Matrix, Run, called, category, groups, natural, place
from hft_cli.norms import changes
from hft_cli.run_dir import RunDir
from hft_cli.schema import UserError
from hft_cli.tables import (
    Plot,
    Record,
    Section,
    Table,
    Value,
    chance,
    interval,
    percent,
    plain,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hft_cli.figures import Dot

# ------------------------------------------------------------------------------------------------- variance and effects


def variance(lot: Lot) -> Section | None:
    shares, effects, text = [], [], []
    found = groups(lot.runs)
    used: list[Group] = []
    for group in found:
        records = _shares(group)
        if records:
            shares += records
            used.append(group)
        drawn = {_ledger(run) for run in group.runs if run.draws}
        if len(drawn) > 2:
            more, said = _effects(group)
            effects += more
            text += said
    parts: list[Table | Plot] = []
    if shares:
        columns = [("setting", plain("setting")), ("measure", plain("measure")), ("draws x data", plain("grid")),
                   ("sd (points)", percent("sd")), ("draw (%)", percent("draw")), ("data (%)", percent("data")),
                   ("rest (%)", percent("rest")), ("p draw", chance("p_draw")),
                   ("p data", chance("p_data")),
                   ("note", plain("note"))]  # fmt: skip
        caption = (
            "Shares of the variance between runs that come from the draw (selection.seed), from the data (seed: order, "
            "replay) and from the rest, which is their interaction and the noise. Two-way random-effects analysis of "
            "variance by expected mean squares; an estimate below 0 is set to 0, and said. p: F test of no effect. "
            f"Shares of few seeds are rough. {behind(used)}"
        )
        parts += [
            Table(lot.stem("variance"), caption, columns, shares),
            Plot(lot.stem("variance"), caption, lambda: _share_bars(shares)),
        ]
    if effects:
        columns = [("setting", plain("setting")), ("measure", plain("measure")), ("by", plain("family")),
                   ("updated", plain("term")), ("effect (points)", interval("effect")), ("draws", plain("draws")),
                   ("note", plain("note"))]  # fmt: skip
        caption = (
            "What updating one more matrix (in one more round) changes, in points, with 95% t intervals: least squares "
            "over the draws, which are a randomised experiment, of each draw's mean over its data seeds. A draw that "
            "updates one matrix more updates another one less, so effects are relative to the mean of those traded "
            "off. Where the level of selection holds a number fixed, its effect cannot be told. Of "
            "twenty intervals one leaves out 0 by chance."
        )
        parts += [
            Table(lot.stem("effects"), caption, columns, effects),
            Plot(lot.stem("effects"), f"The same effects, with their intervals. {caption}",
                 lambda: _effect_dots(effects)),
        ]  # fmt: skip
    if not parts and not text:
        return None
    return Section(lot.title("Draws against data"), text, parts)


def _shares(group: Group) -> list[Record]:
    """A row for each measure, if the group's draw seeds and data seeds are crossed."""
    records: list[Record] = []
    for key in measured_in([group]):
        cells = {(draw, data): value for (data, draw), value in cells_of(group, MEASURES[key][1]).items()}
        rows, columns = stats.full_grid(list(cells))
        if min(len(rows), len(columns)) < 2:
            continue
        found = stats.two_way([[cells[r, c] for c in columns] for r in rows])
        names = {"rows": "draw", "columns": "data"}
        notes = [f"{names[name]} estimate was negative, set to 0" for name in found.floored]
        if len(rows) * len(columns) < len(cells):
            notes.append(f"{len(cells) - len(rows) * len(columns)} runs outside the full grid left out")
        if found.total == 0:
            notes = ["nothing varies"]
        records.append({
            "setting": group.label, "measure": key, "grid": f"{len(rows)} x {len(columns)}", "draws": len(rows),
            "data_seeds": len(columns), "sd": found.total**0.5, "draw": found.share(found.of_rows),
            "data": found.share(found.of_columns), "rest": found.share(found.rest), "p_draw": found.p_rows,
            "p_data": found.p_columns, "note": "; ".join(notes) or None,
        })  # fmt: skip
    return records


def _share_bars(records: Sequence[Record]) -> Figure:
    from hft_cli import figures

    shown = [record for record in records if record["draw"] is not None]
    several = len({record["setting"] for record in records}) > 1
    labels = [f"{record['setting']}: {record['measure']}" if several else str(record["measure"]) for record in shown]
    shares = [[float(record[part] or 0) for part in ("draw", "data", "rest")] for record in shown]
    return figures.parts(labels, shares, ["draw", "data", "interaction and noise"], "Share of the variance (%)")


def _ledger(run: Run) -> tuple[frozenset[str], ...]:
    return tuple(drawn.updated for drawn in run.draws)


FAMILIES: dict[str, Callable[[int, str], str]] = {
    "category": lambda layer, matrix: category(matrix),
    "layer": lambda layer, matrix: f"layer {layer}",
    "matrix": lambda layer, matrix: matrix.rsplit(".", 1)[-1],
}


def counts(run: Run, family: str) -> dict[str, int]:
    """How many matrices a run updated over its rounds, by category, layer or name."""
    found: Counter[str] = Counter()
    for drawn in run.draws:
        names = {place(name): name in drawn.updated for name in sorted(drawn.updated | drawn.frozen)}
        for where, updated in names.items():
            if where is not None:
                found[FAMILIES[family](*where)] += updated
    return dict(found)


def _effects(group: Group) -> tuple[list[Record], list[str]]:
    """Effects by category, layer and matrix of each measure, or why there are none."""
    records: list[Record] = []
    short_of: dict[str, int] = {}
    for key in measured_in([group]):
        by: dict[tuple[frozenset[str], ...], list[tuple[Run, float]]] = {}
        for run in group.runs:
            value = MEASURES[key][1](run.row)
            if value is not None and run.draws:
                by.setdefault(_ledger(run), []).append((run, value))
        means = [fmean(value for _, value in own) for own in by.values()]
        for family in FAMILIES:
            rows = [counts(own[0][0], family) for own in by.values()]
            terms = sorted({term for row in rows for term in row}, key=natural)
            features = np.array([[row.get(term, 0) for term in terms] for row in rows], float)
            found = stats.regress(features, means)
            varying = int((np.ptp(features, axis=0) > 0).sum())
            if found is None:
                if varying:
                    short_of[family] = varying + 2
                continue
            for term, effect in zip(terms, found, strict=True):
                ends: dict[str, Value] = {"effect": None, "effect_low": None, "effect_high": None}
                if effect is not None:
                    ends = {"effect": effect.value, "effect_low": effect.low, "effect_high": effect.high}
                note = None if effect else "every draw updates as many"
                records.append({"setting": group.label, "measure": key, "family": family, "term": term, **ends,
                                "draws": len(by), "note": note})  # fmt: skip
    drawn = len({_ledger(run) for run in group.runs})
    said = [
        f"{group.label}: effects by {family} need {need} different draws or more; there are {drawn}."
        for family, need in short_of.items()
    ]
    return records, said


def _effect_dots(records: Sequence[Record]) -> Figure:
    from hft_cli import figures
    from hft_cli.figures import Dot

    told = [record for record in records if record["effect"] is not None]
    measures = list(dict.fromkeys(str(record["measure"]) for record in told))
    several = len({record["setting"] for record in told}) > 1
    at: dict[str, dict[str, Record]] = {}
    for record in told:
        label = f"{record['setting']}: {record['term']}" if several else str(record["term"])
        at.setdefault(label, {})[str(record["measure"])] = record

    def dot(record: Record | None) -> Dot | None:
        if record is None:
            return None
        mean, low, high = (100 * float(record[f"effect{end}"] or 0) for end in ("", "_low", "_high"))
        return Dot(0, mean, low, high)

    labels = list(at)[:60]
    panels = [
        (f"{MEASURES[m][0].split(' (')[0]} (points)", [dot(at[label].get(m)) for label in labels]) for m in measures
    ]
    styles = [str(next(iter(at[label].values()))["family"]) for label in labels]
    return figures.forest(labels, styles, panels)


# ------------------------------------------------------------------------------------------- draws, size of change


def layers_by_matrices(values: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[str, ...], Matrix]:
    """Layers, matrices by category and the values by parameter name as a matrix; None where there is no such one."""
    at: dict[tuple[int, str], float] = {}
    for name, value in values.items():
        where = place(name)
        if where is not None and (where not in at or name.endswith("weight")):  # a bias goes with its matrix
            at[where] = value
    layers = sorted({layer for layer, _ in at})
    names = called(sorted({matrix for _, matrix in at}, key=natural))
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
            distinct.setdefault(_ledger(run), []).append(run)
    if not distinct:
        return None
    lots = list(distinct.values())
    parts: list[Table | Plot] = []
    records: list[Record] = []
    for own in lots:
        for drawn in own[0].draws:
            inside = [name for name in drawn.updated | drawn.frozen if place(name)]
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
    from hft_cli import figures
    from hft_cli.figures import Map

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
    from hft_cli import figures
    from hft_cli.figures import Map

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


def norms_section(runs: Sequence[Run]) -> Section | None:
    """How far the weights moved. Reads them all, so only when asked."""
    hashes: dict[Path, str] = {}
    measured: dict[Path, dict[str, float]] = {}
    records: list[Record] = []
    text = []
    found = groups(runs)
    for group in found:
        for run in group.runs:
            if run.row.status == "no model written":
                text.append(f"{run.row.run}: not measured, because it wrote no model.")
                continue
            try:
                own = changes(RunDir(run.folder), hashes)
            except UserError as reason:
                text.append(f"{run.row.run}: not measured, because {reason}.")
                continue
            measured[run.folder] = {moved.tensor: moved.relative for moved in own if moved.relative is not None}
            for moved in own:
                where = place(moved.tensor)
                records.append({
                    "run": run.row.run, "setting": group.label, "seed": run.row.seed, "draw_seed": run.draw_seed,
                    "tensor": moved.tensor, "layer": where[0] if where else None,
                    "matrix": where[1] if where else moved.tensor.removesuffix(".weight"), "norm_start": moved.start,
                    "norm_change": moved.change, "relative": moved.relative,
                })  # fmt: skip
    if not records:
        return Section("Size of the change", text) if text else None
    shown = [group for group in found if any(run.folder in measured for run in group.runs)]
    summary: list[Record] = []
    for group in shown:
        inside = [r for r in records if r["setting"] == group.label and isinstance(r["relative"], float)]
        of = {name: [r for r in inside if r["layer"] is not None and category(str(r["matrix"])) == name]
              for name in ("attention", "feed-forward", "norm")}  # fmt: skip
        of["outside the layers"] = [r for r in inside if r["layer"] is None]
        made: dict[str, Value] = {"setting": group.label, "runs": sum(run.folder in measured for run in group.runs)}
        for name, some in of.items():
            change, start = (sum(float(r[key] or 0) ** 2 for r in some) for key in ("norm_change", "norm_start"))
            made[name] = (change / start) ** 0.5 if start else None
        summary.append(made)
    columns = [("setting", plain("setting")), ("runs", plain("runs")),
               *((f"{name} (%)", _fine(name)) for name in of)]  # fmt: skip
    parts: list[Table | Plot] = [
        Table("norms_by_category", "‖θ_T − θ_0‖ / ‖θ_0‖ (%) over all tensors of a category and runs of a setting, taken"
              " together.", columns, summary),
        Table("norms", "Every tensor of every run: Frobenius norms of its start and its change.",
              [(key, plain(key)) for key in ("run", "tensor")]
              + [(key, short(key, ".4g")) for key in ("norm_start", "norm_change", "relative")], records, data=True),
    ]  # fmt: skip
    for part, lot in enumerate(lots(shown)):
        caption = (
            "Size of the change of each matrix, ‖θ_T − θ_0‖ / ‖θ_0‖ (%); means over seeds, frozen ones counted as 0. "
            f"{behind(lot)}"
        )
        plot = Plot("norms" if part == 0 else f"norms_{part + 1}", caption, partial(_norm_maps, lot, measured))
        parts.insert(part, plot)
    return Section("Size of the change", text, parts)


def _fine(key: str) -> Callable[[Record], str]:
    return lambda record: "" if not isinstance(value := record.get(key), float) else f"{100 * value:.2f}"


def _norm_maps(found: Sequence[Group], measured: Mapping[Path, Mapping[str, float]]) -> Figure:
    from hft_cli import figures
    from hft_cli.figures import Map

    panels = []
    for group in found:
        own = [measured[run.folder] for run in group.runs if run.folder in measured]
        mean = {name: 100 * fmean(values[name] for values in own) for name in own[0]}
        panels.append(Map(group.label, *layers_by_matrices(mean)))
    largest = max(v for panel in panels for row in panel.cells for v in row if v is not None)
    form = ".0f" if largest >= 20 else ".1f" if largest >= 2 else ".2f"
    return figures.maps(panels, "Change (% of the start)", form, 0)
