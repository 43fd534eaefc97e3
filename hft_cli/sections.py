"""Runs -> the sections of a report: what is compared, over which seeds, and the caption that says so.

A section is there only if the runs have what it needs. Means are over counted runs alone (verified, or scored without
writing a model); what is not counted is in the first section.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from hft_cli import paper, stats
from hft_cli.compare import (
    INTERVAL,
    MEASURES,
    Lot,
    Measure,
    behind,
    cells_of,
    dot_of,
    lots,
    measured_in,
    over_seeds,
    series_of,
    setting_of,
)
from hft_cli.gather import Group, Matrix, Row, Run, groups, items, order
from hft_cli.inside import draws, norms_section, variance
from hft_cli.stats import Estimate, estimate
from hft_cli.tables import (
    Plot,
    Record,
    Section,
    Table,
    Value,
    estimated,
    interval,
    percent,
    plain,
    short,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sections(runs: Sequence[Run], norms: bool) -> list[Section]:
    """Every section that the runs have what it needs for, in the order in which they are read."""
    counted = [run for run in runs if run.counted]
    made: list[Section | None] = [_overview(runs)]
    for i, (name, own) in enumerate(_contexts(counted)):
        lot = Lot(name, "" if i == 0 else name, own)
        made += [part(lot) for part in (_methods, _benchmarks, _ratios, _levels, _frontier, _matrices, variance)]
    made += [draws(counted), norms_section(counted) if norms else None, _items(counted), _cost(counted)]
    return _once([section for section in made if section is not None])


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


# ------------------------------------------------------------------------------------------------------------- methods


def _methods(lot: Lot) -> Section | None:
    found = groups(lot.runs)
    keys = measured_in(found)
    if not keys:
        return None
    records: list[Record] = []
    for group in found:
        record = setting_of(group)
        for key in MEASURES:
            mean, how = over_seeds(group, MEASURES[key][1])
            record |= estimated(key, mean)
            record["interval"] = record.get("interval") or how or None
        records.append(record)
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("data seeds", plain("data_seeds")),
               ("draw seeds", plain("draw_seeds")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys),
               ("interval", plain("interval"))]  # fmt: skip
    caption = f"Each setting over its seeds: mean ± standard deviation [95% interval of the mean]. {behind(found)}"
    parts: list[Table | Plot] = [Table(lot.stem("methods"), f"{caption} {INTERVAL}", columns, records)]
    differences, used = _differences(found, keys)
    if differences:
        columns = [("setting", plain("setting")), ("less", plain("against")),
                   *((MEASURES[key][0].split(" (")[0] + " (points)", spread(key, signed=True)) for key in keys),
                   ("seeds", plain(f"{keys[0]}_n"))]  # fmt: skip
        caption = (
            "Each setting less the one that updates everything and is else the same, in points, paired by data seed: "
            "mean ± standard deviation [95% t interval]. At the same learning rate methods do not learn the same; see "
            f"retention at equal skill. {behind(used)}"
        )
        parts.append(Table(lot.stem("differences"), caption, columns, differences))
    shown = found[:40]
    parts.append(Plot(lot.stem("methods"), _forest_caption(found, shown), lambda: _forest(shown, keys)))
    if any(run.row.skill is not None and run.row.retained is not None for run in lot.runs):
        caption = (
            "Skill learned and facts retained against the learning rate, and against each other (up and right is "
            f"better); means over seeds with 95% intervals, each run a small dot. {behind(found)}"
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


def _benchmarks(lot: Lot) -> Section | None:
    """The paper's benchmarks as its main table has them, of the start and of each setting."""
    there = [name for name in paper.OURS if any(_benchmark(name, "after", run.row) is not None for run in lot.runs)]
    if not there:
        return None
    measures = {paper.OURS[name]: [name] for name in there}
    for average, heads in (("general avg", paper.GENERAL), ("knowledge avg", paper.KNOWLEDGE)):
        own = [name for name, head in paper.OURS.items() if head in heads]
        if set(own) <= set(there):
            measures[average] = own

    def mean(names: Sequence[str], when: str) -> Measure:
        def of(row: Row) -> float | None:
            found = [value for name in names if (value := _benchmark(name, when, row)) is not None]
            return fmean(found) if len(found) == len(names) else None

        return of

    found = groups(lot.runs)
    start = {run.setting.get("model.name", ""): run.row for run in lot.runs}
    records: list[Record] = [
        {
            "setting": f"{model or 'the model'} before",
            **{head: mean(names, "before")(row) for head, names in measures.items()},
        }
        for model, row in start.items()
    ]
    for group in found:
        record = setting_of(group)
        for head, names in measures.items():
            record |= estimated(head, over_seeds(group, mean(names, "after"))[0])
        records.append(record)
    columns = [("setting", plain("setting")), *((head, spread(head)) for head in measures)]
    caption = (
        "Benchmarks after training, over seeds: mean ± standard deviation [95% interval of the mean], in %. TruthfulQA "
        f"is mc2; an average is there if all of its benchmarks are. {behind(found)}"
    )
    return Section(lot.title("Benchmarks"), (), [Table(lot.stem("benchmarks"), caption, columns, records), paper.sft()])


def _benchmark(name: str, when: str, row: Row) -> float | None:
    """A benchmark's score by whatever suite has it."""
    return next((pair[when] for task, pair in row.scores.items() if task.partition("/")[2] == name), None)


def _forest_caption(found: Sequence[Group], shown: Sequence[Group]) -> str:
    more = f" The first {len(shown)} of {len(found)} settings; the table has all." if len(shown) < len(found) else ""
    shows = "Each setting's mean, its 95% interval (line, cut at the scale's ends) and its runs (strokes)."
    return f"{shows}{more} {behind(shown)}"


def _forest(found: Sequence[Group], keys: Sequence[str]) -> Figure:
    from hft_cli import figures

    panels = [(MEASURES[key][0], [dot_of(group, key, 0) for group in found]) for key in keys]
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
        series.append(series_of(label, style, sorted(pairs, key=lambda p: p[0]), ("skill", "retained"), len(own) > 1))
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
    for (seed, _), value in cells_of(group, of).items():
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
    keys = measured_in(shown)
    records = []
    for line in lines:
        for group in line:
            record = setting_of(group) | {"updated": group.first.updated}
            for key in keys:
                record |= estimated(key, over_seeds(group, MEASURES[key][1])[0])
            records.append(record)
    columns = [("setting", plain("setting")), ("ratio", short("ratio")), ("of all elements (%)", percent("updated")),
               ("runs", plain("runs")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys)]  # fmt: skip
    caption = (
        "Scores against selection.ratio, the share of the layers' matrices that is updated; ratio 1 updates all (FFT). "
        f"{behind(shown)}"
    )

    def draw() -> Figure:
        from hft_cli import figures

        series = []
        for line in lines:
            first = next(group for group in line if group.first.level != "all")
            label = f"{first.first.label} {first.first.level}"
            if len(lines) > 1:
                label = first.label.replace(f" {first.runs[0].setting.get('selection.ratio')}", "", 1)
            series.append(series_of(label, first.first.label if len(lines) == 1 else label,
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
    keys = measured_in(shown)
    records = []
    for own in sets:
        for group in own:
            record = setting_of(group)
            for key in keys:
                record |= estimated(key, over_seeds(group, MEASURES[key][1])[0])
            records.append(record)
    columns = [("level", plain("level")), ("setting", plain("setting")), ("runs", plain("runs")),
               *((MEASURES[key][0], spread(key, signed=key == "bwt")) for key in keys)]  # fmt: skip
    caption = f"Where the updated half is drawn from, all else equal; all is full fine-tuning. {behind(shown)}"

    def draw() -> Figure:
        from hft_cli import figures

        series = []
        for i, own in enumerate(sets):
            shift = (i - (len(sets) - 1) / 2) * 0.12
            last = own[-1]
            label = last.label.replace(f" {last.first.level}", "", 1)
            style = last.first.label if len(sets) == 1 else label
            pairs = [(LEVELS.index(group.first.level) + shift, group) for group in own]
            series.append(series_of(label, style, pairs, keys, False))
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
            "deviation [95% t interval over seeds]; differences are paired by seed, in points. " + behind(shown)
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
        f"better. {behind(shown)}"
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
        record = setting_of(group)
        for key in ("op", "bwt", "retained"):
            record |= estimated(key, over_seeds(group, MEASURES[key][1])[0])
        measures.append(record)
    columns = [("setting", plain("setting")), ("runs", plain("runs")), ("OP (%)", spread("op")),
               ("BWT (points)", spread("bwt", signed=True))]  # fmt: skip
    if any(record["retained"] is not None for record in measures):
        columns.append(("retained (%)", spread("retained")))
    caption = f"Overall performance and backward transfer (below 0 is forgetting). {behind(found)} {INTERVAL}"
    parts: list[Table | Plot] = [Table(lot.stem("sequences"), caption, columns, measures)]
    for part, few in enumerate(lots(found)):
        parts.append(
            Plot(
                lot.stem("r" if part == 0 else f"r_{part + 1}"),
                "R: the score (%) on each task (column) after each round (row); blank where it was not scored. The "
                f"last row makes OP, the last row less the diagonal BWT. Means over seeds. {behind(few)}",
                partial(_r_maps, few),
            )
        )
    long_columns = [(key, plain(key)) for key in ("setting", "seed", "after", "task")] + [("score", percent("score"))]
    parts.append(Table(lot.stem("r"), "Every cell of R, run by run.", long_columns, cells, data=True))
    parts.append(paper.trace())
    return Section(lot.title("Sequences of tasks"), (), parts)


def _r_maps(found: Sequence[Group]) -> Figure:
    from hft_cli import figures
    from hft_cli.figures import Map

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


# --------------------------------------------------------------------------------------------------------- items, cost


def before_after(run: Run) -> list[Record]:
    """Each task's score before and after, and the change with its interval over the same items."""
    records: list[Record] = []
    for task, pair in run.row.scores.items():
        made: dict[str, Value] = {
            "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task],
            "before": pair["before"], "after": pair["after"],
        }  # fmt: skip
        both = items(run, task)
        before, after = pair["before"], pair["after"]
        difference = None if before is None or after is None else Estimate(after - before, 0)
        difference = stats.paired_bootstrap(*both) if both else difference
        records.append(made | estimated("change", difference))
    return records


def _items(runs: Sequence[Run]) -> Section | None:
    records = [record for run in runs for record in before_after(run)]
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
        record = setting_of(group) | {"hardware": " / ".join(sorted({run.hardware for run in group.runs})) or None}
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
        f"of the fullest rank. Times of runs made side by side, or on other hardware, do not compare. {behind(found)}"
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
