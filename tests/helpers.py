"""Helpers of the tests: run `hft` as a user does, and read what it leaves."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from preloaded import fork_command, fork_ranks
from safetensors.torch import load_file

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.cli.commands import run_command
from hft_cli.cli.overrides import hydra_arguments
from hft_cli.config import defaults
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import SCHEMAS, PlanConfig, RunConfig
from hft_cli.errors import UserError
from hft_cli.files import from_dict
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.worker import WorkerRun
from hft_cli.logs import set_up_logging
from hft_cli.method.rounds import draws, phase_config, phases
from hft_cli.paths import conf_dir, resolve_path
from hft_cli.plan.automatic import Machine, with_dtype

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
TWO_RANKS = ("engine.num_processes=2", "train.micro_batch_size=2")
SCORED = (*DECAYED, "suite=pocket", "data.test_path=pocket:skills/order/test.jsonl")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


# Ends a test that hangs. It is no measure of speed: a busy machine must not fail a test.
HANGS_AFTER = 1800  # seconds


def hft(*arguments: object, cwd: Path | None = None, timeout: float = HANGS_AFTER) -> Ended:
    """Run `hft` in a process of its own, which is forked where that changes nothing: what it loads is loaded once."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        status = fork_command([*map(str, arguments)], cwd or Path.cwd(), environment(), files)
        if status is not None:
            return Ended(status, *(file.read_text() for file in files))
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment()
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def hft_here(*arguments: object) -> Ended:
    """Run a command of `hft` in this process, which has loaded transformers already."""
    logger, out, err = logging.getLogger("hft_cli"), io.StringIO(), io.StringIO()
    before = (logger.handlers, logger.propagate, logger.level)
    name, *words = map(str, arguments)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            set_up_logging()
            status = run_command(name, words)
        except UserError as error:
            logger.error("hft: %s", error)
            status = 2
        finally:
            logger.handlers, logger.propagate, logger.level = before
    return Ended(status, out.getvalue(), err.getvalue())


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "hft_cli", *map(str, arguments)]


# Variables that pytest and the libraries set in this process: commands do not get them from a shell.
OF_THIS_PROCESS = (
    "PYTEST_CURRENT_TEST", "KMP_", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
    "TORCHINDUCTOR_CACHE_DIR", "HF_XET_HIGH_PERFORMANCE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE",
)  # fmt: skip


def environment() -> dict[str, str]:
    """One thread a process: several would only fight over the two cores of a small machine."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(OF_THIS_PROCESS)},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": CACHE,
        "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")])),
    }


def environment_of_workers() -> dict[str, str]:
    """What commands with `environment()` give their workers."""
    return {**environment(), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def torchrun(ranks: int, script: str | Path, *arguments: object) -> None:
    """Run a test file as the ranks of torchrun, or fail with what they printed. In forks if they can be had."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        words = [str(word) for word in arguments]
        status = fork_ranks(ranks, str(script), words, environment_of_workers(), log)
        assert not status, log.read_text()[-3000:]
    if status == 0:
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, script]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        [*map(str, [*command, *arguments])],
        capture_output=True,
        text=True,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PATH": path},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


TESTS = str(Path(__file__).parent)  # tests that torchrun starts again as scripts import this module too
CACHE = tempfile.mkdtemp(prefix="hft-tests-")  # the user's own is left alone
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


def train(out: Path, *arguments: object) -> Path:
    """A finished quick run in `out`, or a failed test with what it said."""
    done = hft("train", *QUICK, f"output_dir={out}", *arguments)
    assert done.status == 0, done.err
    assert (out / "DONE").exists()
    return out


def start(out: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a quick run in `out` without waiting for it."""
    return subprocess.Popen(
        command("train", *QUICK, f"output_dir={out}", *arguments),
        env=environment(),
        # A shell that starts the tests in the background makes them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill(process: subprocess.Popen[bytes], out: Path) -> None:
    """Kill a run without a warning, and wait until its workers are gone too."""
    process.kill()
    process.wait()
    wait_until_gone(out)


def on_one_worker(engine: str, *more: object) -> object:
    """Parameters of a test, to run in the process of pytest-xdist that has the shared runs of the engine."""
    return pytest.param(engine, *more, marks=pytest.mark.xdist_group(engine))


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


BASE = Path(resolve_path("pocket:model"))


def ledger(run: Path) -> list[dict]:
    return json.loads((run / "draws.json").read_text())["rounds"]


def changed(before: Path, after: Path) -> set[str]:
    """Tensors that differ, told by a reader that shares nothing with ours."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    first, second = (load_file(run / "model/model.safetensors") for run in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until `path` is there; fail if the process ends before. No time limit: a busy machine is no failure."""
    while not path.exists():
        ended = process.poll() is not None
        assert path.exists() or not ended, f"ended before {path.name}"
        time.sleep(0.02)


def wait_for_step(progress: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a training worker has written to its progress file that a step is done."""
    while not trains(progress):
        ended = process.poll() is not None
        assert trains(progress) or not ended, "ended before a step"
        time.sleep(0.02)


def trains(progress: Path) -> bool:
    """Whether a progress file says that an optimizer step is done."""
    return progress.exists() and json.loads(progress.read_text())["step"] is not None


def ranks(out: Path) -> list[int]:
    """Processes that work on the run in `out`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def wait_until_gone(out: Path) -> None:
    """Wait until no process works on the run in `out`."""
    deadline = time.monotonic() + HANGS_AFTER
    while ranks(out):
        assert time.monotonic() < deadline, f"still running: {ranks(out)}"
        time.sleep(0.1)


def load_script(name: str) -> Any:
    """The module of a file in `scripts/`."""
    spec = spec_from_file_location(name, Path(__file__).parents[1] / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # there for its dataclasses
    spec.loader.exec_module(module)
    return module


def composed(*overrides: str) -> RunConfig:
    """What `hft train` composes from the overrides; of an experiment that is a sweep, its first job."""
    return composed_by("train", *overrides)


def composed_by(command: str, *overrides: str) -> Any:
    """The same for `hft train`, `hft plan` or `hft eval`."""
    folders = [text.partition("=")[2] for text in overrides if text.startswith("output_dir=")]  # each test has another
    others = [text for text in overrides if not text.startswith("output_dir=")]
    plain = {
        **deepcopy(_container(command, str(conf_dir()), *others)),
        **({"output_dir": folders[-1]} if folders else {}),
    }
    values = from_dict(SCHEMAS[command], plain)
    values.model = with_dtype(values.model, Machine(gpus=0, memory=None, bfloat16=False))
    return values


@cache
def _container(command: str, folder: str, *overrides: str) -> Any:
    """A composed config as plain values."""
    arguments = hydra_arguments(command, ["--cfg=job", *overrides])
    defaults.register()
    ConfigStore.instance().store(name="schema", node=SCHEMAS[command])
    with initialize_config_dir(folder, version_base="1.3"):
        config = compose("eval" if command == "eval" else "train", [text for text in arguments if text[0] != "-"])
    return OmegaConf.to_container(config, resolve=True)


def phase_job(folder: Path, model: Path, *overrides: str) -> PhaseJob:
    """The job of the only phase of a run of HFT in `folder`, as `hft train` makes it."""
    config = composed("+method=hft", f"model.path={model}", *overrides, f"output_dir={folder}")
    (phase,), (drawn,) = phases(config), draws(config, parameters_from_folder(model))
    own, log = phase_config(config, phase), str(folder / "metrics.jsonl")
    settings = deepspeed_settings(config)
    return PhaseJob(own, phase, str(model), log, drawn.updated, drawn.frozen, deepspeed=settings)


def save_model(model: Any, folder: Path) -> Path:
    """Save a model of transformers into a new folder, with the embedded model's tokenizer."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(folder)
    return folder


def in_this_process(run: WorkerRun, *_: Any) -> None:
    """In the place of `run_worker`: the worker of a phase, without the seconds that a process of its own takes."""
    from hft_cli.training.phase import train_phase

    train_phase(run.job, run.folder, Progress(run.folder.progress))


def as_plan(config: RunConfig) -> PlanConfig:
    return PlanConfig(**{spec.name: getattr(config, spec.name) for spec in fields(RunConfig)})
