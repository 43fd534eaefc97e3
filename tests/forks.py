"""Run `hft` in a fork of this process, which has loaded what the commands load: hundreds of inputs in a minute."""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded import OF_COMMANDS

from hft_cli.cli import main

MEMORY = 12 << 30  # bytes of address space
SECONDS = 120  # of processor time: a command that takes more hangs


@dataclass(frozen=True)
class Forked:
    """How a command ended, whether it would have started a worker, and the names that it left in its folder."""

    status: int
    out: str
    err: str
    worker: bool
    left: tuple[str, ...]

    def is_one_clear_line(self, *words: str) -> bool:
        """Whether it was refused in one line that has these words, before any worker, with nothing left behind."""
        line = self.err.strip()
        clear = line.startswith("hft: ") and "\n" not in line and len(line) < 700
        return self.status == 2 and clear and not self.worker and not self.left and all(w in line for w in words)


def hft_in_fork(folder: Path, *arguments: object) -> Forked:
    """Run a command in `folder`. A worker that it starts ends it instead."""
    for name in OF_COMMANDS:
        importlib.import_module(name)
    before, files = names(folder), [folder.parent / f"{folder.name}.{end}" for end in ("out", "err", "worker")]
    for file in files:
        file.write_bytes(b"")
    pid = os.fork()
    if pid == 0:
        try:
            status = run(folder, files, [str(argument) for argument in arguments])
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    out, err, worker = (file.read_text(errors="replace") for file in files)
    return Forked(os.waitstatus_to_exitcode(ended), out, err, bool(worker), tuple(sorted(names(folder) - before)))


def run(folder: Path, files: list[Path], arguments: list[str]) -> int:
    """In the fork: the exit status of the command, 99 for an exception."""
    os.chdir(folder)
    for descriptor, file in zip((1, 2), files, strict=False):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    start = subprocess.Popen.__init__

    def watched(self: Any, command: Any, *others: Any, **options: Any) -> None:
        if "hft_cli.launch." in str(command):
            files[2].write_text("started")
            os._exit(77)
        start(self, command, *others, **options)

    subprocess.Popen.__init__ = watched  # type: ignore[method-assign]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("HFT_PRELOADED", None)
    sys.argv = ["hft", *arguments]
    try:
        main.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
