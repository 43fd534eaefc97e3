"""Whether a run's model may be shipped: what it lost and gained, against limits, for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite

from hft_cli.errors import UserError, choose
from hft_cli.files import read_json
from hft_cli.report.items import score_changes
from hft_cli.report.runs import Run
from hft_cli.report.tables import Record
from hft_cli.text import is_loss, is_share, text_table

PASSES, FAILS, UNKNOWN = "passes", "fails", "cannot tell"
ROUNDING = 1e-9  # points: 0.50 to 0.48 are 2 points and a rounding error


@dataclass(frozen=True)
class Check:
    """A limit for one task.

    Attributes:
        change: for the better, in points of a share, otherwise in percent of the score before; None if not known.
        low, high: the 95% interval over the items; infinite if there is none.
        limit: the smallest change that passes.
        items: number of items; 0 if none were recorded.
        noise: how far two scorings of one model lie apart, at the 95% level; None if it was not scored twice.
        why: why there is no interval.
    """

    task: str
    change: float | None
    low: float
    high: float
    limit: float
    items: int
    noise: float | None = None
    why: str = ""

    @property
    def result(self) -> str:
        """It passes or fails if all of its interval does."""
        if self.low >= self.limit - ROUNDING:
            return PASSES
        return FAILS if self.high < self.limit - ROUNDING else UNKNOWN


def checks(run: Run, max_loss: float | None, min_gain: float | None, suites: Sequence[str] = ()) -> list[Check]:
    """The checks of a run: no task of a suite may lose more than `max_loss`, and no test set of the data gain less than
    `min_gain`, in points.

    Args:
        suites: names of suites, of which the tasks are checked; empty: all of them.

    Raises:
        UserError: for a suite that was not scored, a file that cannot be read, or if there is nothing to check.
    """
    if any(name == "results" or not suites or name in suites for name in run.broken):
        what = f"{run.row.status} ({run.row.note})" if "results" in run.broken else run.row.note
        raise UserError(f"The scores of {run.folder} cannot be read: {what}.")
    records = score_changes(run, run.start)
    names = sorted({str(record["task"]).partition("/")[0] for record in records} - {"data"})
    for suite in suites:
        choose("suite", suite, names)
    found = []
    for record in records:
        suite = str(record["task"]).partition("/")[0]
        if suite == "data" and min_gain is not None:
            found.append(_check(run, record, min_gain))
        elif suite != "data" and max_loss is not None and (not suites or suite in suites):
            found.append(_check(run, record, -max_loss))
    if not found:
        raise UserError(
            f"There is nothing to check in {run.folder}: --max-loss needs scores of a suite (suite=…), and --min-gain "
            "those of test rows (data.test_path=…)."
        )
    return found


def _noise(run: Run, task: str) -> float | None:
    """The noise of the run's model on SUITE/TASK that `hft eval … again=true` found, in the unit of the metric."""
    suite, _, name = task.partition("/")
    file = run.folder / "eval" / f"{suite}.json"
    if not file.is_file():
        return None
    again = read_json(file)["models"].get("after", {}).get("again", {})
    return float(again[name]["noise"]) if name in again else None


def _check(run: Run, record: Record, limit: float) -> Check:
    task, why = str(record["task"]), str(record["note"])
    if record["change"] is None:
        suite, fix = task.partition("/")[0], f"'models=[{run.start},after]'"
        return Check(task, None, -inf, inf, limit, 0, None, f"{why}: hft eval run={run.folder} suite={suite} {fix}")
    metric, before, after = (record[key] for key in ("metric", "before", "after"))
    before, after = float(before or 0), float(after or 0)
    scale, items = 100.0, int(record["change_n"] or 0)
    if not all(is_share(str(metric), value) for value in (before, after)):
        scale = 100 / abs(before) if before else 100.0
    low, high = record["change_low"], record["change_high"]
    ends = (-inf, inf) if low is None or high is None else (float(low), float(high))
    better = -scale if is_loss(str(metric)) else scale
    least, most = sorted(better * end for end in ends)
    noise = _noise(run, task)
    points = None if noise is None else noise * scale
    change = better * float(record["change"])
    # The noise is independent of which items there are, so the squares add up.
    least, most = change - hypot(change - least, points or 0), change + hypot(most - change, points or 0)
    return Check(task, change, least, most, limit, items, points, why)


def gate_text(found: Sequence[Check]) -> str:
    """The checks as a table, and what they say together."""
    rows = []
    for check in found:
        change = "" if check.change is None else f"{check.change:+.1f}"
        interval = f" [{check.low:+.1f}, {check.high:+.1f}]" if isfinite(check.low) else ""
        noise = "" if check.noise is None else f"±{check.noise:.1f}"
        rows.append([check.task, change + interval, f"{check.limit:+.1f}", str(check.items or ""), noise, check.result])
    table = text_table(["score", "change in points [95%]", "at least", "items", "scored again", "result"], rows)
    open_checks = [check for check in found if check.result != PASSES]
    if not open_checks:
        return f"{table}\n\nship"
    reasons = "; ".join(f"{check.task} {check.result}" for check in open_checks)
    text = "\n".join([f"{table}\n\ndo not ship: {reasons}", *(f"{c.task}: {c.why}." for c in open_checks if c.why)])
    if any(check.result == UNKNOWN and not check.why for check in open_checks):
        text += "\nWhere the interval has the limit within it, more items tell: a larger suite or test set."
    return text


def ships(found: Sequence[Check]) -> bool:
    return all(check.result == PASSES for check in found)
