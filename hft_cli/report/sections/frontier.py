"""Section: retention at equal skill, along sweeps of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from hft_cli.report.figures import charts
from hft_cli.report.figures.charts import Point, Series
from hft_cli.report.groups import Comparison, Group, families, group_runs, method_order
from hft_cli.report.measures import MEASURES, sample_note, seed_scores
from hft_cli.report.stats import estimate, interpolate
from hft_cli.report.tables import Plot, Record, Section, Table, Value, estimate_cell, estimate_fields, percent

Paths = Mapping[tuple[int, int], list[tuple[float, float]]]  # (data seed, draw seed) -> (skill, retention) by rate
NamedPaths = Sequence[tuple[str, Paths]]  # those of each sweep

TEXT = (
    "Methods learn at different speeds. At one learning rate, a method that learns less may only seem to forget less. "
    "This section therefore compares retention at equal skill. For each method and seed, the runs are joined by "
    "straight lines in the order of the learning rate, and retention is read off where this path passes the skill. If "
    "it passes the skill twice, the higher retention counts. Nothing is extrapolated."
)


def section(comparison: Comparison) -> Section | None:
    runs = [run for run in comparison.runs if run.row.skill is not None and run.row.retained is not None]
    sweeps = [sorted(family, key=lambda group: group.row.learning_rate or 0)
              for family in families(group_runs(runs), "train.learning_rate")
              if len({group.row.learning_rate for group in family if group.row.learning_rate}) > 1]  # fmt: skip
    if len(sweeps) < 2:
        return None
    sweeps.sort(key=lambda sweep: (method_order(sweep[0].row.label), sweep[0].label))
    paths = [(sweep[0].label_without_rate, _paths(sweep)) for sweep in sweeps]
    spans = [(min(path)[0], max(path)[0]) for _, by_seed in paths for path in by_seed.values()]
    low, high = max(start for start, _ in spans), min(end for _, end in spans)
    members = [group for sweep in sweeps for group in sweep]
    rates = sorted({group.row.learning_rate or 0 for group in members})
    caption = (
        "Retention over skill. Each line is one method and seed, through its runs in the order of the learning rate "
        f"({', '.join(f'{rate:g}' for rate in rates)}). Up and right is better. {sample_note(members)}"
    )
    labels = [MEASURES[key].label for key in ("skill", "retained")]
    stem = comparison.stem("frontier")
    plot = Plot(stem, caption, partial(charts.paths, _series(sweeps, paths), *labels))
    title = comparison.title("Retention at equal skill")
    if low > high:
        note = (
            f"No skill was reached by every method and seed: the lowest skill of one is {low:.1%}, the highest skill "
            f"of another is {high:.1%}. Run more learning rates."
        )
        return Section(title, [TEXT, note], [plot])
    return Section(title, [TEXT], [_table(stem, paths, low, high, sample_note(members)), plot])


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
        f"[95% t interval over seeds]. Differences are paired by seed, in points. {note}"
    )
    return Table(stem, caption, shown, [_at_skill(skill, paths) for skill in skills])


def _at_skill(skill: float, paths: NamedPaths) -> Record:
    """The retention of each method at a skill, and its difference from that of the first method."""
    record: dict[str, Value] = {"skill": skill}
    retained = [
        (name, {seeds: value for seeds, path in by_seed.items() if (value := interpolate(path, skill)) is not None})
        for name, by_seed in paths
    ]
    for name, values in retained:
        record |= estimate_fields(name, estimate(list(values.values())))
    (first, baseline), *others = retained
    for name, values in others:
        differences = [value - baseline[seeds] for seeds, value in values.items() if seeds in baseline]
        record |= estimate_fields(f"{name} - {first}", estimate(differences))
    return record


def _series(sweeps: Sequence[Sequence[Group]], paths: NamedPaths) -> list[Series]:
    """A series for each path. Only the first of a method has a label for the legend."""
    methods = [sweep[0].row.label for sweep in sweeps]
    series = []
    for method, (name, by_seed) in zip(methods, paths, strict=True):
        style = method if methods.count(method) == 1 else name
        for i, path in enumerate(by_seed.values()):
            points = tuple(Point(100 * skill, 100 * retained) for skill, retained in path)
            series.append(Series("_" + name if i else name, style, {"path": points}))
    return series
