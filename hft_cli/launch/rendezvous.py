"""How the nodes of a run meet, start together and end together. Standard library only.

Node 0 leads. Every other node is a follower: it keeps one TCP connection to node 0, over which both send messages
(`peer.py`). They prove with each of them that they see the run's directory, where the secret is.

    follower to node 0    rank, host     who it is
                          facts          its versions, its config, and the hashes of its files
                          ended, log     exit status and log of its ranks of a worker
                          stop           it received this signal
                          mistake        it ends with a user's mistake; `failed` with another error
    node 0 to follower    go             all nodes agree
                          start, end     start its ranks of a worker, or end them
                          bye            the run has ended: reason and exit status

When a process ends, its connection closes, and the run ends on all nodes.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.errors import NodeError, Stopped, UserError
from hft_cli.launch.nodes import Node, is_free
from hft_cli.launch.peer import Peer, new_secret, printable, read_secret

START_TIMEOUT = 600.0  # seconds that nodes wait for each other at the start
LATE = 5.0  # seconds within which nodes that are started together connect
FILE_LAG = 60.0  # seconds that a shared file system may take to show a new file


HELLO = 10.0  # seconds that a connection has to say which node it is from
STRANGERS = 64  # connections that have not said it yet

logger = logging.getLogger(__name__)


@dataclass
class Followers:
    """The other nodes, as node 0 sees them.

    Attributes:
        secret: what another node must know.
        nonces: those that have been used.
        without_secret: addresses of connections that looked like nodes, but did not know the secret.
        running: number of nodes whose ranks of the current worker have not ended.
    """

    node: Node
    listener: socket.socket
    secret: bytes
    nonces: set[bytes] = field(default_factory=set)
    without_secret: set[str] = field(default_factory=set)
    peers: list[Peer] = field(default_factory=list)
    strangers: list[tuple[float, Peer]] = field(default_factory=list)  # since when they are connected
    running: int = 0

    def meet(self, facts: Mapping[str, Any]) -> None:
        """Wait until all nodes are ready, and refuse a node that differs from this one.

        Args:
            facts: "versions", "config" and "files", each a mapping; see `_compare`.

        Raises:
            UserError: if a node differs, or has made a mistake.
            Stopped: if a node received a signal.
            NodeError: if a node does not connect, fails, or is lost.
        """
        deadline = time.monotonic() + START_TIMEOUT
        ready: set[int] = set()
        while len(ready) < self.node.count - 1:
            self.accept()
            for peer in self.peers:
                message = _message_of_running(peer)
                if "facts" in message:
                    _compare(peer.name, message["facts"], facts)
                    ready.add(peer.rank)
            if time.monotonic() > deadline:
                raise NodeError(self._missing_text())
            time.sleep(0.05)
        for peer in self.peers:
            peer.send(go=True)

    def _missing_text(self) -> str:
        connected = {peer.rank for peer in self.peers}
        missing = [str(rank) for rank in range(1, self.node.count) if rank not in connected]
        if self.without_secret:
            return f"{self._no_secret_text()} Give all nodes the same output_dir, on a file system that they share."
        problem = f"Node {', '.join(missing)} did not come" if missing else "Not all nodes were ready"
        return (
            f"{problem} to {self.node.host}:{self.node.port} within {START_TIMEOUT:.0f} seconds. Start the same "
            "command on every node."
        )

    def _no_secret_text(self) -> str:
        return (
            f"A node at {', '.join(sorted(self.without_secret))} did not find the secret of this run in its output_dir."
        )

    def accept(self) -> None:
        """Accept the nodes that have connected. Connections that do not say which node they are from are closed.

        Raises:
            UserError: if two nodes have the same number.
        """
        self.listener.setblocking(False)
        with suppress(BlockingIOError):
            while len(self.strangers) < STRANGERS:
                sock, (host, *_) = self.listener.accept()
                sock.settimeout(HELLO)  # for sending: a node that reads nothing does not hold up the others
                self.strangers.append((time.monotonic(), Peer(sock, f"the node at {host}", leads=True)))
        waiting, self.strangers = self.strangers, []
        for since, peer in waiting:
            try:
                hello = peer.receive_hello(self.secret, self.nonces)
            except NodeError:
                hello = {}
                self._note_wrong_secret(peer)
            if hello is None and time.monotonic() - since < HELLO:
                self.strangers.append((since, peer))
                continue
            if not 0 < (hello or {}).get("rank", 0) < self.node.count:
                peer.sock.close()
                continue
            assert hello is not None
            self.without_secret.discard(_address(peer))
            peer.rank, peer.name = hello["rank"], f"Node {hello['rank']} ({hello.get('host')})"
            self.peers.append(peer)
            if [other.rank for other in self.peers].count(peer.rank) > 1:
                raise UserError(f"Two nodes are both engine.node_rank={peer.rank}. Number them 0, 1, ….")

    def _note_wrong_secret(self, peer: Peer) -> None:
        if peer.wrong_secret and (address := _address(peer)) not in self.without_secret:
            self.without_secret.add(address)
            logger.info(f"{self._no_secret_text()} Still waiting.")

    def start(self, worker: str, job: str, log: str) -> None:
        """Have the other nodes start their ranks of a worker. `job` and `log` are relative to the run's directory."""
        for peer in self.peers:
            peer.send(start={"worker": worker, "job": job, "log": log})
        self.running = len(self.peers)

    def check(self, stopping: bool = False) -> None:
        """Read the messages of the other nodes.

        Raises:
            Stopped: if a node received a signal, unless this node is `stopping` already.
            NodeError: if the ranks of a node failed, unless this node is `stopping`, or if the node is lost. While a
                run stops, the status says nothing: a scheduler may signal torchrun too, which then ends with status 1.
        """
        for peer in self.peers:
            while (message := peer.receive()) is not None:
                if "stop" in message and not stopping:
                    raise Stopped(int(message["stop"]))
                if "ended" in message:
                    self.running -= 1
                    if message["ended"] != 0 and not stopping:
                        raise NodeError(
                            f"{peer.name}: its ranks ended with exit status {message['ended']}. Its log: "
                            f"{message.get('log')}"
                        )

    def end(self) -> None:
        """Have the other nodes end their ranks, as far as they can be reached."""
        for peer in self.peers:
            with suppress(NodeError):
                peer.send(end=True)
        self.running = 0

    def dismiss(self, reason: str, status: int) -> None:
        """Tell all nodes that the run has ended with exit status `status`, also those that connect at this moment."""
        deadline = time.monotonic() + (LATE if status else 0)
        with suppress(UserError):
            self.accept()
            while len(self.peers) < self.node.count - 1 and time.monotonic() < deadline:
                time.sleep(0.1)
                self.accept()
        for peer in self.peers:
            with suppress(NodeError):
                peer.send(bye={"reason": reason, "status": status})
        for peer in (*self.peers, *(peer for _, peer in self.strangers)):
            peer.sock.close()


def _address(peer: Peer) -> str:
    try:
        return str(peer.sock.getpeername()[0])
    except OSError:
        return "an unknown address"


def _message_of_running(peer: Peer, seconds: float = 0.0) -> dict[str, Any]:
    """The next message of a node that has not ended; empty if none comes within `seconds`.

    Raises:
        UserError, Stopped, NodeError: if the message says that the node ends.
    """
    message = peer.receive(seconds) or {}
    if "mistake" in message:
        raise UserError(f"{peer.name}: {message['mistake']}")
    if "failed" in message:
        raise NodeError(f"{peer.name} failed: {message['failed']}")
    if "stop" in message:
        raise Stopped(int(message["stop"]))
    return message


def _compare(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse the node `name` if one of its facts differs from this node's.

    Raises:
        UserError: with the first difference of the first kind that differs.
    """
    for kind, fix in (
        ("versions", "Install the same versions on every node."),
        ("config", "Start the same command on every node."),
        ("files", "Give every node the same model and data."),
    ):
        here, there = ours[kind], theirs[kind]
        different = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
        if different:
            key = different[0]
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            raise UserError(
                f"{name} has {_short(key)} {_short(there.get(key))}, node 0 has {_short(here.get(key))}{more}. {fix}"
            )


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:12]}…"


@contextmanager
def listen(node: Node, secret_file: Path) -> Iterator[Followers]:
    """On node 0: accept connections while entered, and tell all nodes how the run ended.

    Args:
        node: this node.
        secret_file: in the run's directory; it exists while entered.

    Raises:
        UserError: if the port, or the next one, is in use.
    """
    for port in (node.port, node.port + 1):
        if not is_free(port):
            raise UserError(
                f"Port {port} is in use on this machine. Choose another for engine.rendezvous={node.host}:{node.port} "
                "(that port and the next one), or stop the program that listens on it."
            )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", node.port))
        with new_secret(secret_file) as secret:
            listener.listen(128)
            followers = Followers(node, listener, secret)
            try:
                yield followers
            except UserError as error:
                followers.dismiss(str(error), 2)
                raise
            except Stopped as stop:
                followers.dismiss("stopped", 128 + stop.number)
                raise
            except BaseException as error:
                followers.dismiss(f"node 0 failed: {error}", 1)
                raise
            followers.dismiss("", 0)


def connect(node: Node, secret_file: Path, seconds: float) -> Peer | None:
    """On a follower: connect to node 0 and say which node this is; None if node 0 does not answer within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            sock = socket.create_connection((node.host, node.port), timeout=10)
        except OSError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)
        else:
            sock.settimeout(None)
            leader = Peer(sock, f"Node 0 ({node.host})")
            # Without the secret, node 0 learns that this node looked for it; nobody can answer.
            leader.begin(read_secret(secret_file) or secrets.token_bytes(), node.rank)
            return leader


def introduce(leader: Peer, node: Node, facts: Mapping[str, Any], secret_file: Path) -> Peer:
    """On a follower: send this node's facts to node 0, and wait until all nodes agree.

    Returns:
        The connection to node 0: another one if the secret was not there yet.

    Raises:
        UserError: if node 0 refuses this node, or this node does not see the run's directory.
        NodeError: if the connection to node 0 is lost.
    """
    mistake = (
        f"output_dir={secret_file.parent} is not the folder that node 0 writes to. It must be on a file system that "
        "all nodes share."
    )
    since = time.monotonic()
    while True:
        try:
            leader.send(facts=facts)
            answer = leader.receive(2 * START_TIMEOUT)
        except NodeError:
            if leader.received:
                raise
            leader.sock.close()  # node 0 has another secret, or a shared file system shows the file with a delay
            if time.monotonic() - since > FILE_LAG:
                raise UserError(mistake) from None
            time.sleep(0.5)
            again = connect(node, secret_file, 0)
            if again is None:
                raise
            leader = again
            continue
        if answer is None:
            raise NodeError(f"{leader.name} does not answer.")
        if is_goodbye(answer):
            raise UserError(f"Node 0 says that the run is finished, and here it is not: {mistake}")
        return leader


def is_goodbye(message: Mapping[str, Any]) -> bool:
    """Whether a message of node 0 says that the run is done.

    Raises:
        UserError, Stopped, NodeError: if the run ended in another way, so that this node ends with the same status.
    """
    if "bye" not in message:
        return False
    reason, status = printable(message["bye"]["reason"]), message["bye"]["status"]
    if status == 2:
        raise UserError(f"node 0: {reason}")
    if status > 128:
        raise Stopped(status - 128)
    if status:
        raise NodeError(reason)
    return True
