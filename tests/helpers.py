"""Helpers of the tests: run `hft` as a user does, and read what it leaves."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Few steps of few rows: enough to move every matrix.
QUICK = (
    "data=pocket_order",
    "data.test_path=null",
    "suite=none",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.max_length=64",
    "train.learning_rate=1e-3",
    "train.log_every=1",
)


DECAYED = ("method=hft", "train.save_every=2", "train.save_limit=2", "train.weight_decay=0.5")
TWO_ROUNDS = (
    "+method=hft",
    "data.path=[pocket:skills/order/train.jsonl,pocket:skills/backwards/train.jsonl]",
    "selection.redraw=complementary",
)
SCORED = (*DECAYED, "suite=pocket", "data.test_path=pocket:skills/order/test.jsonl")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def hft(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> Ended:
    """Run `hft` in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment()
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hft_cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process: several would only fight over the two cores of a small machine."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": CACHE,
        "PYTHONPATH": os.pathsep.join([TESTS, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
    }


TESTS = str(Path(__file__).parent)  # tests that torchrun starts again as scripts import this module too
CACHE = tempfile.mkdtemp(prefix="hft-tests-")  # the user's own is left alone
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def train(out: Path, *arguments: object) -> Path:
    """A finished quick run in `out`, or a failed test with what it said."""
    done = hft("train", *QUICK, f"output_dir={out}", *arguments)
    assert done.status == 0, done.err
    assert (out / "DONE").exists()
    return out


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()
