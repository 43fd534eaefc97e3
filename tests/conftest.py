"""Fixtures of the tests: small runs of the embedded model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SCORED, TWO_ROUNDS, train


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
