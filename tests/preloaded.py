"""The process that forks the workers of the tests' commands (hft_cli/launch/preload.py). It forks test files too.

Run as a program: `python -m preloaded SOCKET [MODULE …]`.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hft_cli.launch import preload, work

SCRIPT = "script"  # in the place of a kind of job: the other arguments are a file of Python, and its arguments

# What test files load that workers do not.
MODULES = (*preload.MODULES, "deepspeed", "pytest", "hypothesis", "scipy.optimize", "peft")


def start(place: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the process, which listens on the socket `place` when it has loaded its libraries."""
    process = preload.start_process("preloaded", place, variables, MODULES)
    preload.wait_until_ready(process, place)
    return process


def fork_ranks(ranks: int, script: str, arguments: Sequence[str], variables: dict[str, str], log: Path) -> int | None:
    """Run a file of Python in forks, as torchrun would run it; its exit status, None without the process."""
    if preload.SHARED not in os.environ:
        return None
    preload.KINDS = tuple({*preload.KINDS, SCRIPT})
    worker = preload.start([SCRIPT, script, *arguments], log, variables, ranks, [])
    return None if worker is None else worker.wait()


def _run(arguments: Sequence[str]) -> int:
    if arguments[0] != SCRIPT:
        return _do_job(arguments)
    sys.argv = list(arguments[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


_do_job = work.main

if __name__ == "__main__":
    # Launchers set these in their jobs. Here every process has one thread, whatever they say.
    of_launchers = "SUBMITIT_.*|ENABLE_IPC|KMP_INIT_AT_FORK|[A-Z]+_(NUM|MAXIMUM)_THREADS"
    preload.FREE = re.compile(f"{preload.FREE.pattern}|{of_launchers}")
    work.main = _run
    sys.exit(preload.main(sys.argv[1], [word for word in sys.argv[2:] if word.strip()]))
