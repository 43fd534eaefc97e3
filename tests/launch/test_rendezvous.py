"""Nodes meet, start and end together: here threads of one process, which connect over the network as machines do."""

from __future__ import annotations

import re
import socket
import stat
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

SECRET, KEY = b"secret", b"key"


def follower(port: int, folder: Path, facts: dict[str, Any], rank: int = 1) -> tuple[threading.Thread, list[Any]]:
    """A thread that follows node 0 as another node does, and a list that gets "done" or the error that it raised."""
    ended: list[Any] = []

    node = Node(rank, 2, "127.0.0.1", port)

    def follow() -> None:
        leader = connect(node, folder / ".nodes", 600)
        assert leader is not None
        try:
            leader = introduce(leader, node, facts, folder / ".nodes")
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
    with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
        followers.meet(FACTS)
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
        listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers,
    ):
        followers.meet(FACTS)
    thread.join()
    assert isinstance(ended[0], UserError)
    assert "node 0: " in str(ended[0])


def test_a_node_that_does_not_see_the_runs_folder_is_refused(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "FILE_LAG", 1.0)
    monkeypatch.setattr(rendezvous, "LATE", 0.0)
    (tmp_path / "elsewhere").mkdir()
    thread, ended = follower(port, tmp_path / "elsewhere", FACTS)

    def meet() -> None:
        with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
            while thread.is_alive():
                followers.accept()
            monkeypatch.setattr(rendezvous, "START_TIMEOUT", 0.0)
            followers.meet(FACTS)

    with pytest.raises(NodeError, match=r"127\.0\.0\.1 did not find the secret .* Give all nodes the same output_dir"):
        meet()
    assert "file system that all nodes share" in str(ended[0])


def test_a_secret_that_a_file_system_shows_late_is_found(port, tmp_path):
    late = tmp_path / "late"
    late.mkdir()
    (late / ".nodes").write_text("that of an earlier command")
    thread, ended = follower(port, late, FACTS)
    with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
        while not followers.without_secret:
            followers.accept()
        (late / ".nodes").write_bytes((tmp_path / ".nodes").read_bytes())
        followers.meet(FACTS)
        assert not followers.without_secret
    thread.join()
    assert ended == ["done"]


def test_the_secret_is_the_users_and_is_removed(port, tmp_path):
    file = tmp_path / "runs/new/.nodes"
    with listen(Node(0, 2, "127.0.0.1", port), file) as followers:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.read_bytes() == followers.secret
        followers.node = Node(0, 1, "127.0.0.1", port)  # nobody to wait for at the end
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file is a file\. Choose an empty or a new directory"),
        listen(Node(0, 2, "127.0.0.1", port), tmp_path / "file" / ".nodes"),
    ):
        pass


def test_a_recorded_hello_takes_no_rank(node_one):
    followers, peer = node_one
    (ours,), hello, used = followers.peers, [], set()
    sock, peer.sock = peer.sock, SimpleNamespace(sendall=hello.append)
    peer.begin(SECRET, 1)
    sock.sendall(hello[0] * 2)  # the second one stands for somebody who has seen the first
    assert ours.receive_hello(SECRET, used)["rank"] == 1
    again = Peer(ours.sock, "a stranger", leads=True)
    again._buffer = ours._buffer
    with pytest.raises(NodeError, match="does not send messages of this run"):
        again.receive_hello(SECRET, used)


def test_a_message_that_is_changed_or_sent_twice_is_refused(node_one):
    followers, peer = node_one
    lines: list[bytes] = []
    sock, peer.sock = peer.sock, SimpleNamespace(sendall=lines.append)
    peer.send(ended=0, log="a")
    for line in (lines[0].replace(b": 0", b": 1"), lines[0].partition(b" ")[2]):
        other = Followers(followers.node, followers.listener, SECRET, peers=[], running=1)
        other.peers = [Peer(followers.peers[0].sock, "Node 1", KEY, leads=True)]
        sock.sendall(line)
        with pytest.raises(NodeError, match="does not send messages of this run"):
            check_until_ended(other)
    sock.sendall(lines[0] * 2)
    with pytest.raises(NodeError, match="does not send messages of this run"):
        check_for_ever(followers)
    assert followers.running == 0  # the first of them counted


def test_who_only_answers_for_node_0_is_not_followed(port, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "FILE_LAG", 0.0)
    (tmp_path / ".nodes").write_bytes(SECRET)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread, ended = follower(port, tmp_path, FACTS)
        with listener.accept()[0] as sock:
            false = Peer(sock, "a follower", b"another key", leads=True)
            false.send(go=True)
            thread.join()
    assert isinstance(ended[0], UserError)


def test_two_nodes_with_one_number_are_refused(port, tmp_path):
    first, second = (follower(port, tmp_path, FACTS) for _ in range(2))
    with (
        pytest.raises(UserError, match=r"Two nodes are both engine.node_rank=1"),
        listen(Node(0, 3, "127.0.0.1", port), tmp_path / ".nodes") as followers,
    ):
        followers.meet(FACTS)
    for thread, ended in (first, second):
        thread.join()
        assert isinstance(ended[0], UserError)


def test_a_node_that_does_not_come_is_named(port, tmp_path, monkeypatch):
    thread, ended = follower(port, tmp_path, FACTS, rank=2)

    def meet() -> None:
        with listen(Node(0, 3, "127.0.0.1", port), tmp_path / ".nodes") as followers:
            while not followers.peers:
                followers.accept()
            monkeypatch.setattr(rendezvous, "START_TIMEOUT", 0.0)
            monkeypatch.setattr(rendezvous, "LATE", 0.0)
            followers.meet(FACTS)

    with pytest.raises(NodeError, match=r"Node 1 did not come"):
        meet()
    thread.join()
    assert isinstance(ended[0], NodeError)


def test_what_tries_ports_does_not_disturb(port, tmp_path):
    with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
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
            followers.meet(FACTS)
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
        with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
            leader = connect(Node(1, 2, "127.0.0.1", port), tmp_path / ".nodes", 5)
            assert leader is not None
            if said:
                leader.send(**said)
            else:
                leader.sock.close()
            followers.meet(FACTS)

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
    with pytest.raises(NodeError, match=r"^Node 1 does not send messages of this run\.$"):
        check_until_ended(followers)


def test_a_stream_without_an_end_is_cut_off(node_one):
    followers, peer = node_one

    def flood() -> None:
        with suppress(OSError):
            for _ in range(64):
                peer.sock.sendall(b"x" * (1 << 20))

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(NodeError, match="does not send messages of this run"):
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
def test_a_port_in_use_is_refused(port, which, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", port + which))
        taken.listen()
        with (
            pytest.raises(UserError, match=rf"Port {port + which} is in use on this machine. Choose another"),
            listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes"),
        ):
            pass


@pytest.mark.parametrize(
    ("error", "kind"), [(UserError("bad rows"), UserError), (Stopped(15), Stopped), (RuntimeError("x"), NodeError)]
)
def test_a_node_that_waits_to_start_ends_as_node_0_ends(error, kind, port, tmp_path):
    thread, ended = follower(port, tmp_path, FACTS)

    def fail() -> None:
        with listen(Node(0, 2, "127.0.0.1", port), tmp_path / ".nodes") as followers:
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
        peers = [Peer(ours, "Node 1", KEY, leads=True)]
        followers = Followers(Node(0, 2, "127.0.0.1", port), listener, SECRET, peers=peers, running=1)
        yield followers, Peer(theirs, "Node 0", KEY)


def check_for_ever(followers: Followers) -> None:
    while True:
        followers.check()


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
