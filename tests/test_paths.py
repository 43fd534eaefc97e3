"""Paths that begin with ~, and users without a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

from hft_cli import paths
from hft_cli.errors import UserError

# As a user that the system does not know: containers may run as any number.
UNKNOWN = """
import pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
"""


def test_a_home_is_put_in_the_place_of_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expanded("~/models/a") == Path("/home/me/models/a")
    assert paths.expanded(Path("~")) == Path("/home/me")
    assert paths.expanded("./~a/b") == Path("./~a/b")
    assert paths.expand_home("a/~/b/") == "a/~/b/"


def test_an_unknown_home_is_one_line_with_the_fix():
    with pytest.raises(UserError, match=r"~nosuch/x: there is no user 'nosuch'\. Give a whole path, or \./~nosuch/x"):
        paths.expanded("~nosuch/x")


def test_the_cache_is_where_the_variable_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert paths.user_cache() == Path("/caches/hft")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.user_cache() == Path("/home/me/.cache/hft")


def test_a_user_without_a_home_can_work(tmp_path):
    variables = {key: value for key, value in environment().items() if key not in ("HOME", "XDG_CACHE_HOME")}
    script = (
        f"{UNKNOWN}import os, sys\nfrom hft_cli import paths\nfrom hft_cli.cli.main import main\n"
        "print(paths.user_cache())\nsys.argv = ['hft', 'plan', '+method=hft', 'rows=10']\n"
        "try:\n    main()\nfinally:\n    print(os.environ['HOME'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "/.cache/hft"
    assert done.stdout.splitlines()[-1] == "/"
    assert "Memory of each GPU" in done.stdout
    assert not os.listdir(tmp_path)  # no folder called ~
