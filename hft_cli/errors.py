"""Errors that the command line turns into one line and an exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one line saying what, where, the choices and the fix. Exit status 2."""


class Stopped(BaseException):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a UserError with the nearest one.

    Raises:
        UserError: "Unknown WHAT 'x'. Did you mean 'y'? Available: …".
    """
    names = list(choices)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(f"Unknown {what} '{value}'.{hint} Available: {', '.join(names)}.")


class NodeError(Exception):
    """Another node failed or went away. Exit status 1."""
