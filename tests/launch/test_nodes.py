"""Several machines: here processes of one, that meet over the network as machines would."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK, command, environment, hft, train, wait_for_step, wait_until_gone, weights

from hft_cli.config.schema import EngineConfig
from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.launch import nodes
from hft_cli.launch.nodes import Node, connect, free, introduce, listen, this_node

FACTS = {
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "config": {"train.max_steps": 4},
    "files": {"weights": "aa", "the data of order": "bb"},
}


@pytest.fixture
def port() -> int:
    """A port that is free, and the one after it."""
    while True:
        with socket.socket() as sock:
            sock.bind(("", 0))
            found = sock.getsockname()[1]
        if found < 65000 and free(found) and free(found + 1):
            return found


# ------------------------------------------------------------------------------------------------- which node this is

TWO = EngineConfig(name="zero3", zero_stage=3, num_nodes=2, rendezvous="head:29500")


def engine(**changes: Any) -> EngineConfig:
    return EngineConfig(**(vars(TWO) | changes))


@pytest.fixture
def surroundings(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Sets what srun or torchrun would set, and nothing else of theirs."""
    for key in ("GROUP_RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)

    def put(values: dict[str, str]) -> None:
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return put


@pytest.mark.parametrize(
    ("config", "around", "rank"),
    [
        (engine(node_rank=1), {}, 1),
        (engine(), {"SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        (engine(), {"GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "1", "SLURM_NODEID": "0"}, 1),
        (engine(node_rank=0), {"SLURM_NODEID": "1"}, 0),
    ],
    ids=["the key", "srun", "torchrun within a job", "the key goes first"],
)
def test_a_node_knows_its_number(config, around, rank, surroundings):
    surroundings(around)
    assert this_node(config) == Node(rank, 2, "head", 29500)


def test_one_node_meets_nobody(surroundings):
    surroundings({"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert this_node(EngineConfig(name="zero3", zero_stage=3)) is None


@pytest.mark.parametrize(
    ("config", "around", "words"),
    [
        (engine(), {}, r"which of them is this\? Give engine.node_rank=0 here"),
        (engine(node_rank=1, rendezvous=None), {}, r"needs engine.rendezvous=HOST:PORT"),
        (engine(node_rank=1, rendezvous="head:80"), {}, r"port must be from 1024"),
        (engine(), {"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "16"}, r"srun has started 16 tasks .* one task on"),
        (engine(), {"SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "2"}, r"This is node 2, counted from 0"),
        (EngineConfig(name="single"), {"LOCAL_WORLD_SIZE": "8"}, r"torchrun has started 8 .* starts its ranks itself"),
        (EngineConfig(name="single"), {"SLURM_STEP_NUM_TASKS": "8"}, r"srun has started 8 .* starts its ranks itself"),
    ],
)  # fmt: skip
def test_a_node_that_cannot_know_its_place_is_refused(config, around, words, surroundings):
    surroundings(around)
    with pytest.raises(UserError, match=words):
        this_node(config)


# ------------------------------------------------------------------------------------------------------------ meeting


def follower(port: int, folder: Path, facts: dict[str, Any], rank: int = 1) -> tuple[threading.Thread, list[Any]]:
    """A node in a thread that comes, introduces itself and waits for the goodbye; and what that raised."""
    ended: list[Any] = []

    def come() -> None:
        node = Node(rank, 2, "127.0.0.1", port)
        try:
            leader = connect(node, 5)
            assert leader is not None
            introduce(leader, facts, folder / ".nodes")
            while not nodes.is_goodbye(leader.receive(1) or {}):
                pass
            ended.append("done")
        except (UserError, NodeError, Stopped) as error:
            ended.append(error)

    thread = threading.Thread(target=come)
    thread.start()
    return thread, ended


def changed(part: str, key: str, value: Any) -> dict[str, Any]:
    return {**FACTS, part: {**FACTS[part], key: value}}


def test_nodes_that_agree_begin_and_end_together(port, tmp_path):
    thread, ended = follower(port, tmp_path, FACTS)
    with listen(Node(0, 2, "127.0.0.1", port)) as others:
        others.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert ended == ["done"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (changed("versions", "torch", "2.12.0"), r"Node 1 .* has torch 2.12.0, node 0 has 2.13.0. Install the same"),
        (changed("config", "train.max_steps", 9), r"has train.max_steps 9, node 0 has 4. Start the same command"),
        (changed("files", "weights", "cc"), r"has weights cc, node 0 has aa. Give every node the same model and data"),
        (changed("files", "the data of order", "cc"), r"has the data of order cc"),
    ],
)
def test_a_node_with_other_versions_settings_or_files_is_refused_on_both_sides(facts, words, port, tmp_path):
    thread, ended = follower(port, tmp_path, facts)
    with (
        pytest.raises(UserError, match=words),
        listen(Node(0, 2, "127.0.0.1", port)) as others,
    ):
        others.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert isinstance(ended[0], UserError)
    assert "node 0: " in str(ended[0])


def test_a_node_that_does_not_see_the_runs_folder_is_refused(port, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "LAG", 1.0)
    (tmp_path / "elsewhere").mkdir()
    thread, ended = follower(port, tmp_path / "elsewhere", FACTS)
    with (
        pytest.raises(UserError, match=r"Node 1 .*not the folder that node 0 writes to"),
        listen(Node(0, 2, "127.0.0.1", port)) as others,
    ):
        others.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert "file system that all nodes share" in str(ended[0])


def test_two_nodes_with_one_number_are_refused(port, tmp_path):
    first, second = (follower(port, tmp_path, FACTS) for _ in range(2))
    with (
        pytest.raises(UserError, match=r"Two nodes are both engine.node_rank=1"),
        listen(Node(0, 3, "127.0.0.1", port)) as others,
    ):
        others.meet(FACTS, tmp_path / ".nodes")
    for thread, ended in (first, second):
        thread.join()
        assert isinstance(ended[0], UserError)


def test_a_node_that_does_not_come_is_named(port, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "WAIT", 2.0)
    thread, ended = follower(port, tmp_path, FACTS, rank=2)
    with (
        pytest.raises(NodeError, match=r"Node 1 did not come"),
        listen(Node(0, 3, "127.0.0.1", port)) as others,
    ):
        others.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert isinstance(ended[0], NodeError)


def test_what_tries_ports_does_not_disturb(port, tmp_path):
    with listen(Node(0, 2, "127.0.0.1", port)) as others:
        for word in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": "1"}\n', b"[]\n"):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(word)
        with socket.create_connection(("127.0.0.1", port)):  # and one that says nothing
            thread, ended = follower(port, tmp_path, FACTS)
            others.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert ended == ["done"]


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ({"stop": 15}, Stopped, ""),
        ({"mistake": "no such file"}, UserError, r"Node 1 .*: no such file"),
        ({"failed": "OSError()"}, NodeError, r"Node 1 .* failed: OSError"),
        ({}, NodeError, r"Node 1 .* is gone"),
    ],
    ids=["stopped", "mistaken", "failed", "killed"],
)
def test_a_node_that_ends_before_it_is_ready_ends_node_0_too(said, kind, words, port, tmp_path):
    def meet() -> None:
        with listen(Node(0, 2, "127.0.0.1", port)) as others:
            leader = connect(Node(1, 2, "127.0.0.1", port), 5)
            assert leader is not None
            if said:
                leader.send(**said)
            else:
                leader.sock.close()
            others.meet(FACTS, tmp_path / ".nodes")

    with pytest.raises(kind) as error:
        meet()
    assert re.search(words, str(error.value))


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_in_use_is_refused(port, which):
    with socket.socket() as taken:
        taken.bind(("", port + which))
        taken.listen()
        with (
            pytest.raises(UserError, match=rf"Port {port + which} is in use on this machine. Choose another"),
            listen(Node(0, 2, "127.0.0.1", port)),
        ):
            pass


@pytest.mark.parametrize(
    ("error", "kind"), [(UserError("bad rows"), UserError), (Stopped(15), Stopped), (RuntimeError("x"), NodeError)]
)
def test_how_node_0_ends_before_the_others_are_let_in_is_how_they_end(error, kind, port, tmp_path):
    thread, ended = follower(port, tmp_path, FACTS)

    def fail() -> None:
        with listen(Node(0, 2, "127.0.0.1", port)):
            time.sleep(1.5)  # the other one has come, and waits
            raise error

    with pytest.raises(type(error)):
        fail()
    thread.join()
    assert isinstance(ended[0], kind)


# ------------------------------------------------------------------------------------------------------- whole runs

pair = pytest.mark.xdist_group("nodes")
SETTINGS = ("+method=hft", "engine=zero3", "train.micro_batch_size=2", "train.max_steps=40", "train.save_every=10")


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


@pytest.mark.end_to_end
@pair
def test_two_nodes_stopped_by_a_signal_to_one_and_resumed_end_with_the_bits_of_one_node(one_node, port, tmp_path):
    out = tmp_path / "run"
    first, second = (start(out, port, rank) for rank in (0, 1))
    wait_for_step(out / "rounds/01-order/progress.json", first)
    second.send_signal(signal.SIGUSR1)
    told = [node.communicate(timeout=120)[0] for node in (first, second)]
    assert (first.returncode, second.returncode) == (128 + signal.SIGUSR1,) * 2, told
    assert list((out / "rounds/01-order/checkpoints").glob("checkpoint-*/hft.json")), told
    assert not (out / "rounds/01-order/outcome.json").exists()
    wait_until_gone(out)

    first, second = (start(out, port, rank) for rank in (0, 1))
    told = [node.communicate(timeout=120)[0] for node in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), told
    assert "Continuing the run" in told[0]
    assert weights(out) == weights(one_node)
    assert hft("verify", out).status == 0
    done = [start(out, port, rank) for rank in (1, 0)]  # a finished run keeps nobody waiting
    assert ["nothing to do" in node.communicate(timeout=20)[0] for node in done] == [False, True]
    assert [node.returncode for node in done] == [0, 0]


@pytest.mark.end_to_end
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
    told = [host.communicate(timeout=180)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], told
    assert weights(out) == weights(one_node)


@pytest.mark.end_to_end
@pair
@pytest.mark.parametrize("dies", [0, 1])
def test_when_a_node_dies_the_other_ends_its_ranks_and_says_so(dies, port, tmp_path):
    out = tmp_path / "run"
    both = [start(out, port, rank, "train.max_steps=4000", "train.save_every=null") for rank in (0, 1)]
    wait_for_step(out / "rounds/01-order/progress.json", both[0])
    both[dies].kill()
    told = both[1 - dies].communicate(timeout=60)[0]
    both[dies].communicate()
    assert both[1 - dies].returncode == 1
    assert f"Node {dies}" in told.splitlines()[-1]
    assert "is gone" in told
    assert "Traceback" not in told
    wait_until_gone(out)
    assert not (out / "DONE").exists()


def test_a_run_of_several_nodes_needs_one_folder_and_leaves_nothing_after_a_mistake(tmp_path, port):
    two = ("+method=hft", "engine=zero2", "engine.num_nodes=2", "engine.node_rank=0", "train.micro_batch_size=2")
    where = f"engine.rendezvous=127.0.0.1:{port}"
    ended = hft("train", *two, where, cwd=tmp_path)
    assert ended.status == 2
    assert "needs output_dir=" in ended.err
    both = [
        start(tmp_path / "run", port, rank, "data.path=nowhere.jsonl") for rank in (0, 1)
    ]  # each sees it, and no one waits for the other
    told = [node.communicate(timeout=40)[0] for node in both]
    assert [node.returncode for node in both] == [2, 2]
    assert all("nowhere.jsonl" in text for text in told)
    assert not (tmp_path / "run").exists()
    ended = hft("train", "-m", *two, where, "seed=1,2", f"output_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "needs a job of its own for each run" in ended.err
