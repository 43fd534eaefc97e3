"""Put faults into short runs, and continue them: every run must end with the bits of one that was left alone.

    python scripts/torture.py [--short] [--engine single] [--engine zero2] [--out TABLE.md]

For each engine a run is first left alone, and its file operations are written down. Then, one run after the other, a
fault comes just before an operation of one process: it is killed (SIGKILL or SIGTERM), all are killed, or the disk is
full or read-only from then on. Other faults come at random moments. The same command is given again until it succeeds.
It must end with the same weights, steps, results and files, with no process left, and no traceback in between.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hft_cli.text import markdown_table

HOOK = Path(__file__).parent / "torture_hook"
ROUND = "rounds/01-order"
MEASURED = re.compile(r"second|memory|checkpoint|engines|tokens_per")  # keys that depend on time and machine
ARGUMENTS = (
    "+method=hft", "data=pocket_order", "suite=none", "train.max_steps=5", "train.batch_size=8",
    "train.micro_batch_size=4", "train.max_length=64", "train.learning_rate=1e-3", "train.log_every=1",
    "train.save_every=2", "data.max_rows=64", "data.test_path=null",
)  # fmt: skip
# Kind of fault -> every which file operation of each process it comes before.
LONG = {"SIGKILL": 1, "SIGTERM": 3, "SIGKILL of all": 3, "disk full": 3, "read-only disk": 6, "out of memory": 6}
SHORT = {"SIGKILL": 120}
AT_MOMENTS = ("SIGKILL", "SIGTERM", "SIGKILL of all", "folder removed", "two commands", "clock set back")
ATTEMPTS = 4  # commands that a run may need after its fault


@dataclass(frozen=True)
class Trial:
    """A run with one fault. `number` is that of a file operation of `role`, from 1.

    With 0 the fault comes at a `moment`, a share of the time that a run takes.
    """

    engine: str
    kind: str
    role: str
    number: int = 0
    what: str = ""
    moment: float = 0.0


@dataclass
class Reference:
    """A run that was left alone: what each process did to files, and how the run ended."""

    operations: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    content: dict[str, Any] = field(default_factory=dict)


class Bench:
    """A folder for runs, and the settings of their commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = {
            **{key: value for key, value in os.environ.items() if key != "HFT_PRELOADED"},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def command(self, run: Path, engine: str) -> list[str]:
        ranks = ("engine.num_processes=2", "train.micro_batch_size=2") if engine != "single" else ()
        return [sys.executable, "-m", "hft_cli", "train", *ARGUMENTS, f"engine={engine}", *ranks, f"output_dir={run}"]

    def start(self, run: Path, engine: str, fault: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        environment = {**self.base, "HFT_TORTURE": json.dumps(fault or {})}
        return subprocess.Popen(
            self.command(run, engine), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self, run: Path, engine: str, fault: dict[str, Any] | None = None) -> tuple[int, str]:
        """The exit status and what was said, when no process works on the run any more."""
        process = self.start(run, engine, fault)
        _, said = process.communicate()
        wait_until_gone(run)
        return process.returncode, said


def processes(run: Path) -> list[int]:
    """Processes with the run in their command line or their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            place = entry.read_bytes() + entry.with_name("environ").read_bytes()  # HFT_TORTURE names the run
            if str(run).encode() in place and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def wait_until_gone(run: Path) -> None:
    """Wait until no process works on a run. One that hangs is seen here: the script does not go on."""
    while processes(run):
        time.sleep(0.05)


def content(run: Path) -> dict[str, Any]:
    """What must be the same at the end of every run: weights, steps and losses, results, names of files."""
    files = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest(),
        "delta": hashlib.sha256((run / ROUND / "delta.safetensors").read_bytes()).hexdigest(),
        "frozen": (run / ROUND / "frozen.json").read_text(),
        "steps": without_measures(steps),
        "results": without_measures(json.loads((run / "results.json").read_text())),
        "files": files,
    }


def without_measures(value: Any) -> Any:
    """A JSON value without what depends on time and machine."""
    if isinstance(value, dict):
        return {key: without_measures(item) for key, item in value.items() if not MEASURED.search(key)}
    return [without_measures(item) for item in value] if isinstance(value, list) else value


def leave_alone(bench: Bench, engine: str) -> Reference:
    """A run without a fault."""
    run, log = bench.folder / f"{engine}-reference", bench.folder / f"{engine}.log"
    bench.finish(bench.folder / f"{engine}-warm", engine)  # fills the caches, as for the runs with faults
    start = time.monotonic()
    status, said = bench.finish(run, engine, {"run": str(run), "log": str(log)})
    if status != 0:
        raise SystemExit(f"A run without a fault ended with status {status}:\n{said}")
    operations = [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()]
    return Reference(operations, time.monotonic() - start, content(run))  # type: ignore[arg-type]


def trials(engine: str, reference: Reference, every: dict[str, int], moments: int) -> Iterator[Trial]:
    """Faults before every n-th operation of each process by kind, and `moments` faults at random moments."""
    by_role: dict[str, list[str]] = {}
    for role, what in reference.operations:
        by_role.setdefault(role, []).append(what)
    for kind, stride in every.items():
        for role, operations in sorted(by_role.items()):
            for number in range(1, len(operations) + 1, stride):
                yield Trial(engine, kind, role, number, operations[number - 1])
    chance = random.Random(engine)
    for number in range(moments):
        kind, role = AT_MOMENTS[number % len(AT_MOMENTS)], chance.choice(sorted(by_role))
        yield Trial(engine, kind, role, moment=chance.random())


def try_one(bench: Bench, trial: Trial, number: int, reference: Reference) -> str | None:
    """Do a trial; what went wrong, or None."""
    run = bench.folder / f"{trial.engine}-{number}"
    fault = {
        "run": str(run), "role": trial.role, "number": trial.number, "kind": trial.kind, "state": f"{run}.state",
    }  # fmt: skip
    if trial.number:
        _, said = bench.finish(run, trial.engine, fault)
    else:
        said = at_a_moment(bench, trial, run, fault, trial.moment * reference.seconds)
    if "Traceback" in said:
        return f"a traceback: {said.strip().splitlines()[-1]}"
    for _ in range(ATTEMPTS):
        status, said = bench.finish(run, trial.engine)
        if status == 0:
            break
    if status != 0:
        return f"the same command ends with status {status}: {said.strip().splitlines()[-1]}"
    found = content(run)
    wrong = [key for key, value in reference.content.items() if found[key] != value]
    shutil.rmtree(run)
    return f"other {', '.join(wrong)}" if wrong else None


def at_a_moment(bench: Bench, trial: Trial, run: Path, fault: dict[str, Any], seconds: float) -> str:
    """Start a run, and do something to it after a time; what was said until it ended."""
    process = bench.start(run, trial.engine, fault if trial.kind == "clock set back" else None)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.communicate()[1]))
    reader.start()
    time.sleep(seconds)
    if trial.kind == "two commands":
        second = bench.start(run, trial.engine)
        said.append(second.communicate()[1])
    elif trial.kind == "folder removed":
        shutil.rmtree(run, ignore_errors=True)
    elif trial.kind == "clock set back":
        Path(fault["state"]).touch()
    else:
        chosen = [process.pid, *processes(run)]
        if trial.kind != "SIGKILL of all":
            chosen = [process.pid] if trial.role == "parent" else ranks(run, trial.role)
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if trial.kind == "SIGTERM" else signal.SIGKILL)
    reader.join()
    wait_until_gone(run)
    if trial.kind == "folder removed":
        shutil.rmtree(run, ignore_errors=True)  # what was written after the removal is no run
    return "".join(said)


def ranks(run: Path, role: str) -> list[int]:
    """The processes of a role, "worker" or "rankN", that are there."""
    found = []
    for pid in processes(run):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = [*Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"), *words]  # a fork has it in its words
            starts = b"hft_cli.launch.work" in words and b"torch.distributed.run" not in words
            if starts and (role == "worker" or f"RANK={role.removeprefix('rank')}".encode() in variables):
                found.append(pid)
    return found


def run_trials(bench: Bench, references: dict[str, Reference], todo: list[Trial], jobs: int) -> list[str | None]:
    """Do the trials, some at a time; what went wrong with each, or None."""
    with ThreadPoolExecutor(jobs) as pool:
        work = [
            pool.submit(try_one, bench, trial, number, references[trial.engine]) for number, trial in enumerate(todo)
        ]
        for future, trial in zip(tqdm(work, desc="trials"), todo, strict=True):
            if wrong := future.result():
                tqdm.write(f"{trial}: {wrong}")
    return [future.result() for future in work]


def table(todo: list[Trial], wrong: list[str | None]) -> str:
    """A row for each engine and kind: tries, survived, lost."""
    counts: dict[tuple[str, str], list[int]] = {}
    for trial, fault in zip(todo, wrong, strict=True):
        when = "before a file operation" if trial.number else "at a random moment"
        row = counts.setdefault((trial.engine, f"{trial.kind} {when}"), [0, 0])
        row[fault is not None] += 1
    rows = [[*key, str(good + bad), str(good), str(bad)] for key, (good, bad) in counts.items()]
    return markdown_table(["engine", "fault", "tries", "survived", "lost"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few faults, one engine")
    parser.add_argument("--engine", action="append", help="single (default) or zero2, repeated for both")
    parser.add_argument("--moments", type=int, help="faults at random moments for each engine (default: 84, or 0)")
    parser.add_argument("--kind", action="append", help="only this kind before file operations, repeated for more")
    parser.add_argument("--stride", type=int, default=1, help="leave out all but every n-th of the operations")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="write the table into this file too")
    options = parser.parse_args()
    strides = SHORT if options.short else LONG
    every = {kind: stride * options.stride for kind, stride in strides.items() if kind in (options.kind or strides)}
    moments = options.moments if options.moments is not None else 0 if options.short else 84
    with tempfile.TemporaryDirectory(prefix="hft-torture-") as folder:
        bench = Bench(Path(folder))
        references = {engine: leave_alone(bench, engine) for engine in options.engine or ["single"]}
        todo = [trial for name, made in references.items() for trial in trials(name, made, every, moments)]
        wrong = run_trials(bench, references, todo, options.jobs)
    text = table(todo, wrong)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
