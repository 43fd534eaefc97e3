"""The short form of scripts/fuzz.py: what was found before, and random bytes, for everything that reads."""

from __future__ import annotations

import pytest
from helpers import load_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fuzz = load_script("fuzz")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_input_is_read_or_refused_in_a_line(name):
    slow = fuzz.TARGETS[name].share < 0.05

    @settings(max_examples=30 if slow else 150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.binary(max_size=200))
    def feed(data):
        fuzz.feed(name, data)

    feed()


@pytest.mark.parametrize("path", sorted(fuzz.FINDINGS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_stays_mended(path):
    fuzz.feed(path.name.partition("-")[0], path.read_bytes())


def test_an_error_that_is_not_clear_is_a_finding(monkeypatch):
    def broken(data: bytes) -> None:
        raise fuzz.UserError("x" * 6000) if data else KeyError("a")

    monkeypatch.setitem(fuzz.TARGETS, "row", fuzz.Target(broken, 1))
    with pytest.raises(KeyError):
        fuzz.feed("row", b"")
    with pytest.raises(AssertionError, match="an error of 6000 letters"):
        fuzz.feed("row", b"a")
