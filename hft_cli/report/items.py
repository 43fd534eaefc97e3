"""Scores item by item, before and after a run, and the change of each task's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_cli.evaluation.score_files import read_items, weights_of
from hft_cli.report.runs import Run
from hft_cli.report.stats import Estimate, newcombe, paired_bootstrap, wilson
from hft_cli.report.tables import Cell, Record, estimate_cell, estimate_fields, formatted
from hft_cli.text import is_share

NO_ITEMS = "no scores of single items, so that the change has no interval"
NO_SCORE = {"before": "no score before", "after": "no score after", "base": "no score of the base"}
FEWEST_ITEMS = 10  # of a metric that is not right or wrong: resamples of fewer say too little of other items


@dataclass(frozen=True)
class Pairs:
    """The scores of the items of a task, before and after, and their weights in the mean that the score is."""

    before: list[float]
    after: list[float]
    weights: list[float]


def score_changes(run: Run, start: str = "before") -> list[Record]:
    """The score of each task before and after the run, and its change, with an interval where items were recorded.

    Args:
        start: the model that stands for before: see `Run.start`.

    Returns:
        Records, in which `note` says why there is no change, or no interval.
    """
    records: list[Record] = []
    for task, pair in run.row.scores.items():
        before, after = pair.get(start), pair["after"]
        change, note, counts = _change(run, task, start)
        records.append({
            "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task], "before": before,
            "after": after, **estimate_fields("change", change), **counts, "note": note,
        })  # fmt: skip
    return records


def _change(run: Run, task: str, start: str) -> tuple[Estimate | None, str, dict[str, str]]:
    """The change of a score, why it has none or no interval, and its flips."""
    pair = run.row.scores[task]
    before, after = pair.get(start), pair["after"]
    if before is None or after is None:
        return None, NO_SCORE[start if before is None else "after"], {}
    conditions = run.conditions.get(task, {})
    one, other = (conditions.get(when, {}) for when in (start, "after"))
    if unequal := [_shown(key, one, other) for key in {**one, **other} if one.get(key) != other.get(key)]:
        return None, f"not comparable, because {start} and after differ in {', '.join(unequal)}", {}
    items = item_pairs(run, task, start)
    if isinstance(items, str):
        return Estimate(after - before, 0), items, {}
    binary = is_right_or_wrong(items.before, items.after)
    estimate = (newcombe if binary else paired_bootstrap)(items.before, items.after, items.weights)
    estimate, note = replace(estimate, mean=after - before), ""
    if estimate.n < FEWEST_ITEMS and not binary:
        estimate = replace(estimate, low=None, high=None)
        note = f"no interval, because that needs {FEWEST_ITEMS} items and there are {estimate.n}"
    return estimate, note, flips(items.before, items.after)


def _shown(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A condition in which two scores differ."""
    return f"{key} ({one.get(key)}, {other.get(key)})" if key in ("items", "limit") else key.removesuffix("_sha256")


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


def item_pairs(run: Run, task: str, start: str = "before") -> Pairs | str:
    """The items of SUITE/TASK before and after; or why they do not say how certain the change of the score is."""
    files = run.records.get(task) or _files_of_training(run.folder / "eval", task)
    before, after = (read_items(files.get(when), run.metrics[task]) for when in (start, "after"))
    if not before or not after:
        return NO_ITEMS
    if before.keys() != after.keys():
        return f"no interval, because {start} and after have other items"
    scores = [([items[row][0] for row in before], run.row.scores[task][when] or 0.0)
              for when, items in ((start, before), ("after", after))]  # fmt: skip
    weights = weights_of([part for _, part in before.values()], scores)
    if weights is None:
        return "no interval, because the score is no mean of its items"
    return Pairs(scores[0][0], scores[1][0], weights)


def _files_of_training(folder: Path, task: str) -> dict[str, Path]:
    """The records that training wrote: those after the last round are in `after`, or in the last `round-NN`."""
    folders = (folder / "after", *sorted(folder.glob("round-*"), reverse=True))
    last = next((path for path in folders if path.is_dir()), None)
    paths = {"before": folder / "before", "base": folder / "base", "after": last}
    return {when: path / f"{task}.jsonl" for when, path in paths.items() if path}
