"""Whether a run's model may be shipped: what it lost and gained, against limits, for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hft_cli.errors import UserError, choose
from hft_cli.report.items import score_changes
from hft_cli.report.runs import Run
from hft_cli.report.tables import Record
from hft_cli.text import is_loss, is_share, text_table

PASSES, FAILS, UNKNOWN = "passes", "fails", "cannot tell"


@dataclass(frozen=True)
class Check:
    """A limit for one task.

    Attributes:
        change: for the better, in points of a share, otherwise in percent of the score before.
        low, high: the 95% interval over the items; those of a score without items are the change itself.
        limit: the smallest change that passes.
        items: number of items; 0 if none were recorded.
    """

    task: str
    change: float
    low: float
    high: float
    limit: float
    items: int

    @property
    def result(self) -> str:
        """It passes or fails if all of its interval does."""
        if self.low >= self.limit:
            return PASSES
        return FAILS if self.high < self.limit else UNKNOWN


def checks(run: Run, max_loss: float | None, min_gain: float | None, suites: Sequence[str] = ()) -> list[Check]:
    """The checks of a run: no task of a suite may lose more than `max_loss`, and no test set of the data gain less than
    `min_gain`, in points.

    Args:
        suites: names of suites, of which the tasks are checked; empty: all of them.

    Raises:
        UserError: for a suite that was not scored, or if there is nothing to check.
    """
    records = [record for record in score_changes(run) if record["change"] is not None]
    names = sorted({str(record["task"]).partition("/")[0] for record in records} - {"data"})
    for suite in suites:
        choose("suite", suite, names)
    found = []
    for record in records:
        suite = str(record["task"]).partition("/")[0]
        if suite == "data" and min_gain is not None:
            found.append(_check(record, min_gain))
        elif suite != "data" and max_loss is not None and (not suites or suite in suites):
            found.append(_check(record, -max_loss))
    if not found:
        raise UserError(
            f"There is nothing to check in {run.folder}: --max-loss needs scores of a suite (suite=…), and --min-gain "
            "those of test rows (data.test_path=…)."
        )
    return found


def _check(record: Record, limit: float) -> Check:
    metric, before, after = (record[key] for key in ("metric", "before", "after"))
    before, after = float(before or 0), float(after or 0)
    scale, items = 100.0, int(record["change_n"] or 0)
    if not all(is_share(str(metric), value) for value in (before, after)):
        scale = 100 / abs(before) if before else 100.0
    change = float(record["change"] or 0)
    low, high = record["change_low"], record["change_high"]
    ends = [change if end is None else float(end) for end in (low, high)]
    better = -scale if is_loss(str(metric)) else scale
    least, most = sorted(better * end for end in ends)
    return Check(str(record["task"]), better * change, least, most, limit, items)


def gate_text(found: Sequence[Check]) -> str:
    """The checks as a table, and what they say together."""
    rows = [
        [
            check.task,
            f"{check.change:+.1f}" + (f" [{check.low:+.1f}, {check.high:+.1f}]" if check.items else ""),
            f"{check.limit:+.1f}",
            str(check.items or ""),
            check.result,
        ]
        for check in found
    ]
    table = text_table(["score", "change in points [95%]", "at least", "items", "result"], rows)
    open_checks = [check for check in found if check.result != PASSES]
    if not open_checks:
        return f"{table}\n\nship"
    reasons = "; ".join(f"{check.task} {check.result}" for check in open_checks)
    text = f"{table}\n\ndo not ship: {reasons}"
    if any(check.result == UNKNOWN for check in open_checks):
        text += "\nWhere the interval has the limit within it, more items tell: a larger suite or test set."
    return text


def ships(found: Sequence[Check]) -> bool:
    return all(check.result == PASSES for check in found)
