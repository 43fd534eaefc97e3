"""Fixtures of the tests: small runs of the embedded model, each made once for all files and processes that use it."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import preloaded as forking
import pytest
import torch
from helpers import (
    DECAYED,
    SCORED,
    TWO_RANKS,
    TWO_ROUNDS,
    environment,
    environment_of_workers,
    start,
    train,
    wait_for,
    wait_until_gone,
)

from hft_cli.launch import preload
from hft_cli.launch.nodes import is_free


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several threads for tiny models only fight with those of the other process of pytest-xdist."""
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage: what is loaded by now is none


@pytest.fixture(scope="session", autouse=True)
def cache_of_rows(tmp_path_factory) -> None:
    """No test reads what a user, or an earlier session, has in the cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("hashes"))


@pytest.fixture(scope="session", autouse=True)
def preloaded(cache_of_rows, tmp_path_factory) -> Iterator[None]:
    """Commands with the usual environment, and their workers, are forked: libraries are loaded once."""
    folder, variables = tmp_path_factory.mktemp("preloaded"), environment()
    commands = forking.start(folder / "commands", variables, forking.OF_COMMANDS)
    process = forking.start(folder / "socket", environment_of_workers())
    os.environ |= {preload.SHARED: str(folder / "socket"), forking.PLACE_OF_COMMANDS: str(folder / "commands")}
    yield
    for forked in (commands, process):
        forked.kill()
        forked.wait()


@pytest.fixture
def of_a_command() -> Iterator[None]:
    """The variables that a command has: workers that a test starts itself are forked too."""
    here = {"PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}  # pytest takes it out itself
    with patch.dict(os.environ, environment() | here, clear=True):
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of the shared runs: one for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "runs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def hft_run(runs) -> Path:
    """A finished HFT run of one round, in one process, scored before and after."""
    return once(runs / "hft", lambda out: train(out, *SCORED))


@pytest.fixture(scope="session")
def two_rounds(runs) -> Path:
    """A finished HFT run of two rounds with complementary draws."""
    return once(runs / "two", lambda out: train(out, *TWO_ROUNDS))


@pytest.fixture(scope="session")
def begun(runs) -> Callable[[str], tuple[Path, Path]]:
    """For an engine: a finished run of two ranks, and a copy of it after its last step, but before its outcome."""

    @cache
    def begin(engine: str) -> tuple[Path, Path]:
        whole, part = runs / engine, runs / f"{engine}-part"
        return once(whole, lambda out: finish(engine, out, part)), part

    def finish(engine: str, whole: Path, part: Path) -> Path:
        process = start(whole, *DECAYED, f"engine={engine}", *TWO_RANKS)
        folder = whole / "rounds/01-order"
        wait_for(folder / "checkpoints/checkpoint-2/hft.json", process)
        process.send_signal(signal.SIGSTOP)  # or it would remove the checkpoints when its ranks end
        wait_for(folder / "outcome.json", process)
        wait_until_gone(folder)
        shutil.copytree(whole, part)
        process.send_signal(signal.SIGCONT)
        for name in ("outcome.json", "delta.safetensors"):
            (part / "rounds/01-order" / name).unlink()
        assert process.wait() == 0
        return whole

    return begin


def once(out: Path, make: Callable[[Path], Path]) -> Path:
    """Make a run, or wait until the process that is making it has made it."""
    with out.with_suffix(".making").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return out if (out / "DONE").exists() else make(out)


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
