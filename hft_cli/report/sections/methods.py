"""Section: the settings compared, their differences from full fine-tuning, and skill against retention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from hft_cli.report import measures, mixed
from hft_cli.report.figures import charts
from hft_cli.report.groups import Comparison, Group, families, full_counterpart, method_order
from hft_cli.report.measures import MEASURES, sample_note
from hft_cli.report.published import is_the_papers, paper_table
from hft_cli.report.stats import holm
from hft_cli.report.tables import (
    Column,
    Plot,
    Record,
    Section,
    Table,
    Value,
    columns,
    estimate_cell,
    estimate_fields,
    p_value,
    plain,
)

MOST_FOREST_ROWS = 40

HALF_RESET_TEXT = (
    "In the paper, Half-Reset set half of the matrices of Llama-2-7B-chat back to Llama-2-7B. General abilities became "
    "slightly worse, and basic knowledge was clearly restored. The tables of the paper that we have do not include it."
)

METHODS_CAPTION = "Each setting over its seeds: mean ± standard deviation [95% interval of the mean]."

DIFFERENCES_CAPTION = (
    "The difference between each setting and full fine-tuning with the same other settings, in points, paired by data "
    "seed: mean ± standard deviation [95% interval]. p is that of no difference, adjusted over all differences of the "
    "table (Holm). Methods do not learn equally much at the same learning rate; see the section on retention at equal "
    "skill."
)

FOREST_CAPTION = (
    "Each setting's mean (marker), its 95% interval (line, cut at the ends of the scale) and its runs (strokes)."
)

TRADEOFF_CAPTION = (
    "Skill learned and retention over the learning rate, and retention over skill, where up and right is better."
)


def section(comparison: Comparison) -> Section | None:
    keys = measures.measured_in(comparison.groups)
    if not keys:
        return None
    parts = [_methods_table(comparison, keys), _differences_table(comparison, keys), _forest_plot(comparison, keys),
             _tradeoff_plot(comparison)]  # fmt: skip
    stages = {stage for run in comparison.runs for stage in run.stages}
    of_the_paper = is_the_papers(comparison)
    if of_the_paper and "sft" in stages and not any(run.tasks for run in comparison.runs):
        parts.append(paper_table("paper_sft"))
    if of_the_paper and "dpo" in stages:
        parts.append(paper_table("paper_dpo"))
    text = [HALF_RESET_TEXT] if any(run.row.method == "half_reset" for run in comparison.runs) else []
    return Section(comparison.title("Methods"), text, [part for part in parts if part])


def _methods_table(comparison: Comparison, keys: Sequence[str]) -> Table:
    records: list[Record] = []
    for group in comparison.groups:
        record = measures.setting_fields(group)
        for key, measure in MEASURES.items():
            mean, interval = measures.over_seeds(group, measure.score, measure.share)
            record |= estimate_fields(key, mean)
            record["interval"] = record.get("interval") or interval or None
        records.append(record)
    shown = [*columns("setting", "runs", "data_seeds", "draw_seeds"), *measures.measure_columns(keys),
             *columns("interval")]  # fmt: skip
    caption = f"{METHODS_CAPTION} {sample_note(comparison.groups)} {measures.INTERVAL_NOTE}"
    return Table(comparison.stem("methods"), caption, shown, records)


def _differences_table(comparison: Comparison, keys: Sequence[str]) -> Table | None:
    """Each group minus its counterpart that updates everything, paired by data seed."""
    records: list[dict[str, Value]] = []
    compared: list[Group] = []
    for group in comparison.groups:
        full = None if group.row.level == "all" else full_counterpart(group, comparison.groups)
        if full is None:
            continue
        record: dict[str, Value] = {"setting": group.label, "against": full.label}
        for key in keys:
            difference, _ = mixed.over_seeds(measures.differences(group, full, MEASURES[key].score))
            record |= {**estimate_fields(key, difference), f"{key}_p": difference.p if difference else None}
        if any(record[key] is not None for key in keys):
            records.append(record)
            compared += [group] if full in compared else [group, full]
    if not records:
        return None
    names = [(record, f"{key}_p") for record in records for key in keys]
    adjusted = holm([float(p) if (p := record[name]) is not None else None for record, name in names])
    for (record, name), p in zip(names, adjusted, strict=True):
        record[name] = p
    shown: list[Column] = [*columns("setting"), ("minus", plain("against"))]
    for key in keys:
        shown += [(MEASURES[key].points, estimate_cell(key, signed=True)), ("p", p_value(f"{key}_p"))]
    shown.append(("runs", plain(f"{keys[0]}_n")))
    return Table(comparison.stem("differences"), f"{DIFFERENCES_CAPTION} {sample_note(compared)}", shown, records)


def _forest_plot(comparison: Comparison, keys: Sequence[str]) -> Plot:
    groups = comparison.groups[:MOST_FOREST_ROWS]
    caption = FOREST_CAPTION
    if len(groups) < len(comparison.groups):
        caption += f" Shown are the first {len(groups)} of {len(comparison.groups)} settings; the table has all."
    panels = {MEASURES[key].label: [measures.point(group, key) for group in groups] for key in keys}
    draw = partial(charts.forest, [group.label for group in groups], [group.row.label for group in groups], panels)
    return Plot(comparison.stem("methods"), f"{caption} {sample_note(groups)}", draw)


def _tradeoff_plot(comparison: Comparison) -> Plot | None:
    """A line for each sweep of the learning rate. The longest sweep of a method has the method's style."""
    if not any(run.row.skill is not None and run.row.retained is not None for run in comparison.runs):
        return None
    groups = [g for g in comparison.groups if g.row.skill is not None and g.row.retained is not None]
    sweeps = sorted(families(groups, "train.learning_rate"), key=lambda s: (method_order(s[0].row.label), -len(s)))
    sweeps_of = Counter(sweep[0].row.label for sweep in sweeps)
    lines: list[measures.Line] = []
    for sweep in sweeps:
        method = sweep[0].row.label
        label = method if sweeps_of[method] == 1 else sweep[0].label_without_rate
        style = label if method in (line.style for line in lines) else method
        points = sorted(((group.row.learning_rate or 0, group) for group in sweep), key=lambda point: point[0])
        lines.append(measures.Line(label, style, points, joined=len(sweep) > 1))
    rates = sorted({group.row.learning_rate for group in groups if group.row.learning_rate})
    keys = ("skill", "retained")
    draw = partial(charts.tradeoff, [line.series(keys) for line in lines], rates, *(MEASURES[k].label for k in keys))
    caption = f"{TRADEOFF_CAPTION} {measures.POINTS_NOTE} {sample_note(comparison.groups)}"
    return Plot(comparison.stem("tradeoff"), caption, draw)
