"""Run a program that a model wrote, in a process of its own with limits: HumanEval's check of generated code.

What it limits (on Linux): seconds of processor and of wall time, memory, the size of a file it writes, starting further
processes (not if you are root), and, where the kernel lets us, the network. Its folder is empty and goes away after, it
gets nothing of the environment, and it is killed with whatever it started in its process group.

What it does not protect from: the program runs as you. It can read every file that you can read, and write, truncate
or delete the ones that you can write. Where the kernel refuses a network namespace (many containers do) it can reach
the network too, and `network_is_cut` says so. For programs of a model that you do not trust, use a container or a
machine that holds nothing of worth.

This file is also what the process runs: `python -I sandbox.py PROGRAM SECONDS BYTES`. Standard library only.
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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

SECONDS = 5  # wall time of a program; its processor time too

MEMORY = 2**30  # bytes of address space

FILE_SIZE = 2**20  # bytes of a file

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of linux/sched.h

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # of linux/prctl.h


def run(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Run a Python program to its end: "passed", "failed: REASON" or "timed out"."""
    return _run(program, seconds, memory)[0]


@cache
def network_is_cut() -> bool:
    """Whether programs run without a network here."""
    return _run("", SECONDS, MEMORY)[1]


def _run(program: str, seconds: int, memory: int) -> tuple[str, bool]:
    folder = Path(tempfile.mkdtemp(prefix="hft-program-"))
    token = secrets.token_hex(16)  # said at the end alone, so that a program that exits early has not passed
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
            said, _ = process.communicate(token, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it left running
            process.communicate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = said.splitlines()
    cut = "network cut" in lines
    if token in lines:
        return "passed", cut
    reasons = [line for line in lines if line.startswith("failed: ")]
    return (reasons[-1] if reasons else "timed out" if process.returncode in (-9, -24) else "failed: ended early"), cut


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """pass@k of one problem's programs against its test: the unbiased estimate of Chen et al. 2021, equation 1."""
    return CodeEval().compute(references=references, predictions=predictions, k=k)[0]


class CodeEval:
    """Stands in for the metric `code_eval` of Hugging Face's evaluate: the same figures, from programs run here."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict[int, list[Any]]]:
        """The mean over problems of pass@k for each k that there are programs enough for, and what each came to."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # a program that never ends takes its seconds alone
            found = {
                number: list(threads.map(run, [f"{program}\n{test}" for program in programs]))
                for number, (test, programs) in enumerate(zip(references, predictions, strict=True))
            }
        figures = {}
        for most in k:
            if all(len(ends) >= most for ends in found.values()):
                each = [
                    1 - comb(len(ends) - ends.count("passed"), most) / comb(len(ends), most) for ends in found.values()
                ]
                figures[f"pass@{most}"] = sum(each) / len(each)
        return figures, {number: list(enumerate(ends)) for number, ends in found.items()}


def _inside(path: str, seconds: int, memory: int) -> None:
    """What the process does: cut what can be cut, run the program, and say how it ended."""
    import ctypes
    import resource

    token = sys.stdin.read()
    said = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+") as nothing:
        for number in (0, 1):
            os.dup2(nothing.fileno(), number)
    if sys.platform == "linux":
        system = ctypes.CDLL(None, use_errno=True)
        system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _cut_network(system):
            said.write("network cut\n")
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file too large is an error in the program, not its end
    said.flush()
    with open(path, encoding="utf-8") as file:
        source = file.read()
    os.unlink(path)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: a program that leaves before its test has not passed it
        said.write(f"failed: {type(error).__name__}\n")
    else:
        said.write(f"{token}\n")
    said.flush()


def _cut_network(system: Any) -> bool:
    """Whether we now are in a network namespace of our own, which has nothing in it."""
    user, group = os.getuid(), os.getgid()
    if system.unshare(CLONE_NEWNET) == 0:
        return True
    if system.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text)  # without a map of ourselves no file can be made
    return True


if __name__ == "__main__":
    _inside(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
