"""Runs -> the sections of a report: what is compared, over which seeds, and the caption that says so.

A section is there only if the runs have what it needs. Means are over counted runs alone (verified, or scored without
writing a model); what is not counted is in the first section.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from hft_cli.report import stats
from hft_cli.report.groups import Comparison, groups, sample_note, setting_of
from hft_cli.report.runs import Run, item_scores
from hft_cli.report.sections.draws import draws
from hft_cli.report.sections.frontier import frontier_section
from hft_cli.report.sections.methods import benchmarks_section, levels_section, methods_section, ratios_section
from hft_cli.report.sections.sequences import matrices_section
from hft_cli.report.sections.variance import variance
from hft_cli.report.sections.weight_change import norms_section
from hft_cli.report.stats import Estimate, estimate
from hft_cli.report.tables import Plot, Record, Section, Table, Value, estimated, interval, percent, plain, spread


def sections(runs: Sequence[Run], norms: bool) -> list[Section]:
    """Every section that the runs have what it needs for, in the order in which they are read."""
    counted = [run for run in runs if run.counted]
    made: list[Section | None] = [_overview(runs)]
    for i, (name, own) in enumerate(_contexts(counted)):
        lot = Comparison(name, "" if i == 0 else name, own)
        made += [
            part(lot)
            for part in (
                methods_section,
                benchmarks_section,
                ratios_section,
                levels_section,
                frontier_section,
                matrices_section,
                variance,
            )
        ]
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


def before_after(run: Run) -> list[Record]:
    """Each task's score before and after, and the change with its interval over the same items."""
    records: list[Record] = []
    for task, pair in run.row.scores.items():
        made: dict[str, Value] = {
            "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task],
            "before": pair["before"], "after": pair["after"],
        }  # fmt: skip
        both = item_scores(run, task)
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
        "of the fullest rank. Times of runs made side by side, or on other hardware, do not compare. "
        f"{sample_note(found)}"
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
