"""Section: retention at equal skill, along sweeps of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from hft_cli.report import mixed
from hft_cli.report.figures import charts
from hft_cli.report.figures.charts import Point, Series
from hft_cli.report.groups import Comparison, Group, families, group_runs, method_order
from hft_cli.report.measures import MEASURES, sample_note, seed_scores
from hft_cli.report.stats import Estimate, attained, mean_gap
from hft_cli.report.tables import (
    Plot,
    Record,
    Section,
    Table,
    Value,
    columns,
    estimate_cell,
    estimate_fields,
    percent,
    plain,
)

Paths = Mapping[tuple[int, int], list[tuple[float, float]]]  # (data seed, draw seed) -> (skill, retention) by rate
NamedPaths = Sequence[tuple[str, Paths]]  # those of each sweep

TEXT = (
    "Methods learn at different speeds. At one learning rate, a method that learns less may only seem to forget less. "
    "This section therefore compares retention at equal skill. For each method and seed, what is retained at a skill "
    "is the best retention among its runs that learned at least so much (the attained frontier). Nothing is "
    "interpolated between runs: a coarse grid of learning rates cannot make a method better than any of its runs."
)

FEWEST_RATES = 6  # with fewer, the frontier is a few steps
LARGEST_STEP = 0.1  # of skill, between runs of neighbouring learning rates


@dataclass(frozen=True)
class Gap:
    """How much more a method retains than another one at equal skill, on average over the skills that both reach.

    Attributes:
        estimate: over seeds, as a share.
        wins: seeds in which the gap is above 0.
    """

    method: str
    other: str
    estimate: Estimate
    wins: int


def section(comparison: Comparison) -> Section | None:
    sweeps = sweeps_of_rates(comparison)
    if len(sweeps) < 2:
        return None
    paths = named_paths(sweeps)
    spans = [(min(path)[0], max(path)[0]) for _, by_seed in paths for path in by_seed.values()]
    low, high = max(start for start, _ in spans), min(end for _, end in spans)
    note = sample_note([group for sweep in sweeps for group in sweep])
    tables = [_gaps_table(comparison.stem("gaps"), gaps(paths), note)]
    text = [TEXT, _resolution_text(resolution(paths))]
    if low > high:
        text.append(
            f"No skill was reached by every method and seed: the lowest skill of one is {low:.1%}, the highest skill "
            f"of another is {high:.1%}. Run more learning rates."
        )
    else:
        tables.append(_table(comparison.stem("frontier"), paths, low, high, note))
    return Section(comparison.title("Retention at equal skill"), text, tables)


def frontier_plot(comparison: Comparison) -> Plot | None:
    """The attained frontiers of all methods; None without two sweeps of the learning rate."""
    sweeps = sweeps_of_rates(comparison)
    if len(sweeps) < 2:
        return None
    members = [group for sweep in sweeps for group in sweep]
    rates = sorted({group.row.learning_rate or 0 for group in members})
    caption = (
        "Retention over skill: the attained frontier of each method and seed, and its runs (dots), over learning rates "
        f"{', '.join(f'{rate:g}' for rate in rates)}. Up and right is better. {sample_note(members)}"
    )
    labels = [MEASURES[key].label for key in ("skill", "retained")]
    return Plot(comparison.stem("frontier"), caption, partial(charts.frontiers, _series(sweeps), *labels))


def sweeps_of_rates(comparison: Comparison) -> list[list[Group]]:
    """The groups of each method that differ in the learning rate only, by rate; methods with one rate are left out."""
    runs = [run for run in comparison.runs if run.row.skill is not None and run.row.retained is not None]
    sweeps = [
        sorted(family, key=lambda group: group.row.learning_rate or 0)
        for family in families(group_runs(runs), "train.learning_rate")
        if len({group.row.learning_rate for group in family if group.row.learning_rate}) > 1
    ]
    return sorted(sweeps, key=lambda sweep: (method_order(sweep[0].row.label), sweep[0].label))


def named_paths(sweeps: Sequence[Sequence[Group]]) -> list[tuple[str, Paths]]:
    return [(sweep[0].label_without_rate, _paths(sweep)) for sweep in sweeps]


def gaps(paths: NamedPaths) -> list[Gap]:
    """The mean gap of each method to the first, paired by seed."""
    (first, baseline), *others = paths
    found = []
    for name, by_seed in others:
        values = {
            seeds: gap
            for seeds, path in by_seed.items()
            if (other := _same_seed(baseline, seeds)) is not None and (gap := mean_gap(path, other)) is not None
        }
        estimate, _ = mixed.over_seeds(values)
        if estimate is not None:
            found.append(Gap(name, first, estimate, sum(value > 0 for value in values.values())))
    return found


def _same_seed(paths: Paths, seeds: tuple[int, int]) -> list[tuple[float, float]] | None:
    """The path of the same seeds, or of the same data seed: full fine-tuning has no draws."""
    if seeds in paths:
        return paths[seeds]
    return next((path for (data, _), path in paths.items() if data == seeds[0]), None)


@dataclass(frozen=True)
class Resolution:
    """How fine the grid of learning rates is.

    Attributes:
        fewest: rates of a path, at least.
        step: of skill between neighbouring rates, at most.
        equal: whether all paths have as many.
    """

    fewest: int
    step: float
    equal: bool

    @property
    def coarse(self) -> bool:
        return self.fewest < FEWEST_RATES or self.step > LARGEST_STEP


def resolution(paths: NamedPaths) -> Resolution:
    every = [path for _, by_seed in paths for path in by_seed.values()]
    skills = [sorted(skill for skill, _ in path) for path in every]
    step = max((high - low for each in skills for low, high in pairwise(each)), default=0.0)
    return Resolution(min(map(len, every)), step, len({len(path) for path in every}) == 1)


def _resolution_text(grid: Resolution) -> str:
    """How fine the grid is, and what to do if it is coarse."""
    text = (
        f"A path has {grid.fewest} learning rates at least; the largest step of skill between two of them is "
        f"{grid.step:.1%}."
    )
    if not grid.equal:
        text += " Methods have unequal numbers of rates, which favours those with more: run the same for all."
    if grid.coarse:
        text += (
            f" The grid is coarse: gaps can be off by as much as a step. Run {FEWEST_RATES} rates or more, closer "
            "where skill changes."
        )
    return text


def _gaps_table(stem: str, found: Sequence[Gap], note: str) -> Table:
    records: list[Record] = [
        {"method": gap.method, "against": gap.other, **estimate_fields("gap", gap.estimate), "wins": gap.wins}
        for gap in found
    ]
    shown = [
        *columns("method"),
        ("minus", plain("against")),
        ("retained at equal skill (points)", estimate_cell("gap", signed=True)),
        ("seeds in which it retains more", plain("wins")),
        ("seeds", plain("gap_n")),
    ]
    caption = f"The mean gap of retention at equal skill, over the skills that both reach, paired by seed. {note}"
    return Table(stem, caption, shown, records)


def _paths(sweep: Sequence[Group]) -> Paths:
    """The path of each pair of seeds. Pairs with one learning rate only are left out, unless all are such."""
    paths: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for group in sweep:
        retained = seed_scores(group, lambda row: row.retained)
        for seeds, skill in seed_scores(group, lambda row: row.skill).items():
            paths.setdefault(seeds, []).append((skill, retained[seeds]))
    return {seeds: path for seeds, path in paths.items() if len(path) > 1} or paths


def _table(stem: str, paths: NamedPaths, low: float, high: float, note: str) -> Table:
    """Retention at five skills between `low` and `high`."""
    skills = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
    first, *others = (name for name, _ in paths)
    shown = [("skill (%)", percent("skill")), *((name, estimate_cell(name)) for name, _ in paths)]
    shown += [(f"{name} − {first}", estimate_cell(f"{name} - {first}", signed=True)) for name in others]
    caption = (
        "Retention (%) at equal skill, over the skills that every method and seed reached: mean ± standard deviation "
        f"[95% interval over seeds]. Differences are paired by seed, in points. {note}"
    )
    return Table(stem, caption, shown, [_at_skill(skill, paths) for skill in skills])


def _at_skill(skill: float, paths: NamedPaths) -> Record:
    """The retention of each method at a skill, and its difference from that of the first method."""
    record: dict[str, Value] = {"skill": skill}
    retained = [
        (name, {seeds: value for seeds, path in by_seed.items() if (value := attained(path, skill)) is not None})
        for name, by_seed in paths
    ]
    for name, values in retained:
        record |= estimate_fields(name, mixed.over_seeds(values, share=True)[0])
    (first, baseline), *others = retained
    for name, values in others:
        differences = {seeds: value - baseline[seeds] for seeds, value in values.items() if seeds in baseline}
        record |= estimate_fields(f"{name} - {first}", mixed.over_seeds(differences)[0])
    return record


def _series(sweeps: Sequence[Sequence[Group]]) -> list[Series]:
    """A series for each path. Only the first of a method has a label for the legend."""
    methods = [sweep[0].row.label for sweep in sweeps]
    series = []
    for method, (name, by_seed) in zip(methods, named_paths(sweeps), strict=True):
        style = method if methods.count(method) == 1 else name
        for i, path in enumerate(by_seed.values()):
            points = tuple(Point(100 * skill, 100 * retained) for skill, retained in path)
            series.append(Series("_" + name if i else name, style, {"path": points}))
    return series
