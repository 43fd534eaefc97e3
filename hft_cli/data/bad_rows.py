"""Rows that cannot be trained on: all of them are found in one go, and stop the run or are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        self.rows.append((place, reason_of(place, error)))

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


def reason_of(place: str, error: UserError | str) -> str:
    """Why a row is bad, without its place."""
    return str(error).removeprefix(place).removeprefix(": ").removeprefix(", ")


@dataclass(frozen=True)
class BadRow:
    """In the place of the result for a row: why the row is bad."""

    error: UserError


def try_rows(
    function: Callable[[Sequence[Any], Sequence[str]], Sequence[Any]], rows: Sequence[Any], places: Sequence[str]
) -> list[Any]:
    """The results of a function of several rows and their places, with a BadRow for each row that it refuses.

    Raises:
        UserError: from the function, if it does not begin with the place of a row: the row is not to blame.
    """
    try:
        return list(function(rows, places))
    except UserError as error:
        if len(rows) == 1:
            if not str(error).startswith(places[0]):
                raise
            return [BadRow(error)]
    return [each for row, place in zip(rows, places, strict=True) for each in try_rows(function, [row], [place])]


def listing(rows: Sequence[tuple[str, str]]) -> str:
    """A line for each of the rows, up to LISTED."""
    lines = [f"  {place}: {reason}" for place, reason in rows[:LISTED]]
    return "\n".join([*lines, *([f"  … and {len(rows) - LISTED:,} more"] if len(rows) > LISTED else [])])
