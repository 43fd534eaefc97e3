"""The measures of a comparison: estimates over seeds, as columns of tables and points of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from hft_cli.report import mixed
from hft_cli.report.figures import charts
from hft_cli.report.figures.charts import Point, Series
from hft_cli.report.groups import Group, grouped
from hft_cli.report.runs import RunRow
from hft_cli.report.stats import Estimate
from hft_cli.report.tables import Column, Plot, Table, Value, estimate_cell, estimate_fields
from hft_cli.text import plural

Score = Callable[[RunRow], float | None]  # a score of a run as a share; None if it was not scored


@dataclass(frozen=True)
class Measure:
    """A measure with its label on axes and in tables. `signed`: a difference, shown with its sign."""

    label: str
    score: Score
    signed: bool = False

    @property
    def points(self) -> str:
        """The label of a difference of two such measures."""
        return self.label.split(" (")[0] + " (points)"

    @property
    def share(self) -> bool:
        """Whether it is a share of 1, which no interval leaves."""
        return not self.signed


MEASURES = {
    "skill": Measure("Learned (points)", lambda row: row.skill, signed=True),
    "retained": Measure("Retained (% of before)", lambda row: row.retained),
    "op": Measure("OP (%)", lambda row: row.op),
    "bwt": Measure("BWT (points)", lambda row: row.bwt, signed=True),
}

INTERVAL_NOTE = (
    "Intervals are at the 95% level: a mixed model in which data seeds and draw seeds are random, by restricted "
    "maximum likelihood with Satterthwaite's degrees of freedom, also where runs are missing; Student's t where no "
    "runs share a seed. Those of shares are intervals of logits and stay between 0 and 100. With fewer than five "
    "values their range stands before the interval, which cannot know of modes that no run shows."
)

POINTS_NOTE = "Means over seeds with 95% intervals; each small dot is one run."


def seed_scores(group: Group, score: Score) -> dict[tuple[int, int], float]:
    """(data seed, draw seed) -> the score; a mean if the same seeds were run twice."""
    runs = grouped(group.runs, lambda run: (run.row.seed or 0, run.draw_seed or 0))
    scores = {seeds: [value for run in same if (value := score(run.row)) is not None] for seeds, same in runs.items()}
    return {seeds: fmean(values) for seeds, values in scores.items() if values}


def over_seeds(group: Group, score: Score, share: bool = False) -> tuple[Estimate | None, str]:
    """The mean of a score over the seeds, and what its interval is of: a mixed model, t, or none."""
    return mixed.over_seeds(seed_scores(group, score), share)


def differences(group: Group, other: Group, score: Score) -> dict[tuple[int, int], float]:
    """(data seed, draw seed) -> the score of a group less that of the other with the same data seed.

    If both have the draw, theirs are compared. Otherwise the other's mean over its draws of the data seed counts: full
    fine-tuning has no draws. So draws that differ are seen in the interval.
    """
    theirs = seed_scores(other, score)
    by_data = grouped(theirs.items(), lambda item: item[0][0])
    means = {seed: fmean(value for _, value in items) for seed, items in by_data.items()}
    ours = seed_scores(group, score)
    return {seeds: value - theirs.get(seeds, means[seeds[0]]) for seeds, value in ours.items() if seeds[0] in means}


def measured_in(groups: Iterable[Group]) -> list[str]:
    """The measures that some of the groups have. If all runs are sequences, skill is the same as OP and is left out."""
    rows = [run.row for group in groups for run in group.runs]
    keys = [key for key, measure in MEASURES.items() if any(measure.score(row) is not None for row in rows)]
    return [key for key in keys if key != "skill" or any(row.op is None for row in rows)]


def measure_fields(group: Group, keys: Iterable[str]) -> dict[str, Value]:
    """The estimates of measures as fields of a record."""
    fields: dict[str, Value] = {}
    for key in keys:
        fields |= estimate_fields(key, over_seeds(group, MEASURES[key].score, MEASURES[key].share)[0])
    return fields


def measure_columns(keys: Iterable[str]) -> list[Column]:
    return [(MEASURES[key].label, estimate_cell(key, MEASURES[key].signed)) for key in keys]


def setting_fields(group: Group) -> dict[str, Value]:
    """What a group is, as fields of a record."""
    row = group.row
    return {
        "setting": group.label,
        "method": row.method,
        "continual": row.continual or None,
        "level": row.level,
        "ratio": row.ratio,
        "learning_rate": row.learning_rate,
        "runs": len(group.runs),
        "data_seeds": len({run.row.seed for run in group.runs}),
        "draw_seeds": len({run.draw_seed for run in group.runs}),
    }


def sample_note(groups: Sequence[Group]) -> str:
    """How many runs and seeds are behind a table or a figure."""
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({run.row.seed for run in runs if run.row.seed is not None})
    draw_seeds = sorted({run.draw_seed for run in runs if run.draw_seed is not None})
    note = f"Based on {plural(len(runs), 'run')}, {plural(len(seeds), 'data seed')} ({_first(seeds)})"
    if draw_seeds != seeds:
        note += f", {plural(len(draw_seeds), 'draw seed')} ({_first(draw_seeds)})"
    sizes = [len(group.runs) for group in groups]
    if max(sizes) == 1:
        note += "; each setting has one run and therefore no interval"
    elif min(sizes) == 1:
        note += "; settings with one run have no interval"
    return note + "."


def _first(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def point(group: Group, key: str, x: float = 0) -> Point | None:
    """A measure over the seeds as a point of a figure, in percent or points."""
    score = MEASURES[key].score
    estimate, _ = over_seeds(group, score, MEASURES[key].share)
    if estimate is None:
        return None
    low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    values = tuple(100 * value for value in seed_scores(group, score).values())
    return Point(x, 100 * estimate.mean, low, high, values)


@dataclass(frozen=True)
class Line:
    """Groups at their x, shown as one line of a figure. Lines of one `style` look the same."""

    label: str
    style: str
    points: Sequence[tuple[float, Group]]
    joined: bool = True

    def series(self, keys: Iterable[str]) -> Series:
        """The line with a panel for each measure."""
        panels = {key: tuple(p for x, group in self.points if (p := point(group, key, x)) is not None) for key in keys}
        return Series(self.label, self.style, panels, self.joined)


@dataclass(frozen=True)
class Ablation:
    """What changes along the x axis. `fields` are fields of a run's row that the table has besides the setting's."""

    xlabel: str
    caption: str
    columns: Sequence[Column]
    ticks: Mapping[float, str] | None = None
    fields: Sequence[str] = ()


def table_and_curves(stem: str, ablation: Ablation, lines: Sequence[Line]) -> list[Table | Plot]:
    """The measures of all groups on the lines, as a table and as curves."""
    groups = [group for line in lines for _, group in line.points]
    keys = measured_in(groups)
    caption = f"{ablation.caption} {sample_note(groups)}"
    records = [
        setting_fields(g) | {field: getattr(g.row, field) for field in ablation.fields} | measure_fields(g, keys)
        for g in groups
    ]
    panels = {key: MEASURES[key].label for key in keys}
    draw = partial(charts.curves, [line.series(keys) for line in lines], panels, ablation.xlabel, ablation.ticks)
    return [
        Table(stem, f"{caption} {INTERVAL_NOTE}", [*ablation.columns, *measure_columns(keys)], records),
        Plot(stem, f"{caption} {POINTS_NOTE}", draw),
    ]
