"""Workers that are forks of a process which has loaded their libraries do what plain processes do."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from pathlib import Path

import pytest
from helpers import (
    TWO_RANKS,
    environment,
    ledger,
    ranks,
    start,
    train,
    wait_for_step,
    wait_until_gone,
    weights,
)

from hft_cli.launch import preload

pytestmark = pytest.mark.skipif(not preload._can_fork(), reason="workers are plain processes on this machine")

ENGINES = {"one process": (), "ZeRO-2": ("engine=zero2", *TWO_RANKS)}


@pytest.mark.parametrize("engine", ENGINES)
def test_forks_end_with_the_bits_of_plain_processes(engine, tmp_path, monkeypatch):
    forked = train(tmp_path / "forked", "+method=hft", *ENGINES[engine])
    monkeypatch.setenv(preload.SHARED, "off")
    plain = train(tmp_path / "plain", "+method=hft", *ENGINES[engine])
    assert weights(forked) == weights(plain)
    assert ledger(forked) == ledger(plain)


def test_a_command_has_a_process_of_its_own_and_ends_it(tmp_path, monkeypatch):
    monkeypatch.delenv(preload.SHARED)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    out = train(tmp_path / "run", "+method=hft", "suite=pocket")
    assert (out / "results.json").exists()
    assert not list((tmp_path / "tmp").glob("hft-*"))
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if str(tmp_path).encode() in line]


@pytest.mark.parametrize("place", ["x" * 120, "missing"])
def test_without_a_place_for_its_socket_workers_are_plain(place, tmp_path, monkeypatch):
    monkeypatch.delenv(preload.SHARED)
    monkeypatch.setattr(preload, "_OWN", [])
    if place != "missing":
        (tmp_path / place).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
    assert preload.start(["RowsJob", "job.json"], tmp_path / "worker.log", dict(os.environ), None, []) is None
    assert not list((tmp_path / place).glob("*"))


def forked(folder: Path, job: str, count: int | None = None, **variables: str) -> preload.Forked | None:
    (folder / "job.json").write_text(job)
    wanted = {**environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    return preload.start(["RowsJob", str(folder / "job.json")], folder / "worker.log", wanted, count, [])


def test_a_worker_that_fails_harms_no_other(tmp_path):
    for _ in range(2):
        worker = forked(tmp_path, "[]")
        assert worker is not None
        assert worker.wait() == 2
        assert worker.poll() == 2
        assert "does not hold a JSON object" in (tmp_path / "mistake.txt").read_text()
    worker = forked(tmp_path, "{}", HFT_LOG_LEVEL="nonsense")
    assert worker is not None
    assert worker.wait() == 1
    assert "Unknown HFT_LOG_LEVEL 'NONSENSE'" in (tmp_path / "worker.log").read_text()


def test_a_command_killed_while_it_asks_leaves_no_traceback(tmp_path):
    log = Path(os.environ[preload.SHARED]).with_name("log")  # what the process that forks prints
    before = log.read_text()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[preload.SHARED])
    worker = forked(tmp_path, "[]")
    assert worker is not None
    assert worker.wait() == 2
    assert log.read_text() == before


def test_a_rank_that_fails_ends_the_others(tmp_path):
    worker = forked(tmp_path, "[]", 2)
    assert worker is not None
    assert worker.wait() == 1


def test_another_environment_needs_a_plain_process(tmp_path):
    assert forked(tmp_path, "{}", HF_HOME="/elsewhere") is None


def test_a_worker_ends_with_its_command_and_its_keeper(tmp_path):
    for name in ("command", "keeper"):
        out = tmp_path / name
        process = start(out, "+method=hft", "train.max_steps=4000")
        wait_for_step(out / "rounds/01-order/progress.json", process)
        (worker,) = [pid for pid in ranks(out) if pid != process.pid]
        line = Path(f"/proc/{worker}/cmdline").read_bytes().rstrip(b"\0")
        assert line.split(b"\0")[1:4] == [b"-m", b"hft_cli.launch.work", b"PhaseJob"]
        keeper = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())[1])
        os.kill(process.pid if name == "command" else keeper, signal.SIGKILL)
        assert process.wait() == (-signal.SIGKILL if name == "command" else 128 + signal.SIGKILL)
        wait_until_gone(out)
