"""Errors that name the choices."""

from __future__ import annotations

import pytest

from hft_cli.errors import UserError, choose, file_error_text


def test_an_unknown_name_gives_the_nearest_and_all():
    assert choose("thing", "apple", ["apple", "pear"]) == "apple"
    with pytest.raises(UserError, match=r"Unknown thing 'aple'\. Did you mean 'apple'\? Available: apple, pear\."):
        choose("thing", "aple", ["apple", "pear"])
    with pytest.raises(UserError, match=r"Unknown thing 'x'\. Available: apple, pear\."):
        choose("thing", "x", ["apple", "pear"])


def test_an_error_of_the_file_system_is_one_line():
    assert file_error_text(PermissionError(13, "Permission denied", "a/b")) == "Permission denied: a/b"
    assert file_error_text(FileNotFoundError("nothing there")) == "nothing there"
