"""Rows that cannot be trained on: all of them are found in one go, and stop the run or are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hft_cli.errors import UserError

BAD_ROWS = ("stop", "skip")

LISTED = 50  # rows that an error lists


@dataclass
class BadRows:
    """Bad rows of a set.

    Attributes:
        rows: place and reason of each.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, error: UserError | str) -> None:
        """Note a bad row. The reason may begin with the place: "PLACE: it is empty", "PLACE, chosen: it is empty"."""
        self.rows.append((place, str(error).removeprefix(place).removeprefix(": ").removeprefix(", ")))

    def refuse(self, policy: str, total: int, where: str) -> None:
        """Raise a UserError that lists the rows, unless they are to be skipped and there are others.

        Args:
            policy: a value of `data.bad_rows`.
            total: number of rows, bad ones included.
        """
        if not self.rows or (policy == "skip" and len(self.rows) < total):
            return
        first = f"{self.rows[0][0]}: {self.rows[0][1]}"
        if len(self.rows) == 1:
            raise UserError(first)
        if len(self.rows) == total:  # probably another kind of data than is asked for
            raise UserError(f"{first} All {total:,} rows of {where} are bad.")
        raise UserError(
            f"{len(self.rows):,} of {total:,} rows of {where} are bad. Mend them, or leave them out with "
            f"data.bad_rows=skip:\n{listing(self.rows)}"
        )


def listing(rows: Sequence[tuple[str, str]]) -> str:
    """A line for each of the rows, up to LISTED."""
    lines = [f"  {place}: {reason}" for place, reason in rows[:LISTED]]
    return "\n".join([*lines, *([f"  … and {len(rows) - LISTED:,} more"] if len(rows) > LISTED else [])])
