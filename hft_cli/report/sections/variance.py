"""Report: how much of the variance is the draw's, and which matrices matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from hft_cli.checkpoint.naming import category, layer_and_matrix
from hft_cli.report import stats
from hft_cli.report.groups import MEASURES, Comparison, Group, cells_of, groups, measured_in, sample_note
from hft_cli.report.runs import Run
from hft_cli.report.sections.draws import ledger
from hft_cli.report.tables import Plot, Record, Section, Table, Value, chance, interval, percent, plain
from hft_cli.text import natural_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def variance(lot: Comparison) -> Section | None:
    shares, effects, text = [], [], []
    found = groups(lot.runs)
    used: list[Group] = []
    for group in found:
        records = _shares(group)
        if records:
            shares += records
            used.append(group)
        drawn = {ledger(run) for run in group.runs if run.draws}
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
            f"Shares of few seeds are rough. {sample_note(used)}"
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
    from hft_cli.report import figures

    shown = [record for record in records if record["draw"] is not None]
    several = len({record["setting"] for record in records}) > 1
    labels = [f"{record['setting']}: {record['measure']}" if several else str(record["measure"]) for record in shown]
    shares = [[float(record[part] or 0) for part in ("draw", "data", "rest")] for record in shown]
    return figures.parts(labels, shares, ["draw", "data", "interaction and noise"], "Share of the variance (%)")


FAMILIES: dict[str, Callable[[int, str], str]] = {
    "category": lambda layer, matrix: category(matrix),
    "layer": lambda layer, matrix: f"layer {layer}",
    "matrix": lambda layer, matrix: matrix.rsplit(".", 1)[-1],
}


def counts(run: Run, family: str) -> dict[str, int]:
    """How many matrices a run updated over its rounds, by category, layer or name."""
    found: Counter[str] = Counter()
    for drawn in run.draws:
        names = {layer_and_matrix(name): name in drawn.updated for name in sorted(drawn.updated | drawn.frozen)}
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
                by.setdefault(ledger(run), []).append((run, value))
        means = [fmean(value for _, value in own) for own in by.values()]
        for family in FAMILIES:
            rows = [counts(own[0][0], family) for own in by.values()]
            terms = sorted({term for row in rows for term in row}, key=natural_order)
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
    drawn = len({ledger(run) for run in group.runs})
    said = [
        f"{group.label}: effects by {family} need {need} different draws or more; there are {drawn}."
        for family, need in short_of.items()
    ]
    return records, said


def _effect_dots(records: Sequence[Record]) -> Figure:
    from hft_cli.report import figures
    from hft_cli.report.figures import Dot

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
