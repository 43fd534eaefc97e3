"""Scores item by item, before and after a run, and the change of each task's score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_cli.report.reading import finite
from hft_cli.report.runs import Run
from hft_cli.report.stats import Estimate, paired_bootstrap
from hft_cli.report.tables import Record, estimate_fields


def score_changes(run: Run) -> list[Record]:
    """The score of each task before and after the run, and its change, with an interval where items were recorded."""
    records: list[Record] = []
    for task, pair in run.row.scores.items():
        before, after = pair["before"], pair["after"]
        items = item_scores(run, task)
        change = None if before is None or after is None else Estimate(after - before, 0)
        if items:
            change = paired_bootstrap(*items)
        records.append({
            "run": run.row.run, "method": run.row.label, "task": task, "metric": run.metrics[task], "before": before,
            "after": after, **estimate_fields("change", change), **(flips(*items) if items else {}),
        })  # fmt: skip
    return records


def flips(before: Sequence[float], after: Sequence[float]) -> dict[str, str]:
    """How many right items are wrong afterwards, and how many wrong ones right; empty unless items are 0 or 1.

    The net change hides them: a model that loses 30 facts and learns 30 others has the same score.
    """
    if not {*before, *after} <= {0, 1}:
        return {}
    pairs, right = list(zip(before, after, strict=True)), int(sum(before))
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    return {"lost": f"{lost:,} of {right:,}", "gained": f"{gained:,} of {len(pairs) - right:,}"}


def item_scores(run: Run, task: str) -> tuple[list[float], list[float]] | None:
    """The scores before and after of the items of SUITE/TASK that have both; None without such records."""
    files = run.records.get(task) or _files_of_training(run.folder / "eval", task)
    before, after = (_read_items(files.get(when), run.metrics[task]) for when in ("before", "after"))
    rows = [row for row in before if row in after]
    return ([before[row] for row in rows], [after[row] for row in rows]) if rows else None


def _files_of_training(folder: Path, task: str) -> dict[str, Path]:
    """The records that training wrote: those after the last round are in `after`, or in the last `round-NN`."""
    folders = (folder / "after", *sorted(folder.glob("round-*"), reverse=True))
    last = next((path for path in folders if path.is_dir()), None)
    return {when: path / f"{task}.jsonl" for when, path in (("before", folder / "before"), ("after", last)) if path}


def _read_items(path: Path | None, metric: str) -> dict[Any, float]:
    """Row -> its score; empty if there is no such file, or if a line of it is broken."""
    if path is None:
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line.get("row", i): finite(line[metric]) for i, line in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
