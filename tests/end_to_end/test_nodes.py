"""Whole runs over two nodes, which are two processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_AFTER, QUICK, command, environment, hft, train, wait_for_step, wait_until_gone, weights

pair = pytest.mark.xdist_group("nodes")
SETTINGS = ("+method=hft", "engine=zero3", "train.micro_batch_size=4", "train.max_steps=40", "train.save_every=10")


@pytest.fixture(scope="module")
def one_node(tmp_path_factory) -> Path:
    """Two ranks on one node."""
    return train(tmp_path_factory.mktemp("one") / "run", *SETTINGS, "engine.num_processes=2")


def start(out: Path, port: int, rank: int, *more: str) -> subprocess.Popen[str]:
    """A node of two, of one rank each."""
    told = (
        f"output_dir={out}",
        "engine.num_nodes=2",
        f"engine.rendezvous=127.0.0.1:{port}",
        f"engine.node_rank={rank}",
    )
    return subprocess.Popen(
        command("train", *QUICK, *SETTINGS, *told, *more),
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pair
def test_two_nodes_stopped_and_resumed_end_with_the_bits_of_one(one_node, port, tmp_path):
    out = tmp_path / "run"
    first, second = (start(out, port, rank) for rank in (0, 1))
    wait_for_step(out / "rounds/01-order/progress.json", first)
    second.send_signal(signal.SIGUSR1)
    told = [node.communicate(timeout=HANGS_AFTER)[0] for node in (first, second)]
    assert (first.returncode, second.returncode) == (128 + signal.SIGUSR1,) * 2, told
    assert list((out / "rounds/01-order/checkpoints").glob("checkpoint-*/hft.json")), told
    assert not (out / "rounds/01-order/outcome.json").exists()
    wait_until_gone(out)

    first, second = (start(out, port, rank) for rank in (0, 1))
    told = [node.communicate(timeout=HANGS_AFTER)[0] for node in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert "Continuing the run" in told[0]
    assert weights(out) == weights(one_node)
    assert hft("verify", out).status == 0
    done = [start(out, port, rank) for rank in (1, 0)]  # a finished run keeps nobody waiting
    assert ["nothing to do" in node.communicate(timeout=HANGS_AFTER)[0] for node in done] == [False, True]
    assert [node.returncode for node in done] == [0, 0]


@pair
def test_plain_torchrun_starts_the_nodes_too(one_node, port, tmp_path):
    out = tmp_path / "run"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port - 1}", "--no-python",
             *command("train", *QUICK, *SETTINGS, f"output_dir={out}", "engine.num_nodes=2",
                      f"engine.rendezvous=127.0.0.1:{port}")],
            env={**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [host.communicate(timeout=HANGS_AFTER)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert weights(out) == weights(one_node)


@pair
@pytest.mark.parametrize("dies", [0, 1])
def test_when_a_node_dies_the_other_ends_its_ranks_and_says_so(dies, port, tmp_path):
    out = tmp_path / "run"
    both = [start(out, port, rank, "train.max_steps=4000", "train.save_every=null") for rank in (0, 1)]
    wait_for_step(out / "rounds/01-order/progress.json", both[0])
    both[dies].kill()
    told = both[1 - dies].communicate(timeout=HANGS_AFTER)[0]
    both[dies].communicate()
    assert both[1 - dies].returncode == 1
    assert f"Node {dies}" in told.splitlines()[-1]
    assert "is gone" in told
    assert "Traceback" not in told
    wait_until_gone(out)
    assert not (out / "DONE").exists()


def test_a_mistake_on_several_nodes_ends_all_and_leaves_nothing(tmp_path, port):
    two = ("+method=hft", "engine=zero2", "engine.num_nodes=2", "engine.node_rank=0", "train.micro_batch_size=2")
    where = f"engine.rendezvous=127.0.0.1:{port}"
    ended = hft("train", *two, where, cwd=tmp_path)
    assert ended.status == 2
    assert "needs output_dir=" in ended.err
    both = [
        start(tmp_path / "run", port, rank, "data.path=nowhere.jsonl") for rank in (0, 1)
    ]  # each sees it, and no one waits for the other
    told = [node.communicate(timeout=HANGS_AFTER)[0] for node in both]
    assert [node.returncode for node in both] == [2, 2]
    assert all("nowhere.jsonl" in text for text in told)
    assert not (tmp_path / "run").exists()
    ended = hft("train", "-m", *two, where, "seed=1,2", f"output_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "needs a job of its own for each run" in ended.err
