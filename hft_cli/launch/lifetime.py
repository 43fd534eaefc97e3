"""How long processes work on a run's directory: the command, its workers and their ranks share one lock.

A command takes the lock of a directory for itself, and shares it with its workers. The next command cannot start while
one of them is still there. A worker ends with its parent, and a rank with its torchrun.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hft_cli.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # that ask a run to end

SAME_SIGNAL = 5.0  # seconds: a scheduler signals all processes and nodes, so signals that are this close count as one

LOCK = "HFT_LOCK"  # environment variable of a worker: the file whose lock it shares

_HELD: dict[int, Path] = {}  # file descriptor -> file of the locks that this process holds


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Lock the directory of the file `lock` for this process and its workers.

    Raises:
        UserError: if another process works on the directory, or a worker of the command before is still ending.
    """
    with lock.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # ranks, which inherit no file, share it by its name
        except BlockingIOError:
            raise UserError(f"Another process works on {lock.parent}. Wait for it, or stop it.") from None
        _HELD[file.fileno()] = lock
        try:
            yield
        finally:
            del _HELD[file.fileno()]


def inherited(lock: Path | None) -> tuple[tuple[int, ...], dict[str, str]]:
    """What a new worker is given: file descriptors, and environment variables.

    `lock` is that of another node's command; with None the worker shares the lock that this process holds, if any.
    """
    lock = lock or next(reversed(_HELD.values()), None)
    return tuple(_HELD), {LOCK: str(lock)} if lock else {}


def share_lock() -> None:
    """In a worker or one of its ranks: share the lock of the command until this process ends."""
    if LOCK in os.environ:
        fcntl.flock(os.open(os.environ[LOCK], os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have `handler` called for STOP_SIGNALS while this is entered."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_with_parent(number: int) -> None:
    """Have Linux send this process the signal `number` when its parent ends. Other systems have no such thing."""
    if sys.platform == "linux":
        _PRCTL(1, number)  # 1: PR_SET_PDEATHSIG


def prepare_worker() -> None:
    """Between fork and start of a worker."""
    end_with_parent(signal.SIGTERM)
    # Some schedulers signal every process of a job. torchrun would die of it; a worker has its own handler.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_with_torchrun() -> None:
    """In a rank: end when torchrun is killed, also if this rank hangs. Before that, torchrun lets it save."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)


# Looked up before the fork: after it, the lock of the dynamic loader may be held by a thread that no longer exists.
_PRCTL: Any = getattr(ctypes.CDLL(None), "prctl", None)
