"""Run a program that a model wrote in a limited process: HumanEval's check of generated code.

The limits (on Linux): processor time and wall time, memory, the size of a written file, no further processes (unless
the user is root), and no network if the kernel allows a network namespace. The program starts in an empty folder that
is deleted afterwards. It gets no environment variables, and its whole process group is killed at the end.

The limits do not protect your data: the program runs under your user. It can read every file that you can read, and
write, truncate or delete every file that you can write. If the kernel refuses a network namespace, as in many
containers, the program can also use the network; `is_network_blocked` tells. For a model that you do not trust, use a
container or a machine without valuable data.

This file is also the script of the limited process: `python -I sandbox.py PROGRAM SECONDS BYTES`. Standard library
only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

SECONDS = 5  # processor time of a program, and its wall time

MEMORY = 2**30  # bytes of address space

FILE_SIZE = 2**20  # bytes of a written file

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of linux/sched.h

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # of linux/prctl.h

BLOCKED = "network blocked"  # a line that the limited process prints


def run_program(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Run a Python program in a limited process.

    Returns:
        "passed" if the program ran to its end, "failed: REASON" or "timed out".
    """
    return _run(program, seconds, memory)[0]


@cache
def is_network_blocked() -> bool:
    """Whether programs run without a network on this machine."""
    return _run("", SECONDS, MEMORY)[1]


def _run(program: str, seconds: int, memory: int) -> tuple[str, bool]:
    folder = Path(tempfile.mkdtemp(prefix="hft-program-"))
    token = secrets.token_hex(16)  # printed at the end only, so a program that exits early has not passed
    try:
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, "program.py", str(seconds), str(memory)],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        try:
            output, _ = process.communicate(token, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also processes that the program left running
            process.communicate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = output.splitlines()
    return _result(lines, token, process.returncode), BLOCKED in lines


def _result(lines: list[str], token: str, exit_status: int) -> str:
    if token in lines:
        return "passed"
    reasons = [line for line in lines if line.startswith("failed: ")]
    if reasons:
        return reasons[-1]
    return "timed out" if exit_status in (-signal.SIGKILL, -signal.SIGXCPU) else "failed: ended early"


class CodeEval:
    """Replaces the metric `code_eval` of Hugging Face's `evaluate`: the same figures, with programs run by `run`."""

    def __init__(self, run: Callable[[str], str] = run_program) -> None:
        self.run = run

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict[int, list[Any]]]:
        """Run each program with the test of its problem.

        pass@k is the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), equation 1.

        Args:
            references: the test of each problem.
            predictions: the programs of each problem.
            k: the k of pass@k; one that is larger than the number of programs is left out.

        Returns:
            pass@k for each k, the mean over problems; and problem -> (program's index, result) for each program.
        """
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # a program that times out blocks one thread only
            results = {
                problem: list(threads.map(self.run, [f"{program}\n{test}" for program in programs]))
                for problem, (programs, test) in enumerate(zip(predictions, references, strict=True))
            }
        figures = {}
        for draws in k:
            if all(len(outcomes) >= draws for outcomes in results.values()):
                estimates = [
                    1 - comb(len(outcomes) - outcomes.count("passed"), draws) / comb(len(outcomes), draws)
                    for outcomes in results.values()
                ]
                figures[f"pass@{draws}"] = sum(estimates) / len(estimates)
        return figures, {problem: list(enumerate(outcomes)) for problem, outcomes in results.items()}

    def pass_at_k(self, references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
        """pass@k of one problem; the signature of a metric of lm-evaluation-harness."""
        return self.compute(references, predictions, k)[0]


def _run_limited(path: str, seconds: int, memory: int) -> None:
    """The work of the limited process: set the limits, run the program and print its result."""
    import ctypes
    import resource

    token = sys.stdin.read()
    output = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+") as null:
        for descriptor in (0, 1):
            os.dup2(null.fileno(), descriptor)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _block_network(libc):
            output.write(f"{BLOCKED}\n")
    for resource_kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(resource_kind, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file raises OSError instead of killing the program
    output.flush()
    with open(path, encoding="utf-8") as file:
        source = file.read()
    os.unlink(path)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # also SystemExit: a program that exits before its test has not passed
        output.write(f"failed: {type(error).__name__}\n")
    else:
        output.write(f"{token}\n")
    output.flush()


def _block_network(libc: Any) -> bool:
    """Move this process into an empty network namespace; False if the kernel refuses."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:
        return True
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)  # without a map of our user no file can be created
    return True


if __name__ == "__main__":
    _run_limited(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
