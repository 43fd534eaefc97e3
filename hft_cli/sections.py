"""Runs -> the sections of a report: what is compared, over which seeds, and the caption that says so.

A section is there only if the runs have what it needs. Means are over counted runs alone (verified, or scored without
writing a model); what is not counted is in the first section.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from hft_cli import paper, stats
from hft_cli.gather import Group, Matrix, Row, Run, called, category, groups, items, natural, order, place
from hft_cli.norms import changes
from hft_cli.run_dir import RunDir
from hft_cli.schema import UserError
from hft_cli.stats import Estimate, estimate
from hft_cli.tables import (
    Plot,
    Record,
    Section,
    Table,
    Value,
    chance,
    estimated,
    interval,
    percent,
    plain,
    short,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hft_cli.figures import Dot, Series

Measure = Callable[[Row], float | None]
MEASURES: dict[str, tuple[str, Measure]] = {
    "skill": ("Skill learned (%)", lambda row: row.skill),
    "retained": ("Retained (%)", lambda row: row.retained),
    "op": ("OP (%)", lambda row: row.op),
    "bwt": ("BWT (points)", lambda row: row.bwt),
}
INTERVAL = (
    "Intervals are at 95%, by Student's t over the runs' means for each pair of seeds; where every data seed meets "
    "every draw seed, by the variances of the two (t with the smaller number less one), since such runs are not "
    "independent. Those of two or three seeds are wide, and may leave the scale."
)
MOST_PANELS = 6  # of maps in one figure


def sections(runs: Sequence[Run], norms: bool) -> list[Section]:
    """Every section that the runs have what it needs for, in the order in which they are read."""
    counted = [run for run in runs if run.counted]
    made: list[Section | None] = [_overview(runs)]
    for i, (name, own) in enumerate(_contexts(counted)):
        lot = Lot(name, "" if i == 0 else name, own)
        made += [part(lot) for part in (_methods, _ratios, _levels, _frontier, _matrices, _variance)]
    made += [_draws(counted), _norms(counted) if norms else None, _items(counted), _cost(counted)]
    return _once([section for section in made if section is not None])


@dataclass(frozen=True)
class Lot:
    """Runs on the same data. `name` tells it from the others in titles, `suffix` in the names of files."""

    name: str
    suffix: str
    runs: Sequence[Run]

    def title(self, text: str) -> str:
        return f"{text}: {self.name}" if self.name else text

    def stem(self, text: str) -> str:
        safe = "".join(sign if sign.isalnum() else "_" for sign in self.suffix)
        return f"{text}_{safe}" if safe else text


def _once(made: Sequence[Section]) -> list[Section]:
    """Leave out a table of the paper's that an earlier section has."""
    seen: set[str] = set()
    found = []
    for section in made:
        parts = [part for part in section.parts if part.name not in seen or not isinstance(part, Table)]
        seen |= {part.name for part in parts if isinstance(part, Table) and part.paper}
        found.append(replace(section, parts=parts))
    return found


def _contexts(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs whose scores can be compared: those on the same data, most runs first. One lot alone has no name."""
    by: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.row.scores:
            by.setdefault((*(run.setting.get(f"data.{key}", "") for key in ("name", "path", "test_path")),), []).append(
                run
            )
    if len(by) == 1:
        return [("", next(iter(by.values())))]
    names = Counter(key[0] for key in by)
    count: Counter[str] = Counter()
    found = []
    for key, own in sorted(by.items(), key=lambda item: -len(item[1])):
        count[key[0]] += 1
        found.append((key[0] if names[key[0]] == 1 else f"{key[0]} {count[key[0]]}", own))
    return found


# ------------------------------------------------------------------------------------------------------- what there is


def _overview(runs: Sequence[Run]) -> Section:
    counts = Counter(run.row.status for run in runs)
    left = [run.row for run in runs if not run.counted or run.row.note]
    text = [
        f"{len(runs)} runs: " + ", ".join(f"{number} {status}" for status, number in counts.most_common()) + ".",
        "Skill is the mean score on the test sets of what was trained, retention that on the suites, both after the "
        "last round. Means further down are over verified runs, and runs that were scored without writing a model.",
    ]
    parts: list[Table | Plot] = []
    if left:
        records = [{"run": row.run, "status": row.status, "note": row.note} for row in left]
        columns = [(key, plain(key)) for key in ("run", "status", "note")]
        caption = "Runs that something is wrong with. Those that are not verified count in no mean below."
        parts.append(Table("problems", caption, columns, records))
    return Section("The runs", text, parts)


# -------------------------------------------------------------------------------------------------- over the seeds


def _cells(group: Group, of: Measure) -> dict[tuple[int, int], float]:
    """Data seed and draw seed -> the measure; a mean, if the same was run twice."""
    cells: dict[tuple[int, int], list[float]] = {}
    for run in group.runs:
        value = of(run.row)
        if value is not None:
            cells.setdefault((run.row.seed or 0, run.draw_seed or 0), []).append(value)
    return {key: fmean(values) for key, values in cells.items()}


def _over_seeds(group: Group, of: Measure) -> tuple[Estimate | None, str]:
    """The measure's mean with its interval, and how that was made."""
    cells = _cells(group, of)
    rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    if min(len(rows), len(columns)) > 1 and len(cells) == len(rows) * len(columns):
        return stats.crossed([[cells[r, c] for c in columns] for r in rows]), "crossed"
    found = estimate(list(cells.values()))
    return found, "" if found is None else "t" if found.n > 1 else "none, n = 1"


def _seeds(group: Group) -> dict[str, Value]:
    return {
        "runs": len(group.runs),
        "data_seeds": len({run.row.seed for run in group.runs}),
        "draw_seeds": len({run.draw_seed for run in group.runs}),
    }


def _behind(found: Sequence[Group]) -> str:
    """How many runs and seeds are behind a figure."""
    runs = [run for group in found for run in group.runs]
    seeds = sorted({run.row.seed for run in runs if run.row.seed is not None})
    draws = sorted({run.draw_seed for run in runs if run.draw_seed is not None})
    text = f"{_count(len(runs), 'run')}, {_count(len(seeds), 'data seed')} ({_few(seeds)})"
    if draws != seeds:
        text += f", {_count(len(draws), 'draw seed')} ({_few(draws)})"
    least = min(len(group.runs) for group in found)
    return text + ("; one run a setting, so that there is no interval" if max(len(g.runs) for g in found) == 1 else
                   "; some settings have one run and no interval" if least == 1 else "") + "."  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _few(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")


def _setting(group: Group) -> dict[str, Value]:
    row = group.first
    return {
        "setting": group.label,
        "method": row.method,
        "continual": row.continual or None,
        "level": row.level,
        "ratio": row.ratio,
        "learning_rate": row.learning_rate,
        **_seeds(group),
    }


def _measured(found: Sequence[Group]) -> list[str]:
    """The measures that any of the groups has; a sequence's skill is its OP, and is not shown twice."""
    keys = [key for key, (_, of) in MEASURES.items() if any(of(run.row) is not None for g in found for run in g.runs)]
    if "op" in keys and all(run.row.op is not None for group in found for run in group.runs):
        keys = [key for key in keys if key != "skill"]
    return keys


def _dot(group: Group, key: str, x: float) -> Dot | None:
    """A measure over the seeds in percent or points, for a figure."""
    from hft_cli.figures import Dot

    of = MEASURES[key][1]
    found, _ = _over_seeds(group, of)
    if found is None:
        return None
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return Dot(x, 100 * found.mean, low, high, tuple(100 * value for value in _cells(group, of).values()))


def _series(label: str, style: str, found: Iterable[tuple[float, Group]], keys: Iterable[str], joined: bool) -> Series:
    from hft_cli.figures import Series

    pairs = list(found)
    panels = {key: tuple(dot for x, group in pairs if (dot := _dot(group, key, x)) is not None) for key in keys}
    return Series(label, style, panels, joined)


# ------------------------------------------------------------------------------------------------------------- methods


def _methods(lot: Lot) -> Section | None:
    found = groups(lot.runs)
    keys = _measured(found)
    if not keys:
        return None
    records: list[Record] = []
    for group in found:
        record = _setting(group)
        for key in MEASURES:
            mean, how = _over_seeds(group, MEASURES[key][1])
            record |= estimated(key, mean)
            record["interval"] = record.get("interval") or how or None
        records.append(record)
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("data seeds", plain("data_seeds")),
               ("draw seeds", plain("draw_seeds")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys),
               ("interval", plain("interval"))]  # fmt: skip
    caption = f"Each setting over its seeds: mean ± standard deviation [95% interval of the mean]. {_behind(found)}"
    parts: list[Table | Plot] = [Table(lot.stem("methods"), f"{caption} {INTERVAL}", columns, records)]
    differences, used = _differences(found, keys)
    if differences:
        columns = [("setting", plain("setting")), ("less", plain("against")),
                   *((MEASURES[key][0].split(" (")[0] + " (points)", spread(key, signed=True)) for key in keys),
                   ("seeds", plain(f"{keys[0]}_n"))]  # fmt: skip
        caption = (
            "Each setting less the one that updates everything and is else the same, in points, paired by data seed: "
            "mean ± standard deviation [95% t interval]. At the same learning rate methods do not learn the same; see "
            f"retention at equal skill. {_behind(used)}"
        )
        parts.append(Table(lot.stem("differences"), caption, columns, differences))
    shown = found[:40]
    parts.append(Plot(lot.stem("methods"), _forest_caption(found, shown), lambda: _forest(shown, keys)))
    if any(run.row.skill is not None and run.row.retained is not None for run in lot.runs):
        caption = (
            "Skill learned and facts retained against the learning rate, and against each other (up and right is "
            f"better); means over seeds with 95% intervals, each run a small dot. {_behind(found)}"
        )
        parts.append(Plot(lot.stem("tradeoff"), caption, lambda: _tradeoff(found)))
    text = []
    stages = {stage for run in lot.runs for stage in run.stages}
    if "sft" in stages and not any(run.tasks for run in lot.runs):
        parts.append(paper.sft())
    if "dpo" in stages:
        parts.append(paper.dpo())
    if any(run.row.method == "half_reset" for run in lot.runs):
        text.append(
            "The paper's Half-Reset (Llama-2-7B-chat with half of its matrices put back to Llama-2-7B) had slightly "
            "lower general abilities and basic knowledge clearly restored; it is not in the tables that we have of it."
        )
    return Section(lot.title("Methods"), text, parts)


def _forest_caption(found: Sequence[Group], shown: Sequence[Group]) -> str:
    more = f" The first {len(shown)} of {len(found)} settings; the table has all." if len(shown) < len(found) else ""
    shows = "Each setting's mean, its 95% interval (line, cut at the scale's ends) and its runs (strokes)."
    return f"{shows}{more} {_behind(shown)}"


def _forest(found: Sequence[Group], keys: Sequence[str]) -> Figure:
    from hft_cli import figures

    panels = [(MEASURES[key][0], [_dot(group, key, 0) for group in found]) for key in keys]
    return figures.forest([group.label for group in found], [group.first.label for group in found], panels)


def _tradeoff(found: Sequence[Group]) -> Figure:
    from hft_cli import figures

    scored = [g for g in found if g.first.skill is not None and g.first.retained is not None]
    families: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in scored:
        families.setdefault(group.runs[0].without("train.learning_rate"), []).append(group)
    several = Counter(own[0].first.label for own in families.values())
    series, taken = [], set()
    for own in sorted(families.values(), key=lambda own: (order(own[0].first.label), -len(own))):
        row = own[0].first
        label = row.label if several[row.label] == 1 else _less_rate(own[0])
        style = label if row.label in taken else row.label  # a method's longest sweep has the method's own look
        taken.add(row.label)
        pairs = [(group.first.learning_rate or 0, group) for group in own]
        series.append(_series(label, style, sorted(pairs, key=lambda p: p[0]), ("skill", "retained"), len(own) > 1))
    rates = sorted({group.first.learning_rate for group in scored if group.first.learning_rate})
    return figures.tradeoff(series, rates)


def _less_rate(group: Group) -> str:
    return group.label.replace(f" lr {group.runs[0].setting.get('train.learning_rate')}", "")


def _full(group: Group, found: Sequence[Group]) -> list[Group]:
    """The group that updates every matrix and is else set as this one, FFT for HFT, if there is one."""
    if group.first.method == "half_reset":
        return []
    rest = group.runs[0].without("method.name", "selection.")
    return [
        other
        for other in found
        if other.first.level == "all" and other.runs[0].without("method.name", "selection.") == rest
    ][:1]


def _differences(found: Sequence[Group], keys: Sequence[str]) -> tuple[list[Record], list[Group]]:
    """Each group less the one that updates everything, paired by data seed, over the draws of which a mean is taken."""
    records: list[Record] = []
    used: list[Group] = []
    for group in found:
        if group.first.level == "all" or not (whole := _full(group, found)):
            continue
        record: dict[str, Value] = {"setting": group.label, "against": whole[0].label}
        for key in keys:
            own, other = (_by_data_seed(one, MEASURES[key][1]) for one in (group, whole[0]))
            record |= estimated(key, estimate([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]))
        if any(record[key] is not None for key in keys):
            records.append(record)
            used += [group, *([] if whole[0] in used else whole)]
    return records, used


def _by_data_seed(group: Group, of: Measure) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for (seed, _), value in _cells(group, of).items():
        values.setdefault(seed, []).append(value)
    return {seed: fmean(own) for seed, own in values.items()}


# ------------------------------------------------------------------------------------------------------ ratios, levels


def _ratios(lot: Lot) -> Section | None:
    """Families by level and method that have two ratios or more, with the run that updates everything at ratio 1."""
    found = [group for group in groups(lot.runs) if group.first.continual != "lora"]
    parts_of = [group for group in found if group.first.level not in ("all", "lora")]
    by: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in parts_of:
        by.setdefault(group.runs[0].without("selection.ratio"), []).append(group)
    lines = []
    for own in by.values():
        if len({group.first.ratio for group in own}) < 2:
            continue
        lines.append(sorted([*own, *_full(own[0], found)], key=lambda group: group.first.ratio or 0))
    if not lines:
        return None
    shown = [group for line in lines for group in line]
    keys = _measured(shown)
    records = []
    for line in lines:
        for group in line:
            record = _setting(group) | {"updated": group.first.updated}
            for key in keys:
                record |= estimated(key, _over_seeds(group, MEASURES[key][1])[0])
            records.append(record)
    columns = [("setting", plain("setting")), ("ratio", short("ratio")), ("of all elements (%)", percent("updated")),
               ("runs", plain("runs")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys)]  # fmt: skip
    caption = (
        "Scores against selection.ratio, the share of the layers' matrices that is updated; ratio 1 updates all (FFT). "
        f"{_behind(shown)}"
    )

    def draw() -> Figure:
        from hft_cli import figures

        series = []
        for line in lines:
            first = next(group for group in line if group.first.level != "all")
            label = f"{first.first.label} {first.first.level}"
            if len(lines) > 1:
                label = first.label.replace(f" {first.runs[0].setting.get('selection.ratio')}", "", 1)
            series.append(_series(label, first.first.label if len(lines) == 1 else label,
                                  [(group.first.ratio or 0, group) for group in line], keys, True))  # fmt: skip
        return figures.curves(series, [(key, MEASURES[key][0]) for key in keys], "Ratio updated")

    text = ["The paper found the best scores near ratio 0.5, and good ones between 0.4 and 0.6 (Llama 2)."]
    stem = lot.stem("ratio")
    return Section(lot.title("Ratio"), text, [Table(stem, f"{caption} {INTERVAL}", columns, records), Plot(
        stem, f"{caption} Means over seeds with 95% intervals, each run a small dot.", draw)])  # fmt: skip


LEVELS = ("all", "model", "layer", "category")


def _levels(lot: Lot) -> Section | None:
    """Groups alike in all but the level, two levels or more besides all."""
    found = [group for group in groups(lot.runs) if group.first.level in LEVELS]
    by: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in found:
        if group.first.level != "all":
            by.setdefault(group.runs[0].without("selection.level"), []).append(group)
    sets = []
    for own in by.values():
        if len({group.first.level for group in own}) > 1:
            sets.append(sorted([*_full(own[0], found), *own], key=lambda group: LEVELS.index(group.first.level)))
    if not sets:
        return None
    shown = [group for own in sets for group in own]
    keys = _measured(shown)
    records = []
    for own in sets:
        for group in own:
            record = _setting(group)
            for key in keys:
                record |= estimated(key, _over_seeds(group, MEASURES[key][1])[0])
            records.append(record)
    columns = [("level", plain("level")), ("setting", plain("setting")), ("runs", plain("runs")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys)]  # fmt: skip
    caption = f"Where the updated half is drawn from, all else equal; all is full fine-tuning. {_behind(shown)}"

    def draw() -> Figure:
        from hft_cli import figures

        series = []
        for i, own in enumerate(sets):
            shift = (i - (len(sets) - 1) / 2) * 0.12
            last = own[-1]
            label = last.label.replace(f" {last.first.level}", "", 1)
            style = last.first.label if len(sets) == 1 else label
            pairs = [(LEVELS.index(group.first.level) + shift, group) for group in own]
            series.append(_series(label, style, pairs, keys, False))
        ticks = {float(i): level for i, level in enumerate(LEVELS)}
        return figures.curves(series, [(key, MEASURES[key][0]) for key in keys], "Level of the draw", ticks)

    stem = lot.stem("levels")
    parts: list[Table | Plot] = [
        Table(stem, f"{caption} {INTERVAL}", columns, records),
        Plot(stem, f"{caption} Means over seeds with 95% intervals, each run a small dot.", draw),
        paper.levels(),
    ]
    return Section(lot.title("Level of selection"), (), parts)


# ------------------------------------------------------------------------------------------------------------- frontier


def _frontier(lot: Lot) -> Section | None:
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
    names = [_less_rate(own[0]) for own in sweeps]
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
            "deviation [95% t interval over seeds]; differences are paired by seed, in points. " + _behind(shown)
        )
        parts.append(Table(stem, caption, columns, records))
    else:
        text.append(
            f"There is no skill that every method and seed reached: the least of one is {low:.1%}, the most of another "
            f"{high:.1%}. Take more learning rates."
        )

    def draw() -> Figure:
        from hft_cli import figures
        from hft_cli.figures import Dot, Series

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
        f"better. {_behind(shown)}"
    )
    parts.append(Plot(stem, caption, draw))
    return Section(lot.title("Retention at equal skill"), text, parts)


def _paths(sweep: Sequence[Group]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Data and draw seed -> (skill, retention) in the order of the learning rate, where it has two rates or more."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for group in sweep:
        kept = _cells(group, lambda row: row.retained)
        for key, skill in _cells(group, lambda row: row.skill).items():
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


# ------------------------------------------------------------------------------------------------------------ sequences


def _matrices(lot: Lot) -> Section | None:
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
        record = _setting(group)
        for key in ("op", "bwt", "retained"):
            record |= estimated(key, _over_seeds(group, MEASURES[key][1])[0])
        measures.append(record)
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("OP (%)", spread("op")),
               ("BWT (points)", spread("bwt", signed=True))]  # fmt: skip
    if any(record["retained"] is not None for record in measures):
        columns.append(("retained (%)", spread("retained")))
    caption = f"Overall performance and backward transfer (below 0 is forgetting). {_behind(found)} {INTERVAL}"
    parts: list[Table | Plot] = [Table(lot.stem("sequences"), caption, columns, measures)]
    for part, few in enumerate(_lots(found)):
        parts.append(
            Plot(
                lot.stem("r" if part == 0 else f"r_{part + 1}"),
                "R: the score (%) on each task (column) after each round (row); blank where it was not scored. The "
                f"last row makes OP, the last row less the diagonal BWT. Means over seeds. {_behind(few)}",
                partial(_r_maps, few),
            )
        )
    long_columns = [(key, plain(key)) for key in ("setting", "seed", "after", "task")] + [("score", percent("score"))]
    parts.append(Table(lot.stem("r"), "Every cell of R, run by run.", long_columns, cells, data=True))
    parts.append(paper.trace())
    return Section(lot.title("Sequences of tasks"), (), parts)


def _lots(found: Sequence[Group]) -> list[list[Group]]:
    return [list(found[i : i + MOST_PANELS]) for i in range(0, len(found), MOST_PANELS)]


def _r_maps(found: Sequence[Group]) -> Figure:
    from hft_cli import figures
    from hft_cli.figures import Map

    panels = []
    for group in found:
        tasks = [run.tasks for run in group.runs if run.tasks is not None]
        op, bwt = (_over_seeds(group, MEASURES[key][1])[0] for key in ("op", "bwt"))
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


# ------------------------------------------------------------------------------------------------- variance and effects


def _variance(lot: Lot) -> Section | None:
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
            f"Shares of few seeds are rough. {_behind(used)}"
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
            "off. Where the level of selection holds a number fixed, its effect cannot be told."
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
    for key in _measured([group]):
        cells = {(draw, data): value for (data, draw), value in _cells(group, MEASURES[key][1]).items()}
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
    for key in _measured([group]):
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


def _draws(runs: Sequence[Run]) -> Section | None:
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
        runs_with = "; ".join(f"{own[0].row.run}, {_count(len(own), 'run')}" for own in single)
        caption = f"What single rounds updated (dark, dotted) and froze (light), as in {runs_with}."
        parts.append(Plot("draws", caption, partial(_draw_maps, [own[0] for own in single])))
    several = [own for own in lots if len(own[0].draws) > 1][:2]
    for i, own in enumerate(several):
        run = own[0]
        caption = (
            f"What each round updated (dark, dotted) and froze (light): {run.row.label}, {run.row.selection}, draw "
            f"seed {run.draw_seed}, as in {run.row.run}; {_count(len(own), 'run')} with this draw."
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
        title = f"{level} {ratio}, {_count(len(rounds), 'round')}"
        title = f"{model}: {title}" if len({key[2] for key in by}) > 1 else title
        panels.append(Map(title, *layers_by_matrices({name: fmean(v) for name, v in values.items()})))
    return figures.maps(panels, "Updated (% of rounds)", ".0f", 0, 100)


def _norms(runs: Sequence[Run]) -> Section | None:
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
    for part, lot in enumerate(_lots(shown)):
        caption = (
            "Size of the change of each matrix, ‖θ_T − θ_0‖ / ‖θ_0‖ (%); means over seeds, frozen ones counted as 0. "
            f"{_behind(lot)}"
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


# --------------------------------------------------------------------------------------------------------- items, cost


def _items(runs: Sequence[Run]) -> Section | None:
    records: list[Record] = []
    for run in runs:
        for task, pair in run.row.scores.items():
            made: dict[str, Value] = {
                "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task],
                "before": pair["before"], "after": pair["after"],
            }  # fmt: skip
            both = items(run, task)
            difference = stats.paired_bootstrap(*both) if both else Estimate(pair["after"] - pair["before"], 0)
            records.append(made | estimated("change", difference))
    if not records:
        return None
    columns = [("run", plain("run")), ("method", plain("method")), ("task", plain("task")), ("metric", plain("metric")),
               ("before (%)", percent("before")), ("after (%)", percent("after")),
               ("change (points)", interval("change")),
               ("items", lambda record: str(record["change_n"] or ""))]  # fmt: skip
    caption = (
        "Scores before the first round and after the last, run by run. Where each item's score was kept, the change "
        f"has a paired bootstrap 95% interval over those items ({stats.REPEATS:,} draws, percentiles, seed 0): how "
        "sure the change is for this one model, not how it varies over seeds."
    )
    return Section("Before and after", (), [Table("before_after", caption, columns, records)])


def _cost(runs: Sequence[Run]) -> Section | None:
    records: list[Record] = []
    found = groups([run for run in runs if run.row.train_seconds])
    for group in found:
        record = _setting(group) | {"hardware": " / ".join(sorted({run.hardware for run in group.runs})) or None}
        for key in ("train_seconds", "tokens_per_second", "peak_memory_bytes"):
            values = [value for run in group.runs if (value := getattr(run.row, key)) is not None]
            record |= estimated(key, estimate(values))
        records.append(record)
    if not records:
        return None
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("on", plain("hardware")),
               ("training (s)", spread("train_seconds", scale=1)),
               ("tokens a second", _whole("tokens_per_second")),
               ("peak memory (MiB)", _whole("peak_memory_bytes", 2**20))]  # fmt: skip
    caption = (
        "Cost of training alone, without scoring: mean ± standard deviation [95% t interval] over runs; peak memory is "
        f"of the fullest rank. Times of runs made side by side, or on other hardware, do not compare. {_behind(found)}"
    )
    text = ["The paper says that HFT took about 30% less training time than FFT (Llama 2, read from a summary of it)."]
    return Section("Cost", text, [Table("cost", caption, columns, records)])


def _whole(key: str, unit: float = 1) -> Callable[[Record], str]:
    return lambda record: "" if not isinstance(value := record.get(key), int | float) else f"{value / unit:,.0f}"


def as_json(made: Sequence[Section]) -> str:
    """Every table with its raw values, by name."""
    tables = [part for section in made for part in section.parts if isinstance(part, Table)]
    return json.dumps(
        {t.name: {"caption": t.caption, "of_the_paper": t.paper, "rows": list(t.records)} for t in tables}, indent=2
    ) + "\n"  # fmt: skip
