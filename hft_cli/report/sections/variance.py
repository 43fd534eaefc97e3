"""Section: how much of the variance comes from the draw, and what updating each kind of matrix does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import numpy as np

from hft_cli.checkpoint.naming import category, layer_and_matrix
from hft_cli.report.figures import charts
from hft_cli.report.figures.charts import Point
from hft_cli.report.groups import Comparison, Group, grouped
from hft_cli.report.measures import MEASURES, measured_in, sample_note, seed_scores
from hft_cli.report.runs import Run
from hft_cli.report.stats import full_grid, max_t, regress, share_intervals, variance_components
from hft_cli.report.tables import Plot, Record, Section, Table, Value, columns, estimate_cell, p_value, percent, plain
from hft_cli.text import natural_order

# What the effects of matrices are summed by: from a layer and a matrix to a term of the regression.
FAMILIES: dict[str, Callable[[int, str], str]] = {
    "category": lambda layer, matrix: category(matrix),
    "layer": lambda layer, matrix: f"layer {layer}",
    "matrix": lambda layer, matrix: matrix.rsplit(".", 1)[-1],
}

FEWEST_DRAWS = 5  # for effects: of four, a permutation test cannot tell anything at the 5% level
MOST_EFFECTS = 60  # in the figure

VARIANCE_CAPTION = (
    "Shares of the variance between runs that come from the draw (selection.seed), from the data (seed: order and "
    "replay), and from the rest, which is their interaction and the noise. Two-way random-effects analysis of variance "
    "by expected mean squares; a negative estimate is set to 0 and noted. In brackets 95% intervals by a parametric "
    "bootstrap of a table of this size. p: F test of no effect."
)

EFFECTS_CAPTION = (
    "The effect of updating one more matrix in one more round, in points, with 95% t intervals: least squares over the "
    "draws, of each draw's mean over its data seeds. The draws are random, so this is a randomised experiment. A draw "
    "that updates one matrix more updates another one less; effects are therefore relative to the mean of the matrices "
    "that replace each other. If the level of selection fixes a number, its effect cannot be estimated. p is that of a "
    "permutation of the draws, adjusted over all terms of a measure and a way to sum them (max-t)."
)


def section(comparison: Comparison) -> Section | None:
    shares = {group.label: _variance_records(group) for group in comparison.groups}
    effects: list[Record] = []
    text: list[str] = []
    for group in comparison.groups:
        if len({run.updated_by_round for run in group.runs if run.draws}) >= FEWEST_DRAWS:
            records, notes = _effect_records(group)
            effects += records
            text += notes
    parts: list[Table | Plot] = []
    if any(shares.values()):
        note = sample_note([group for group in comparison.groups if shares[group.label]])
        records = [record for group_records in shares.values() for record in group_records]
        parts += _variance_parts(comparison.stem("variance"), f"{VARIANCE_CAPTION} {note}", records)
    if effects:
        parts += _effect_parts(comparison.stem("effects"), effects)
    return Section(comparison.title("Draws against data"), text, parts) if parts or text else None


def _variance_records(group: Group) -> list[Record]:
    """A record for each measure, if the group's draw seeds and data seeds are crossed."""
    records: list[Record] = []
    for key in measured_in([group]):
        cells = {(draw, data): value for (data, draw), value in seed_scores(group, MEASURES[key].score).items()}
        rows, columns = full_grid(cells.keys())
        if min(len(rows), len(columns)) < 2:
            continue
        parts = variance_components([[cells[row, column] for column in columns] for row in rows])
        names = {"rows": "draw", "columns": "data"}
        notes = [f"the estimate of the {names[factor]} was negative and is set to 0" for factor in parts.floored]
        ends: dict[str, Value] = {}
        if parts.total > 0:
            intervals = share_intervals(parts, len(rows), len(columns))
            for part, (low, high) in zip(("draw", "data", "rest"), intervals, strict=True):
                ends |= {f"{part}_low": low, f"{part}_high": high}
        if left_out := len(cells) - len(rows) * len(columns):
            notes.append(f"{left_out} runs outside the full grid are left out")
        if parts.total == 0:
            notes = ["nothing varies"]
        records.append({
            "setting": group.label, "measure": key, "grid": f"{len(rows)} x {len(columns)}", "draws": len(rows),
            "data_seeds": len(columns), "sd": parts.total**0.5, "draw": parts.share(parts.of_rows),
            "data": parts.share(parts.of_columns), "rest": parts.share(parts.rest), "p_draw": parts.p_rows,
            "p_data": parts.p_columns, "note": "; ".join(notes) or None, **ends,
        })  # fmt: skip
    return records


def _variance_parts(stem: str, caption: str, records: Sequence[Record]) -> list[Table | Plot]:
    shown = [
        *columns("setting", "measure"), ("draws x data", plain("grid")), ("sd (points)", percent("sd")),
        ("draw (%)", estimate_cell("draw")), ("data (%)", estimate_cell("data")), ("rest (%)", estimate_cell("rest")),
        ("p draw", p_value("p_draw")), ("p data", p_value("p_data")), *columns("note"),
    ]  # fmt: skip
    varying = [record for record in records if record["draw"] is not None]
    bars = [[float(record[part] or 0) for part in ("draw", "data", "rest")] for record in varying]
    draw = partial(charts.stacked_bars, _labels(records, varying, "measure"), bars,
                   ["draw", "data", "interaction and noise"], "Share of the variance (%)")  # fmt: skip
    return [Table(stem, caption, shown, records), Plot(stem, caption, draw)]


def _labels(records: Sequence[Record], shown: Sequence[Record], key: str) -> list[str]:
    """Labels of rows in a figure, with the setting if there are several."""
    several = len({record["setting"] for record in records}) > 1
    return [f"{record['setting']}: {record[key]}" if several else str(record[key]) for record in shown]


def _effect_records(group: Group) -> tuple[list[Record], list[str]]:
    """The effects of each family on each measure, and notes on the families that need more draws."""
    records: list[Record] = []
    needed: dict[str, int] = {}
    for key in measured_in([group]):
        score = MEASURES[key].score
        runs = [run for run in group.runs if run.draws and score(run.row) is not None]
        by_draw = list(grouped(runs, lambda run: run.updated_by_round).values())
        means = [fmean(score(run.row) or 0 for run in same) for same in by_draw]
        for family in FAMILIES:
            counts = [updates(same[0], family) for same in by_draw]
            terms = sorted({term for count in counts for term in count}, key=natural_order)
            features = np.array([[count[term] for term in terms] for count in counts], float)
            effects, adjusted = regress(features, means), max_t(features, means)
            if effects is None or adjusted is None:
                varying = int((np.ptp(features, axis=0) > 0).sum())
                needed |= {family: max(varying + 2, FEWEST_DRAWS)} if varying else {}
                continue
            for term, effect, p in zip(terms, effects, adjusted, strict=True):
                records.append({
                    "setting": group.label, "measure": key, "family": family, "term": term,
                    "effect": effect.mean if effect else None, "effect_low": effect.low if effect else None,
                    "effect_high": effect.high if effect else None, "draws": len(by_draw),
                    "p": p, "note": None if effect else "the same in every draw",
                })  # fmt: skip
    drawn = len({run.updated_by_round for run in group.runs})
    notes = [f"{group.label}: effects by {family} need {number} different draws or more; there are {drawn}."
             for family, number in needed.items()]  # fmt: skip
    return records, notes


def updates(run: Run, family: str) -> Counter[str]:
    """How many matrices a run updated over its rounds, by category, layer or name."""
    counts: Counter[str] = Counter()
    for draw in run.draws:
        places = {layer_and_matrix(name): name in draw.updated for name in sorted(draw.updated | draw.frozen)}
        for place, updated in places.items():
            if place is not None:
                counts[FAMILIES[family](*place)] += updated
    return counts


def _effect_parts(stem: str, records: Sequence[Record]) -> list[Table | Plot]:
    shown = [
        *columns("setting", "measure"), ("by", plain("family")), ("updated", plain("term")),
        ("effect (points)", estimate_cell("effect", signed=True)), ("p", p_value("p")), *columns("draws", "note"),
    ]  # fmt: skip
    estimated = [record for record in records if record["effect"] is not None]
    rows = grouped(zip(_labels(estimated, estimated, "term"), estimated, strict=True), lambda pair: pair[0])
    by_measure = [{str(record["measure"]): record for _, record in pairs} for pairs in rows.values()][:MOST_EFFECTS]
    panels = {
        MEASURES[measure].points: [_effect_point(row.get(measure)) for row in by_measure]
        for measure in dict.fromkeys(str(record["measure"]) for record in estimated)
    }
    styles = [str(next(iter(row.values()))["family"]) for row in by_measure]
    draw = partial(charts.forest, list(rows)[:MOST_EFFECTS], styles, panels)
    return [Table(stem, EFFECTS_CAPTION, shown, records), Plot(stem, f"The same effects. {EFFECTS_CAPTION}", draw)]


def _effect_point(record: Record | None) -> Point | None:
    if record is None:
        return None
    mean, low, high = (100 * float(record[key] or 0) for key in ("effect", "effect_low", "effect_high"))
    return Point(0, mean, low, high)
