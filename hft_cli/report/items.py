"""Scores item by item, before and after a run, and the change of each task's score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hft_cli.evaluation.score_files import read_items
from hft_cli.report.runs import Run
from hft_cli.report.stats import Estimate, newcombe, paired_bootstrap, wilson
from hft_cli.report.tables import Cell, Record, estimate_cell, estimate_fields, formatted
from hft_cli.text import is_share

NO_ITEMS = "no scores of single items, so that the change has no interval"


def score_changes(run: Run) -> list[Record]:
    """The score of each task before and after the run, and its change, with an interval where items were recorded.

    `note` says why there is no change, or no interval.
    """
    records: list[Record] = []
    for task, pair in run.row.scores.items():
        before, after = pair["before"], pair["after"]
        items = item_scores(run, task)
        change = None if before is None or after is None else Estimate(after - before, 0)
        if items:
            change = newcombe(*items[:2]) if is_right_or_wrong(*items[:2]) else paired_bootstrap(*items)
        records.append({
            "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task], "before": before,
            "after": after, **estimate_fields("change", change), **(flips(*items[:2]) if items else {}),
            "note": "" if items else NO_ITEMS,
        })  # fmt: skip
    return records


def _is_share(record: Record) -> bool:
    values = [value for key in ("before", "after") if isinstance(value := record.get(key), int | float)]
    return all(is_share(str(record["metric"]), value) for value in values)


def score_cell(when: str) -> Cell:
    """The score before or after: a share in percent; another metric, such as perplexity, in its own unit."""
    return lambda record: formatted(when, ".1%" if _is_share(record) else ".4g")(record)


def change_cell(record: Record) -> str:
    """The change of a share in points, with its interval; of another metric in its own unit."""
    if _is_share(record):
        return estimate_cell("change", signed=True, deviation=False)(record)
    change, low, high = (formatted(f"change{end}", "+.2g")(record) for end in ("", "_low", "_high"))
    return change + (f" [{low}, {high}]" if low and high else "")


def is_right_or_wrong(before: Sequence[float], after: Sequence[float]) -> bool:
    return {*before, *after} <= {0, 1}


def flips(before: Sequence[float], after: Sequence[float]) -> dict[str, str]:
    """How many right items are wrong afterwards, and how many wrong ones right, each with the interval of its share.

    Empty unless items are 0 or 1.

    The net change hides them: a model that loses 30 facts and learns 30 others has the same score.
    """
    if not is_right_or_wrong(before, after):
        return {}
    pairs, right = list(zip(before, after, strict=True)), int(sum(before))
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    return {"lost": _count(lost, right), "gained": _count(gained, len(pairs) - right)}


def _count(count: int, n: int) -> str:
    if not n:
        return "0 of 0"
    low, high = (100 * end for end in wilson(count, n))
    return f"{count:,} of {n:,} [{low:.1f}, {high:.1f}]%"


def item_scores(run: Run, task: str) -> tuple[list[float], list[float], list[float]] | None:
    """The scores before and after of the items of SUITE/TASK that have both, and their weights: the bytes of a text, of
    other items 1. None without such records.
    """
    files = run.records.get(task) or _files_of_training(run.folder / "eval", task)
    before, after = (read_items(files.get(when), run.metrics[task]) for when in ("before", "after"))
    rows = [row for row in before if row in after]
    if not rows:
        return None
    return [before[row][0] for row in rows], [after[row][0] for row in rows], [after[row][1] for row in rows]


def _files_of_training(folder: Path, task: str) -> dict[str, Path]:
    """The records that training wrote: those after the last round are in `after`, or in the last `round-NN`."""
    folders = (folder / "after", *sorted(folder.glob("round-*"), reverse=True))
    last = next((path for path in folders if path.is_dir()), None)
    return {when: path / f"{task}.jsonl" for when, path in (("before", folder / "before"), ("after", last)) if path}
