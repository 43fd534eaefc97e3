"""Report: methods, benchmarks, ratios and levels compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from hft_cli.report import published
from hft_cli.report.groups import (
    INTERVAL,
    MEASURES,
    Comparison,
    Group,
    Measure,
    cells_of,
    dot_of,
    groups,
    less_rate,
    measured_in,
    order,
    over_seeds,
    sample_note,
    series_of,
    setting_of,
)
from hft_cli.report.runs import RunRow
from hft_cli.report.stats import estimate
from hft_cli.report.tables import Plot, Record, Section, Table, Value, estimated, percent, plain, short, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def methods_section(lot: Comparison) -> Section | None:
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
    caption = f"Each setting over its seeds: mean ± standard deviation [95% interval of the mean]. {sample_note(found)}"
    parts: list[Table | Plot] = [Table(lot.stem("methods"), f"{caption} {INTERVAL}", columns, records)]
    differences, used = _differences(found, keys)
    if differences:
        columns = [("setting", plain("setting")), ("less", plain("against")),
                   *((MEASURES[key][0].split(" (")[0] + " (points)", spread(key, signed=True)) for key in keys),
                   ("seeds", plain(f"{keys[0]}_n"))]  # fmt: skip
        caption = (
            "Each setting less the one that updates everything and is else the same, in points, paired by data seed: "
            "mean ± standard deviation [95% t interval]. At the same learning rate methods do not learn the same; see "
            f"retention at equal skill. {sample_note(used)}"
        )
        parts.append(Table(lot.stem("differences"), caption, columns, differences))
    shown = found[:40]
    parts.append(Plot(lot.stem("methods"), _forest_caption(found, shown), lambda: _forest(shown, keys)))
    if any(run.row.skill is not None and run.row.retained is not None for run in lot.runs):
        caption = (
            "Skill learned and facts retained against the learning rate, and against each other (up and right is "
            f"better); means over seeds with 95% intervals, each run a small dot. {sample_note(found)}"
        )
        parts.append(Plot(lot.stem("tradeoff"), caption, lambda: _tradeoff(found)))
    text = []
    stages = {stage for run in lot.runs for stage in run.stages}
    if "sft" in stages and not any(run.tasks for run in lot.runs):
        parts.append(published.sft())
    if "dpo" in stages:
        parts.append(published.dpo())
    if any(run.row.method == "half_reset" for run in lot.runs):
        text.append(
            "The paper's Half-Reset (Llama-2-7B-chat with half of its matrices put back to Llama-2-7B) had slightly "
            "lower general abilities and basic knowledge clearly restored; it is not in the tables that we have of it."
        )
    return Section(lot.title("Methods"), text, parts)


def benchmarks_section(lot: Comparison) -> Section | None:
    """The paper's benchmarks as its main table has them, of the start and of each setting."""
    there = [name for name in published.OURS if any(_benchmark(name, "after", run.row) is not None for run in lot.runs)]
    if not there:
        return None
    measures = {published.OURS[name]: [name] for name in there}
    for average, heads in (("general avg", published.GENERAL), ("knowledge avg", published.KNOWLEDGE)):
        own = [name for name, head in published.OURS.items() if head in heads]
        if set(own) <= set(there):
            measures[average] = own

    def mean(names: Sequence[str], when: str) -> Measure:
        def of(row: RunRow) -> float | None:
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
        f"is mc2; an average is there if all of its benchmarks are. {sample_note(found)}"
    )
    return Section(
        lot.title("Benchmarks"), (), [Table(lot.stem("benchmarks"), caption, columns, records), published.sft()]
    )


def _benchmark(name: str, when: str, row: RunRow) -> float | None:
    """A benchmark's score by whatever suite has it."""
    return next((pair[when] for task, pair in row.scores.items() if task.partition("/")[2] == name), None)


def _forest_caption(found: Sequence[Group], shown: Sequence[Group]) -> str:
    more = f" The first {len(shown)} of {len(found)} settings; the table has all." if len(shown) < len(found) else ""
    shows = "Each setting's mean, its 95% interval (line, cut at the scale's ends) and its runs (strokes)."
    return f"{shows}{more} {sample_note(shown)}"


def _forest(found: Sequence[Group], keys: Sequence[str]) -> Figure:
    from hft_cli.report import figures

    panels = [(MEASURES[key][0], [dot_of(group, key, 0) for group in found]) for key in keys]
    return figures.forest([group.label for group in found], [group.first.label for group in found], panels)


def _tradeoff(found: Sequence[Group]) -> Figure:
    from hft_cli.report import figures

    scored = [g for g in found if g.first.skill is not None and g.first.retained is not None]
    families: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in scored:
        families.setdefault(group.runs[0].without("train.learning_rate"), []).append(group)
    several = Counter(own[0].first.label for own in families.values())
    series, taken = [], set()
    for own in sorted(families.values(), key=lambda own: (order(own[0].first.label), -len(own))):
        row = own[0].first
        label = row.label if several[row.label] == 1 else less_rate(own[0])
        style = label if row.label in taken else row.label  # a method's longest sweep has the method's own look
        taken.add(row.label)
        pairs = [(group.first.learning_rate or 0, group) for group in own]
        series.append(series_of(label, style, sorted(pairs, key=lambda p: p[0]), ("skill", "retained"), len(own) > 1))
    rates = sorted({group.first.learning_rate for group in scored if group.first.learning_rate})
    return figures.tradeoff(series, rates)


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


def ratios_section(lot: Comparison) -> Section | None:
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
        f"{sample_note(shown)}"
    )

    def draw() -> Figure:
        from hft_cli.report import figures

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


def levels_section(lot: Comparison) -> Section | None:
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
    caption = f"Where the updated half is drawn from, all else equal; all is full fine-tuning. {sample_note(shown)}"

    def draw() -> Figure:
        from hft_cli.report import figures

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
        published.levels(),
    ]
    return Section(lot.title("Level of selection"), (), parts)
