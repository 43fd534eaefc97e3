"""Two processes that fork for the tests (hft_cli/launch/preload.py): workers and test files, and commands of hft.

Run as a program: `python -m preloaded SOCKET [MODULE …]`.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from hft_cli.launch import preload, work
from hft_cli.logs import VARIABLE

# In the place of a kind of job. The other arguments are a file of Python and its arguments, or the files for what a
# command prints, the folder that it runs in, and its words.
SCRIPT, COMMAND = "script", "command"
preload.KINDS = (*preload.KINDS, SCRIPT, COMMAND)

# What test files load that workers do not.
MODULES = (*preload.MODULES, "deepspeed", "pytest", "hypothesis", "scipy.optimize", "peft")


# What commands load. Torch is not among it: those that need it load it.
OF_COMMANDS = (
    "hft_cli.cli.main", "hft_cli.cli.file_commands", "hft_cli.cli.hydra_commands", "hft_cli.runner.training",
    "hft_cli.runner.verify", "hft_cli.runner.evaluation", "hft_cli.report.write", "hft_cli.plan.text", "hydra.main",
)  # fmt: skip

PLACE_OF_COMMANDS = "HFT_TESTS_COMMANDS"  # environment variable: the socket of the process that forks commands


def start(place: Path, variables: dict[str, str], modules: Sequence[str] = MODULES) -> subprocess.Popen[bytes]:
    """Start a process, which listens on the socket `place` when it has loaded its libraries."""
    process = preload.start_process("preloaded", place, variables, modules)
    preload.wait_until_ready(process, place)
    return process


def fork_command(words: Sequence[str], folder: Path, variables: Mapping[str, str], files: Sequence[Path]) -> int | None:
    """Run `hft` in a fork; its exit status, None if it must be a process of its own.

    `folder` is where it runs, and `files` get its stdout and its stderr.
    """
    place = os.environ.get(PLACE_OF_COMMANDS)
    own = VARIABLE in variables or any("launcher" in word for word in words)  # messages, processes of its own
    if place is None or variables.get(preload.SHARED, "off") == "off" or own:
        return None
    arguments = [COMMAND, *map(str, files), str(folder), *words]
    with patch.dict(os.environ, {preload.SHARED: place}):
        command = preload.start(arguments, files[1], variables, None, [])
    return None if command is None else command.wait()


def fork_ranks(ranks: int, script: str, arguments: Sequence[str], variables: dict[str, str], log: Path) -> int | None:
    """Run a file of Python in forks, as torchrun would run it; its exit status, None without the process."""
    if preload.SHARED not in os.environ:
        return None
    worker = preload.start([SCRIPT, script, *arguments], log, variables, ranks, [])
    return None if worker is None else worker.wait()


def _run(arguments: Sequence[str]) -> int:
    if arguments[0] == COMMAND:
        _run_command(arguments[1:3], arguments[3], arguments[4:])
    if arguments[0] != SCRIPT:
        return _do_job(arguments)
    sys.argv = list(arguments[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def _run_command(files: Sequence[str], folder: str, words: Sequence[str]) -> NoReturn:
    """In the fork: what `python -m hft_cli` does in a folder, with the end of an interpreter."""
    from hft_cli.cli.main import main

    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    sys.path[0] = folder
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    sys.argv = ["hft", *words]
    main()
    raise AssertionError("main() ends with SystemExit")


_do_job = work.main

if __name__ == "__main__":
    # Launchers set these in their jobs. Here every process has one thread, whatever they say.
    others = "SUBMITIT_.*|ENABLE_IPC|KMP_INIT_AT_FORK|[A-Z]+_(NUM|MAXIMUM)_THREADS|PYTEST_CURRENT_TEST"
    preload.FREE = re.compile(f"{preload.FREE.pattern}|{others}")
    work.main = _run
    sys.exit(preload.main(sys.argv[1], [word for word in sys.argv[2:] if word.strip()]))
