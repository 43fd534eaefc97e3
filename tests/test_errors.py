"""Errors that name the choices."""

from __future__ import annotations

import errno

import pytest

from hft_cli.errors import FileError, UserError, choose, file_error


def test_an_unknown_name_gives_the_nearest_and_all():
    assert choose("thing", "apple", ["apple", "pear"]) == "apple"
    with pytest.raises(UserError, match=r"Unknown thing 'aple'\. Did you mean 'apple'\? Available: apple, pear\."):
        choose("thing", "aple", ["apple", "pear"])
    with pytest.raises(UserError, match=r"Unknown thing 'x'\. Available: apple, pear\."):
        choose("thing", "x", ["apple", "pear"])


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.EACCES, "Permission denied", "a/b"), UserError, "Permission denied: a/b"),
        (OSError(errno.EROFS, "Read-only file system", "a"), UserError, "Read-only file system: a"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), UserError, "File name too long: aaa"),
        (FileNotFoundError("nothing there\nand more"), UserError, "nothing there"),
        (OSError(errno.ENOSPC, "No space left on device"), FileError, "No space left on device"),
        (OSError(errno.EIO, "Input/output error", "a"), FileError, "Input/output error: a"),
    ],
)
def test_an_error_of_the_file_system_is_one_line(error, kind, text):
    found = file_error(error)
    assert (type(found), str(found)) == (kind, text)


@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError(), OSError("of a library")])
def test_another_error_keeps_its_traceback(error):
    assert file_error(error) is None
