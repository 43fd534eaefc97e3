"""Errors that the command line turns into one line and an exit status."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass


class UserError(Exception):
    """A mistake of the user. The message is one line: what, where, the choices, the fix. Exit status 2."""


class NodeError(Exception):
    """Another node of the run failed, or the connection to it was lost. Exit status 1."""


class FileError(Exception):
    """The file system failed: a full disk, for instance. The message is one line. Exit status 1."""


class PipeClosed(BaseException):
    """The program that read the output has ended, as `head` does. No Exception, of which Hydra would print a line."""


class Stopped(BaseException):
    """This process received a signal that asks it to end. Exit status 128 + `number`."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class JobFailure:
    """A job of a command that failed, one of several in a sweep.

    Attributes:
        number: position in the sweep, from 0.
        job: the overrides of the job.
        reason: one line.
        status: the exit status that the command should have.
    """

    number: int
    job: str
    reason: str
    status: int


# Errors of the file system that are a user's mistake: a wrong path, or missing rights. Others are the machine's.
MISTAKES = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
     errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ETXTBSY}
)  # fmt: skip
MACHINE = frozenset(
    {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOTSUP, errno.ESTALE}
)


def file_error(error: OSError) -> UserError | FileError | None:
    """An error of the file system as one line ("Permission denied: runs/first"); None for an OSError of another kind.

    An error while a file is written does not name the file.
    """
    if error.errno is None:  # raised by a library, with a text of its own
        kinds = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
        return UserError(first_line(error)) if isinstance(error, kinds) else None
    where = f": {error.filename}" if error.filename is not None else ""
    if error.errno in MISTAKES:
        return UserError(f"{error.strerror}{where}")
    return FileError(f"{error.strerror}{where}") if error.errno in MACHINE else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def short(error: BaseException, length: int = 120) -> str:
    """The first line of an error's message, cut off: some errors repeat the whole input."""
    return cut_off(first_line(error), length)


def cut_off(text: str, length: int) -> str:
    """A text, with … for what is beyond `length`."""
    return text if len(text) <= length else f"{text[:length]}…"


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        UserError: "Unknown WHAT 'x'. Did you mean 'y'? Available: …".
    """
    names = list(choices)
    if value in names:
        return value
    raise UserError(f"Unknown {what} '{value}'.{nearest_hint(value, names)} Available: {', '.join(names)}.")


def nearest_hint(value: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """' Did you mean NAME?' with the name that is nearest to `value`; empty if none is near."""
    nearest = difflib.get_close_matches(str(value), list(names), n=1, cutoff=cutoff)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
