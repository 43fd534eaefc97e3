"""Nodes meet, start and end together: here threads of one process, which connect over the network as machines do."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.launch import rendezvous, worker
from hft_cli.launch.nodes import Node
from hft_cli.launch.rendezvous import Followers, Peer, connect, introduce, is_goodbye, listen

FACTS = {
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "config": {"train.max_steps": 4},
    "files": {"weights": "aa", "the data of order": "bb"},
}


def follower(port: int, folder: Path, facts: dict[str, Any], rank: int = 1) -> tuple[threading.Thread, list[Any]]:
    """A thread that follows node 0 as another node does, and a list that gets "done" or the error that it raised."""
    ended: list[Any] = []

    def follow() -> None:
        leader = connect(Node(rank, 2, "127.0.0.1", port), 600)
        assert leader is not None
        try:
            introduce(leader, facts, folder / ".nodes")
            while not is_goodbye(leader.receive(1) or {}):
                pass
            ended.append("done")
        except (UserError, NodeError, Stopped) as error:
            ended.append(error)
        finally:
            leader.sock.close()

    thread = threading.Thread(target=follow)
    thread.start()
    return thread, ended


def changed(part: str, key: str, value: Any) -> dict[str, Any]:
    return {**FACTS, part: {**FACTS[part], key: value}}


def test_nodes_that_agree_begin_and_end_together(port, tmp_path):
    thread, ended = follower(port, tmp_path, FACTS)
    with listen(Node(0, 2, "127.0.0.1", port)) as followers:
        followers.meet(FACTS, tmp_path / ".nodes")
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
def test_a_node_that_differs_is_refused_on_both_sides(facts, words, port, tmp_path):
    thread, ended = follower(port, tmp_path, facts)
    with (
        pytest.raises(UserError, match=words),
        listen(Node(0, 2, "127.0.0.1", port)) as followers,
    ):
        followers.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert isinstance(ended[0], UserError)
    assert "node 0: " in str(ended[0])


def test_a_node_that_does_not_see_the_runs_folder_is_refused(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "FILE_LAG", 1.0)
    (tmp_path / "elsewhere").mkdir()
    thread, ended = follower(port, tmp_path / "elsewhere", FACTS)
    with (
        pytest.raises(UserError, match=r"Node 1 .*not the folder that node 0 writes to"),
        listen(Node(0, 2, "127.0.0.1", port)) as followers,
    ):
        followers.meet(FACTS, tmp_path / ".nodes")
    thread.join()
    assert "file system that all nodes share" in str(ended[0])


def test_two_nodes_with_one_number_are_refused(port, tmp_path):
    first, second = (follower(port, tmp_path, FACTS) for _ in range(2))
    with (
        pytest.raises(UserError, match=r"Two nodes are both engine.node_rank=1"),
        listen(Node(0, 3, "127.0.0.1", port)) as followers,
    ):
        followers.meet(FACTS, tmp_path / ".nodes")
    for thread, ended in (first, second):
        thread.join()
        assert isinstance(ended[0], UserError)


def test_a_node_that_does_not_come_is_named(port, tmp_path, monkeypatch):
    thread, ended = follower(port, tmp_path, FACTS, rank=2)

    def meet() -> None:
        with listen(Node(0, 3, "127.0.0.1", port)) as followers:
            while not followers.peers:
                followers.accept()
            monkeypatch.setattr(rendezvous, "START_TIMEOUT", 0.0)
            followers.meet(FACTS, tmp_path / ".nodes")

    with pytest.raises(NodeError, match=r"Node 1 did not come"):
        meet()
    thread.join()
    assert isinstance(ended[0], NodeError)


def test_what_tries_ports_does_not_disturb(port, tmp_path):
    with listen(Node(0, 2, "127.0.0.1", port)) as followers:
        words = (
            b'{"rank": "1"}',
            b"[]",
            b'{"rank": 9}',
            b'{"rank": true}',
            b'{"no": 1}',
            b'{"a":' * 50_000,
            b"x" * 3_000_000,
        )
        for word in (b"GET / HTTP/1.1\r\n\r\n", *(each + b"\n" for each in words)):
            # It may be closed before all is sent.
            with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
                stranger.sendall(word)
        with socket.create_connection(("127.0.0.1", port)):  # and one that says nothing
            thread, ended = follower(port, tmp_path, FACTS)
            followers.meet(FACTS, tmp_path / ".nodes")
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
        with listen(Node(0, 2, "127.0.0.1", port)) as followers:
            leader = connect(Node(1, 2, "127.0.0.1", port), 5)
            assert leader is not None
            if said:
                leader.send(**said)
            else:
                leader.sock.close()
            followers.meet(FACTS, tmp_path / ".nodes")

    with pytest.raises(kind) as error:
        meet()
    assert re.search(words, str(error.value))


@pytest.mark.parametrize(
    "message",
    [
        {"stop": "x"}, {"stop": 9}, {"stop": True}, {"ended": "0"}, {"facts": []}, {"facts": {"versions": 5}},
        {"ready": 1},
        {"start": {"worker": 5}}, {"bye": {"reason": 5, "status": 0}}, {"bye": 5}, {"mistake": {}}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_message_of_another_shape_is_one_clear_error(message, node_one):
    followers, peer = node_one
    peer.send(**message)
    with pytest.raises(NodeError, match=r"^Node 1 does not send messages of hft\.$"):
        check_until_ended(followers)


def test_a_stream_without_an_end_is_cut_off(node_one):
    followers, peer = node_one

    def flood() -> None:
        with suppress(OSError):
            for _ in range(64):
                peer.sock.sendall(b"x" * (1 << 20))

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(NodeError, match="does not send messages of hft"):
        check_until_ended(followers)
    followers.peers[0].sock.close()
    thread.join()


def test_text_of_another_node_moves_no_cursor(node_one):
    followers, peer = node_one
    peer.send(ended=1, log="a\x1b[2Jb\r\nc")
    with pytest.raises(NodeError, match=r"Its log: a \[2Jb  c$"):
        check_until_ended(followers)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/step.json"])
def test_a_job_outside_the_run_is_not_started(name, tmp_path):
    leader = SimpleNamespace(name="Node 0")
    with pytest.raises(NodeError, match="names a file outside the run's directory"):
        worker._below(tmp_path, name, leader)
    assert worker._below(tmp_path, "rounds/01-a/step.json", leader) == tmp_path / "rounds/01-a/step.json"


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
def test_a_node_that_waits_to_start_ends_as_node_0_ends(error, kind, port, tmp_path):
    thread, ended = follower(port, tmp_path, FACTS)

    def fail() -> None:
        with listen(Node(0, 2, "127.0.0.1", port)) as followers:
            while not followers.peers:
                followers.accept()
            raise error

    with pytest.raises(type(error)):
        fail()
    thread.join()
    assert isinstance(ended[0], kind)


@pytest.fixture
def node_one(port):
    """Node 0 with ranks running on node 1, and node 1's end of their connection."""
    with (
        socket.create_server(("127.0.0.1", port)) as listener,
        socket.create_connection(("127.0.0.1", port)) as theirs,
        listener.accept()[0] as ours,
    ):
        followers = Followers(Node(0, 2, "127.0.0.1", port), listener, [Peer(ours, "Node 1")], running=1)
        yield followers, Peer(theirs, "Node 0")


def check_until_ended(followers: Followers, stopping: bool = False) -> None:
    while followers.running:
        followers.check(stopping)


def test_a_nodes_failed_ranks_fail_a_run_that_goes_on(node_one):
    followers, peer = node_one
    peer.send(ended=1, log="worker-node1.log")
    with pytest.raises(NodeError, match=r"its ranks ended with exit status 1\. Its log: worker-node1\.log"):
        check_until_ended(followers)


def test_the_status_of_ranks_fails_no_run_that_stops(node_one):
    """A scheduler may signal torchrun too, which then ends with status 1 after its ranks kept a checkpoint."""
    followers, peer = node_one
    peer.send(ended=1, log="worker-node1.log")
    check_until_ended(followers, stopping=True)
