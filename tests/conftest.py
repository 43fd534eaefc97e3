"""Fixtures of the tests: small runs of the embedded model, made once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from helpers import SCORED, TWO_ROUNDS, train

from hft_cli.launch.nodes import is_free


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def hft_run(runs) -> Path:
    """A finished HFT run of one round, in one process."""
    return train(runs / "hft", *SCORED)


@pytest.fixture(scope="session")
def two_rounds(runs) -> Path:
    """A finished HFT run of two rounds with complementary draws."""
    return train(runs / "two", *TWO_ROUNDS)


@pytest.fixture
def port() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as sock:
            sock.bind(("", 0))
            number = sock.getsockname()[1]
        if number < 65000 and is_free(number) and is_free(number + 1):
            return number


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of upstream internals run with all versions that pyproject.toml admits."""
    for item in items:
        if item.path.name == "test_compat.py":
            item.add_marker(pytest.mark.versions)
