"""Several machines for one run: node 0 leads, the others start their ranks when it says so. Standard library only.

A follower keeps one connection to node 0, over which lines of JSON go; the run's files are on a file system that all
nodes share. Whoever goes away closes its connection, and with it the run ends on all nodes.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.config.schema import EngineConfig
from hft_cli.errors import NodeError, Stopped, UserError

WAIT = 600.0  # seconds that nodes wait for each other at the start

LATE = 5.0  # seconds within which nodes that start together come

LAG = 60.0  # seconds that a shared file system may take to show a new file


@dataclass(frozen=True)
class Node:
    """Which of a run's machines this is, and where node 0 is reached."""

    rank: int
    count: int
    host: str
    port: int

    def torchrun(self) -> list[str]:
        """Options of torchrun for the ranks of all nodes: their order is fixed, and so are the ranks' numbers."""
        return [
            "--nnodes", str(self.count), "--node_rank", str(self.rank),
            "--master_addr", self.host, "--master_port", str(self.port + 1),
        ]  # fmt: skip


def this_node(engine: EngineConfig) -> Node | None:
    """The node that we are, as engine.node_rank, torchrun or srun says; None where there is one only.

    Raises:
        UserError: if nothing says it, or several processes were started on one node.
    """
    started = {"torchrun": "LOCAL_WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}
    numbers = {name: int(os.environ.get(key) or 1) for name, key in started.items()}
    if numbers["torchrun"] > 1 or (engine.num_nodes == 1 and numbers["srun"] > 1):
        by = max(numbers, key=lambda name: numbers[name])
        raise UserError(
            f"{by} has started {numbers[by]} processes of this command, but hft starts its ranks itself. Start one on "
            "each node: engine.num_processes=GPUS engine.num_nodes=NODES."
        )
    if engine.num_nodes == 1:
        return None
    if numbers["srun"] not in (1, engine.num_nodes):
        raise UserError(
            f"srun has started {numbers['srun']} tasks for engine.num_nodes={engine.num_nodes}: start one task on each "
            "node (srun --ntasks-per-node=1)."
        )
    said = (engine.node_rank, os.environ.get("GROUP_RANK"), os.environ.get("SLURM_NODEID"))
    rank = next((int(value) for value in said if value is not None), None)
    if rank is None:
        raise UserError(
            f"engine.num_nodes={engine.num_nodes}: which of them is this? Give engine.node_rank=0 here and 1, … on the "
            "others, or start the command by srun (one task a node) or torchrun."
        )
    if rank >= engine.num_nodes:
        raise UserError(f"This is node {rank}, counted from 0, but engine.num_nodes={engine.num_nodes}.")
    if engine.rendezvous is None:
        raise UserError(
            f"engine.num_nodes={engine.num_nodes} needs engine.rendezvous=HOST:PORT, where the others reach node 0."
        )
    host, _, port = engine.rendezvous.rpartition(":")
    if not 1024 <= int(port) < 65535:
        raise UserError(f"engine.rendezvous={engine.rendezvous}: the port must be from 1024 to 65534.")
    return Node(rank, engine.num_nodes, host, int(port))


def free(port: int) -> bool:
    """Whether nothing on this machine listens on the port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            return False
    return True


class Peer:
    """The connection to another node. Its process keeps it open; only the whole run's end closes it in order."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock, self.name, self.received = sock, name, b""
        self.rank = 0
        # A machine that lost its power sends nothing, not even an end: ask it, after a minute, every ten seconds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message: Any) -> None:
        """Raises NodeError if the other node is gone."""
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise NodeError(f"{self.name} is gone ({error.strerror}).") from None

    def receive(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next message; None if none comes within so many seconds.

        Raises:
            NodeError: if the other node is gone, or says what is not of ours.
        """
        end = time.monotonic() + seconds
        while b"\n" not in self.received:
            ready, _, _ = select.select([self.sock], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return None
            try:
                part = self.sock.recv(1 << 16)
            except OSError as error:
                raise NodeError(f"{self.name} is gone ({error.strerror}).") from None
            if not part:
                raise NodeError(f"{self.name} is gone: it closed its connection.")
            self.received += part
        line, _, self.received = self.received.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            raise NodeError(f"{self.name} does not speak as a node of this run.") from None
        if not isinstance(message, dict):
            raise NodeError(f"{self.name} does not speak as a node of this run.")
        return message


@dataclass
class Followers:
    """The other nodes, as node 0 has them."""

    node: Node
    listener: socket.socket
    peers: list[Peer] = field(default_factory=list)
    running: int = 0  # nodes whose ranks have not ended

    def meet(self, facts: Mapping[str, Any], shared: Path) -> None:
        """Wait for all nodes, and let them begin if their versions, configuration and files are ours.

        `shared` is a file that we write and they must be able to read.

        Raises:
            UserError: if one differs, made a mistake of its own, or does not see the file.
            Stopped: if one was asked to stop.
            NodeError: if one does not come, fails, or goes away.
        """
        end = time.monotonic() + WAIT
        theirs: dict[str, Any] = {}
        while len(theirs) < self.node.count - 1:
            self.admit()
            for peer in self.peers:
                message = peer.receive() or {}
                if "mistake" in message:
                    raise UserError(f"{peer.name}: {message['mistake']}")
                if "failed" in message:
                    raise NodeError(f"{peer.name} failed: {message['failed']}")
                if "stop" in message:
                    raise Stopped(int(message["stop"]))
                if "facts" in message:
                    theirs[peer.name] = message["facts"]
                    _compare(peer.name, message["facts"], facts)
            if time.monotonic() > end:
                known = {peer.rank for peer in self.peers}
                missing = [str(rank) for rank in range(1, self.node.count) if rank not in known]
                what = f"Node {', '.join(missing)} did not come" if missing else "Not all nodes were ready"
                raise NodeError(
                    f"{what} to {self.node.host}:{self.node.port} within {WAIT:.0f} seconds. Start the same command on "
                    "every node."
                )
            time.sleep(0.05)
        nonce = secrets.token_hex(16)
        shared.write_text(nonce)
        try:
            for peer in self.peers:
                peer.send(go=nonce)
            for peer in self.peers:
                answer = peer.receive(LAG + 30)
                if answer is None:
                    raise NodeError(f"{peer.name} does not answer.")
                if "mistake" in answer:
                    raise UserError(f"{peer.name}: {answer['mistake']}")
                if "stop" in answer:
                    raise Stopped(int(answer["stop"]))
        finally:
            shared.unlink(missing_ok=True)

    def admit(self) -> None:
        """Let in those who have come, if they say who they are; what only tries ports is sent away.

        Raises:
            UserError: if two have one number.
        """
        self.listener.setblocking(False)
        while True:
            try:
                sock, (host, *_) = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(True)
            peer = Peer(sock, f"the node at {host}")
            try:
                hello = peer.receive(2) or {}
            except NodeError:
                hello = {}
            if not isinstance(hello.get("rank"), int):
                sock.close()
                continue
            peer.rank, peer.name = hello["rank"], f"Node {hello['rank']} ({hello.get('host')})"
            self.peers.append(peer)
            if [other.rank for other in self.peers].count(peer.rank) > 1:
                raise UserError(f"Two nodes are both engine.node_rank={peer.rank}. Number them 0, 1, ….")

    def start(self, worker: str, job: str, log: str) -> None:
        """Have the other nodes start their ranks of a worker; `job` and `log` are relative to the run's directory."""
        for peer in self.peers:
            peer.send(start={"worker": worker, "job": job, "log": log})
        self.running = len(self.peers)

    def check(self, stopping: bool = False) -> None:
        """Heed what the other nodes say.

        Raises:
            Stopped: if one was asked to stop, unless we are `stopping` already.
            NodeError: if one's ranks failed, or it is gone.
        """
        for peer in self.peers:
            while (message := peer.receive()) is not None:
                if "stop" in message and not stopping:
                    raise Stopped(int(message["stop"]))
                if "ended" in message:
                    self.running -= 1
                    if message["ended"] != 0:
                        raise NodeError(
                            f"{peer.name}: its ranks ended with exit status {message['ended']}. Its log: "
                            f"{message.get('log')}"
                        )

    def end(self) -> None:
        """Have the other nodes end their ranks, as far as they can be reached."""
        for peer in self.peers:
            try:
                peer.send(end=True)
            except NodeError:
                continue
        self.running = 0

    def dismiss(self, reason: str, status: int) -> None:
        """Say goodbye: the run is over, with that exit status; also to those who come just now."""
        end = time.monotonic() + (LATE if status else 0)
        with suppress(UserError):
            self.admit()
            while len(self.peers) < self.node.count - 1 and time.monotonic() < end:
                time.sleep(0.1)
                self.admit()
        for peer in self.peers:
            with suppress(NodeError):
                peer.send(bye={"reason": reason, "status": status})
            peer.sock.close()


def _compare(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a node on which something is not as here."""
    for what, fix in (
        ("versions", "Install the same versions on every node."),
        ("config", "Start the same command on every node."),
        ("files", "Give every node the same model and data."),
    ):
        own, other = ours[what], theirs[what]
        different = [key for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key)]
        if different:
            key = different[0]
            more = f", and {len(different) - 1} more" if len(different) > 1 else ""
            raise UserError(
                f"{name} has {key} {_brief(other.get(key))}, node 0 has {_brief(own.get(key))}{more}. {fix}"
            )


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


@contextmanager
def listen(node: Node) -> Iterator[Followers]:
    """Node 0's side. Bound at once, so that the others may come early; ends by telling them how the run ended.

    Raises:
        UserError: if the port, or the one after it, is in use.
    """
    for port in (node.port, node.port + 1):
        if not free(port):
            raise UserError(
                f"Port {port} is in use on this machine. Choose another for engine.rendezvous={node.host}:{node.port} "
                "(that port and the one after it), or stop what listens there."
            )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", node.port))
        listener.listen(128)
        others = Followers(node, listener)
        try:
            yield others
        except UserError as error:
            others.dismiss(str(error), 2)
            raise
        except Stopped as stop:
            others.dismiss("stopped", 128 + stop.number)
            raise
        except BaseException as error:
            others.dismiss(f"node 0 failed: {error}", 1)
            raise
        others.dismiss("", 0)


def connect(node: Node, seconds: float) -> Peer | None:
    """A follower's side: the connection to node 0, which knows who we are; None if it does not answer in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            sock = socket.create_connection((node.host, node.port), timeout=10)
        except OSError:
            if time.monotonic() > end:
                return None
            time.sleep(0.2)
        else:
            sock.settimeout(None)
            leader = Peer(sock, f"Node 0 ({node.host})")
            leader.send(rank=node.rank, host=socket.gethostname())
            return leader


def introduce(leader: Peer, facts: Mapping[str, Any], shared: Path) -> None:
    """Tell node 0 what we have, and prove that we see its files.

    Raises:
        UserError: if it refuses us, or we do not see its files.
        NodeError: if it is gone.
    """
    leader.send(facts=facts)
    answer = leader.receive(2 * WAIT)
    if answer is None:
        raise NodeError(f"{leader.name} does not answer.")
    mistake = (
        f"output_dir={shared.parent} is not the folder that node 0 writes to. It must be on a file system that all "
        "nodes share."
    )
    if is_goodbye(answer):
        raise UserError(f"Node 0 says that the run is finished, and here it is not: {mistake}")
    end = time.monotonic() + LAG
    while not (shared.exists() and shared.read_text() == answer["go"]):
        if time.monotonic() > end:
            leader.send(mistake=mistake)
            raise UserError(mistake)
        time.sleep(0.5)
    leader.send(ready=True)


def is_goodbye(message: Mapping[str, Any]) -> bool:
    """Whether node 0 says that the run is done.

    Raises:
        UserError, Stopped, NodeError: if it ended otherwise, for the same exit status here.
    """
    if "bye" not in message:
        return False
    reason, status = message["bye"]["reason"], message["bye"]["status"]
    if status == 2:
        raise UserError(f"node 0: {reason}")
    if status > 128:
        raise Stopped(status - 128)
    if status:
        raise NodeError(reason)
    return True
