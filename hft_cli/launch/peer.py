"""Messages between the nodes of a run: bounded, of known keys and types, and authenticated. Standard library only.

Before node 0 listens, it writes a new secret into the run's directory. Only the user can read it. A message is a line
`MAC JSON`. MAC is the HMAC-SHA256 of the sender, the number of the message and the JSON. Its key is the HMAC of the
secret and a random number (nonce) of the follower, which stands before its first message: `NONCE MAC JSON`. Each nonce
is used once. So whoever only reaches the port can neither send nor repeat a message. Nothing is encrypted.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hft_cli.errors import NodeError, UserError
from hft_cli.launch.lifetime import STOP_SIGNALS

LONGEST = 1 << 20  # bytes of a message: facts have a few thousand

LONGEST_HELLO = 1 << 12  # bytes of the first message

HELLO_FORM = re.compile(rb"[0-9a-f]{32} [0-9a-f]{64} \{.*\}")


@contextmanager
def new_secret(file: Path) -> Iterator[bytes]:
    """A secret that the user's processes can read in `file` while this is entered; its folder is made if necessary."""
    folder, made = file.parent, []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"output_dir={file.parent} is a file. Choose an empty or a new directory.") from None
    secret = secrets.token_hex(32).encode()
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(secret)
        os.fsync(opened.fileno())
    part.rename(file)
    try:
        yield secret
    finally:
        if read_secret(file) == secret:
            file.unlink()
        for folder in made:
            with suppress(OSError):  # the run is in it
                folder.rmdir()


def read_secret(file: Path) -> bytes | None:
    """The secret that node 0 has written; None if it is not there, or not there yet."""
    try:
        return file.read_bytes() or None
    except OSError:
        return None


def _is_message(message: Any) -> bool:
    """Whether a value is a message of hft, with values of the right types."""
    return isinstance(message, dict) and all(key in _KINDS and _KINDS[key](value) for key, value in message.items())


def _has(value: Any, **fields: type) -> bool:
    return isinstance(value, dict) and all(_is(value.get(key), kind) for key, kind in fields.items())


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# Key of a message -> whether a value is one.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("rank", "ended"), lambda value: _is(value, int)),
    **dict.fromkeys(("host", "log", "mistake", "failed"), lambda value: _is(value, str)),
    **dict.fromkeys(("go", "end"), lambda value: value is True),
    "stop": lambda value: _is(value, int) and value in STOP_SIGNALS,
    "facts": lambda value: _has(value, versions=dict, config=dict, files=dict),
    "start": lambda value: _has(value, worker=str, job=str, log=str),
    "bye": lambda value: _has(value, reason=str, status=int),
}


def printable(text: str) -> str:
    """Text of another node for this terminal: one line without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:1000]


class Peer:
    """The connection to another node. It stays open until the run has ended.

    Attributes:
        name: the other node in messages.
        rank: number of the other node.
        key: of this connection; None until a follower has said which node it is.
        received: number of messages that came from the other node.
        wrong_secret: whether the other end has said which node it is, with another secret or none.
    """

    def __init__(self, sock: socket.socket, name: str, key: bytes | None = None, leads: bool = False) -> None:
        self.sock, self.name, self.rank, self.key, self.leads = sock, name, 0, key, leads
        self.sent, self.received, self.wrong_secret = 0, 0, False
        self._hello = self._buffer = b""
        # A machine without power closes no connection: after a minute of silence, ask it every ten seconds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def begin(self, secret: bytes, rank: int) -> None:
        """On a follower: say which node this is."""
        nonce = secrets.token_hex(16).encode()
        self.key = key_of(secret, nonce)
        self._hello = nonce + b" "
        self.send(rank=rank, host=socket.gethostname())

    def _mac(self, from_leader: bool, number: int, data: bytes) -> bytes:
        if self.key is None:
            raise self._refuse()
        return hmac.new(self.key, b"%d %d " % (from_leader, number) + data, "sha256").hexdigest().encode()

    def _refuse(self) -> NodeError:
        return NodeError(f"{self.name} does not send messages of this run.")

    def _gone(self, why: str) -> NodeError:
        return NodeError(f"{self.name} is gone ({why}).")

    def send(self, **message: Any) -> None:
        """Send a message.

        Raises:
            NodeError: if the connection is lost.
        """
        try:
            self.sock.sendall(self.line(json.dumps(message).encode()))
        except OSError as error:
            raise self._gone(error.strerror or str(error)) from None

    def line(self, data: bytes) -> bytes:
        """The next line to send, which carries `data`."""
        line = self._hello + self._mac(self.leads, self.sent, data) + b" " + data + b"\n"
        self._hello = b""
        self.sent += 1
        return line

    def receive(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next message; None if none comes within `seconds`.

        Raises:
            NodeError: if the connection is lost, or what comes is not a message of this run.
        """
        line = self.receive_line(seconds, LONGEST)
        return None if line is None else self._open(line)

    def receive_line(self, seconds: float, longest: int) -> bytes | None:
        """The next line, without its end; None if none comes within `seconds`. NodeError as `receive`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self.sock], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                return None
            try:
                data = self.sock.recv(1 << 16)
            except OSError as error:
                raise self._gone(error.strerror or str(error)) from None
            if not data:
                raise self._gone("it closed its connection")
            self._buffer += data
            if len(self._buffer.partition(b"\n")[0]) > longest:
                raise self._refuse()
            if b"\n" not in self._buffer and time.monotonic() > deadline:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _open(self, line: bytes) -> dict[str, Any]:
        """The message of a line."""
        mac, _, data = line.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(not self.leads, self.received, data)):
            raise self._refuse()
        self.received += 1
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if not _is_message(message):
            raise self._refuse()
        checked: dict[str, Any] = message
        return {key: printable(value) if isinstance(value, str) else value for key, value in checked.items()}

    def receive_hello(self, secret: bytes, used: set[bytes]) -> dict[str, Any] | None:
        """On node 0: the first message of a follower; None if it has not come yet. `used` are the nonces so far.

        Raises:
            NodeError: if the other end does not know the secret.
        """
        line = self.receive_line(0.0, LONGEST_HELLO)
        if line is None:
            return None
        nonce, _, rest = line.partition(b" ")
        if nonce in used:
            raise self._refuse()
        self.key = key_of(secret, nonce)
        self.wrong_secret = HELLO_FORM.fullmatch(line) is not None
        hello = self._open(rest)
        self.wrong_secret = False
        used.add(nonce)
        return hello


def key_of(secret: bytes, nonce: bytes) -> bytes:
    """The key of a connection."""
    return hmac.digest(secret, nonce, "sha256")
