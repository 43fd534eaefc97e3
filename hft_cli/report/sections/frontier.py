"""Report: what is retained at equal skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hft_cli.report import stats
from hft_cli.report.groups import MEASURES, Comparison, Group, cells_of, groups, less_rate, order, sample_note
from hft_cli.report.stats import estimate
from hft_cli.report.tables import Plot, Record, Section, Table, Value, estimated, percent, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def frontier_section(lot: Comparison) -> Section | None:
    """Retention at equal skill along sweeps of the learning rate, seed by seed."""
    by: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups([run for run in lot.runs if run.row.skill is not None and run.row.retained is not None]):
        by.setdefault(group.runs[0].without("train.learning_rate"), []).append(group)
    sweeps = [sorted(own, key=lambda g: g.first.learning_rate or 0) for own in by.values()
              if len({g.first.learning_rate for g in own if g.first.learning_rate}) > 1]  # fmt: skip
    sweeps.sort(key=lambda own: (order(own[0].first.label), own[0].label))
    if len(sweeps) < 2:
        return None
    paths = [_paths(own) for own in sweeps]
    names = [less_rate(own[0]) for own in sweeps]
    spans = [(min(s for s, _ in path), max(s for s, _ in path)) for own in paths for path in own.values()]
    low, high = max(a for a, _ in spans), min(b for _, b in spans)
    shown = [group for own in sweeps for group in own]
    text = [
        "Methods learn at different speeds, so that at one learning rate the one that learns less may only seem to "
        "keep more. Here retention is compared at equal skill: for each seed the runs of a method are joined by "
        "straight lines in the order of the learning rate, and retention is read off where that path passes the skill, "
        "at the better place if it passes it twice. Nothing is extrapolated.",
    ]
    parts: list[Table | Plot] = []
    stem = lot.stem("frontier")
    if low <= high:
        levels = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
        records = [_at_skill(skill, names, paths) for skill in levels]
        columns = [("skill (%)", percent("skill")), *((name, spread(name)) for name in names)]
        columns += [(f"{name} − {names[0]}", spread(f"{name} - {names[0]}", signed=True)) for name in names[1:]]
        caption = (
            "Retention (%) at equal skill, over the skills that every method and seed reached: mean ± standard "
            "deviation [95% t interval over seeds]; differences are paired by seed, in points. " + sample_note(shown)
        )
        parts.append(Table(stem, caption, columns, records))
    else:
        text.append(
            f"There is no skill that every method and seed reached: the least of one is {low:.1%}, the most of another "
            f"{high:.1%}. Take more learning rates."
        )

    def draw() -> Figure:
        from hft_cli.report import figures
        from hft_cli.report.figures import Dot, Series

        series = []
        for name, own, by_seed in zip(names, sweeps, paths, strict=True):
            label = own[0].first.label
            style = label if [o[0].first.label for o in sweeps].count(label) == 1 else name
            for i, path in enumerate(by_seed.values()):
                dots = tuple(Dot(100 * skill, 100 * kept) for skill, kept in path)
                series.append(Series(name if i == 0 else "_" + name, style, {"path": dots}))
        return figures.paths(series, MEASURES["skill"][0], MEASURES["retained"][0])

    caption = (
        "Retention against skill; a line for each method and seed, through its runs in the order of the learning rate "
        f"({', '.join(f'{rate:g}' for rate in sorted({g.first.learning_rate or 0 for g in shown}))}). Up and right is "
        f"better. {sample_note(shown)}"
    )
    parts.append(Plot(stem, caption, draw))
    return Section(lot.title("Retention at equal skill"), text, parts)


def _paths(sweep: Sequence[Group]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Data and draw seed -> (skill, retention) in the order of the learning rate, where it has two rates or more."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for group in sweep:
        kept = cells_of(group, lambda row: row.retained)
        for key, skill in cells_of(group, lambda row: row.skill).items():
            found.setdefault(key, []).append((skill, kept[key]))
    whole = {key: path for key, path in found.items() if len(path) > 1}
    return whole or found


def _at_skill(skill: float, names: Sequence[str], paths: Sequence[Mapping[tuple[int, int], list[tuple[float, float]]]]
              ) -> Record:  # fmt: skip
    record: dict[str, Value] = {"skill": skill}
    read = [{key: stats.along(path, skill) for key, path in own.items()} for own in paths]
    for name, own in zip(names, read, strict=True):
        record |= estimated(name, estimate([value for value in own.values() if value is not None]))
    for name, own in zip(names[1:], read[1:], strict=True):
        pairs = [(value, read[0].get(key)) for key, value in own.items()]
        apart = [a - b for a, b in pairs if a is not None and b is not None]
        record |= estimated(f"{name} - {names[0]}", estimate(apart))
    return record
