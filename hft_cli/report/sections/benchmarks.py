"""Section: the paper's benchmarks, arranged as in its main table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hft_cli.report.groups import Comparison
from hft_cli.report.measures import Score, over_seeds, sample_note, setting_fields
from hft_cli.report.published import GENERAL, KNOWLEDGE, is_the_papers, paper_table
from hft_cli.report.runs import RunRow
from hft_cli.report.tables import Record, Section, Table, columns, estimate_cell, estimate_fields

CAPTION = (
    "Benchmarks before and after training, in %, over seeds: mean ± standard deviation [95% interval of the mean]. "
    "TruthfulQA is mc2. An average is shown only if all of its benchmarks were scored."
)


def section(comparison: Comparison) -> Section | None:
    rows = [run.row for run in comparison.runs]
    headings = {name: [task] for task, name in (GENERAL | KNOWLEDGE).items()}
    headings |= {"general avg": list(GENERAL), "knowledge avg": list(KNOWLEDGE)}
    scored = {heading: tasks for heading, tasks in headings.items()
              if all(any(_benchmark(task, "after", row) is not None for row in rows) for task in tasks)}  # fmt: skip
    if not scored:
        return None
    starts = {run.setting.get("model.name", ""): run.row for run in comparison.runs}
    records: list[Record] = [
        {"setting": f"{model or 'the model'} before"}
        | {heading: _mean_of(tasks, "before")(row) for heading, tasks in scored.items()}
        for model, row in starts.items()
    ]
    for group in comparison.groups:
        record = setting_fields(group)
        for heading, tasks in scored.items():
            record |= estimate_fields(heading, over_seeds(group, _mean_of(tasks, "after"))[0])
        records.append(record)
    shown = [*columns("setting"), *((heading, estimate_cell(heading)) for heading in scored)]
    caption = f"{CAPTION} {sample_note(comparison.groups)}"
    table = Table(comparison.stem("benchmarks"), caption, shown, records)
    return Section(comparison.title("Benchmarks"), (), [table, *[paper_table("paper_sft")] * is_the_papers(comparison)])


def _mean_of(tasks: Sequence[str], when: str) -> Score:
    """The mean over benchmarks; None unless all of them were scored."""

    def score(row: RunRow) -> float | None:
        scores = [value for task in tasks if (value := _benchmark(task, when, row)) is not None]
        return fmean(scores) if len(scores) == len(tasks) else None

    return score


def _benchmark(task: str, when: str, row: RunRow) -> float | None:
    """A benchmark's score, whatever suite it was scored in."""
    return next((pair[when] for name, pair in row.scores.items() if name.partition("/")[2] == task), None)
