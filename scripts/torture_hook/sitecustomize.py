"""Faults at file operations of a run. Python imports this file at its start, where scripts/torture.py puts it.

An audit hook sees each operation that changes the run's directory, in the command ("parent"), in a worker of one
process ("worker") and in the ranks ("rank0", "rank1"). It writes them down, or does something at the n-th one of one of
them. Operations of compiled code (safetensors, parts of torch) raise no audit events.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAULT = json.loads(os.environ.get("HFT_TORTURE", "{}"))  # run, log, state, role, number, kind
DISK = {"disk full": 28, "read-only disk": 30}  # kind -> errno, of every operation from then on, in every process
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Event -> position of the folder's descriptor among its arguments, for names that are relative to one.
CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.link": 2, "shutil.rmtree": 1, "open": None}
PROCESS, LINE = os.getpid(), Path("/proc/self/cmdline").read_bytes()
count, looking = 0, False


def role() -> str:
    words = LINE.split(b"\0")
    if b"hft_cli.launch.work" in words and b"torch.distributed.run" not in words:
        return f"rank{os.environ['RANK']}" if "RANK" in os.environ else "worker"
    if b"hft_cli.launch.preload" in words:
        return "process that forks"
    return "parent" if b"hft_cli" in words else "other"


def is_counted() -> bool:
    """Whether this process has a role: not a fork of one that has kept its command line."""
    global PROCESS, LINE, OWN, count, looking
    if os.getpid() != PROCESS:
        if looking:  # reading the command line is such an operation too
            return False
        looking = True
        line = Path("/proc/self/cmdline").read_bytes()
        looking = False
        if line == LINE:
            return False
        PROCESS, LINE, count = os.getpid(), line, 0  # a worker, forked from the process that has loaded its libraries
        OWN = role()
    return True


def changed_path(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path in the run's directory that an operation changes; None if it changes none there."""
    path, place = arguments[0], CHANGES[event]
    if event == "open" and not arguments[2] & WRITES:
        return None
    if not isinstance(path, (str, bytes, os.PathLike)):
        return None
    path = os.fsdecode(path)
    if place is not None and len(arguments) > place and isinstance(arguments[place], int) and arguments[place] >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[place]}"), path)
    path = os.path.abspath(path)
    if not path.startswith(FAULT["run"] + "/") or os.path.basename(path).startswith("progress."):
        return None
    changes_nothing = os.path.exists(path) if event == "os.mkdir" else event != "open" and not os.path.lexists(path)
    return None if changes_nothing else path


def act(kind: str) -> None:
    if kind == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "SIGKILL of all" and OWN != "parent":
        for pid in (int(os.environ["HFT_TORTURE_PARENT"]), os.getppid()):
            if pid not in (1, os.getpid()):
                os.kill(pid, signal.SIGKILL)
    if kind.startswith("SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in DISK:
        Path(FAULT["state"]).touch()
    if kind == "out of memory":
        raise MemoryError


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    global count
    if event not in CHANGES or not is_counted():
        return
    path = changed_path(event, arguments)
    if path is None:
        return
    if "log" in FAULT:
        with open(FAULT["log"], "a") as file:
            file.write(f"{OWN} {event} {os.path.relpath(path, FAULT['run'])}\n")
        return
    if FAULT["role"] == OWN:
        count += 1
        if count == FAULT["number"]:
            act(FAULT["kind"])
    grows = event in ("open", "os.mkdir") or FAULT["kind"] == "read-only disk"
    if FAULT["kind"] in DISK and grows and os.path.exists(FAULT["state"]):
        number = DISK[FAULT["kind"]]
        raise OSError(number, os.strerror(number), path)


if FAULT:
    OWN = role()
    if OWN == "parent":
        os.environ.setdefault("HFT_TORTURE_PARENT", str(os.getpid()))
    if OWN != "other":
        sys.addaudithook(hook)
    if FAULT.get("kind") == "clock set back":
        now = time.time
        time.time = lambda: now() - 86400 * os.path.exists(FAULT["state"])
