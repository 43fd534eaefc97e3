"""Run a program that a model wrote, and its test, in limited processes: HumanEval's check of generated code.

The test runs in a process of its own, which gives the verdict (`judge.py`). The program's process has limits on Linux:
processor time and wall time, memory, the size of a written file, no further processes or threads, no rights of root. It
starts in an empty folder that is deleted afterwards, and gets no environment variables. Where the kernel allows
namespaces, it sees no other processes, has no network, and can write only to its folder. In many containers the kernel
refuses them; `isolation` tells.

The program runs under your user, and can read every file that you can read. For a model that you do not trust, use a
container or a machine without valuable data.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import hft_cli
from hft_cli.evaluation.judge import ENDED_EARLY

SECONDS = 5  # processor time of a program, and its wall time

MEMORY = 2**30  # bytes of address space

SPARE = 5  # seconds that the judge has for starting and ending, beyond those of the program

START = "import sys; sys.path.append(sys.argv[1]); from hft_cli.evaluation.judge import judge; judge()"


def run_program(program: str, test: str = "", seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Run a Python program, then its test, in limited processes. The test sees the names of the program.

    Returns:
        "passed" if both ran to their end, "failed: REASON" or "timed out".
    """
    return str(_run(program, test, seconds, memory)["result"])


@cache
def isolation() -> tuple[str, ...]:
    """What programs are cut off from on this machine: "processes", "network", "files"; empty if the kernel refuses."""
    return tuple(_run("", "", SECONDS, MEMORY)["isolation"])


def _run(program: str, test: str, seconds: int, memory: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="hft-program-"))
    job = {"program": program, "test": test, "seconds": seconds, "memory": memory, "path": site.getsitepackages()}
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START, str(Path(hft_cli.__file__).parents[1])],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "PYTHONHASHSEED": "0", **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(json.dumps(job).encode(), timeout=seconds + SPARE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"result": "timed out", "isolation": []}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    verdict: dict[str, Any] = json.loads(output) if output else {"result": ENDED_EARLY, "isolation": []}
    return verdict


class CodeEval:
    """Replaces the metric `code_eval` of Hugging Face's `evaluate`: the same figures, with programs run by `run`."""

    def __init__(self, run: Callable[[str, str], str] = run_program) -> None:
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
                problem: list(threads.map(self.run, programs, [test] * len(programs)))
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
