"""The files of a run's directory, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError


class Child:
    """An attribute that is a path in the `folder` of its object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type[Any]) -> Path:
        path: Path = instance.folder / self.name
        return path


@dataclass(frozen=True)
class RoundDir:
    """The directory of a phase of training, rounds/NN-NAME (NN counts from 01), or of an evaluation, eval/WHEN."""

    folder: Path

    delta = Child("delta.safetensors")  # only what the phase trained, with the names and dtypes of the base's files
    outcome = Child("outcome.json")  # seconds, losses, counts; written last: without it the phase is not finished
    frozen = Child("frozen.json")  # SHA-256 of each frozen tensor in memory after the last step
    checkpoints = Child("checkpoints")
    tokens = Child("tokens")  # the tokenized training set, which rank 0 writes and all ranks read
    validation_tokens = Child("tokens/validation")
    best = Child("best")  # STEP/, with delta (and adapter) of the lowest validation loss, while the phase is trained
    data = Child("data.json")  # what the rows were trained as: see data/summary.py
    template = Child("chat_template.jinja")  # with which the phase was trained
    answer_end = Child("answer_end.json")  # the special token that was trained to end an answer: token, id
    adapter = Child("adapter")  # LoRA adapters after the phase, in PEFT's layout
    model = Child("model")  # the model after the phase, as long as a later phase needs it
    log = Child("worker.log")  # what the ranks print
    progress = Child("progress.json")  # its keys: launch/jobs.py, Progress
    stop = Child("stop")  # if it exists, a training worker saves a checkpoint after its step and ends
    mistake = Child("mistake.txt")  # a user's mistake that only a worker could see; the parent reports it

    def score(self, suite: str, task: str) -> Path:
        """The scores of a task in an evaluation. The scores of its items go beside it, as .jsonl."""
        return self.folder / suite / f"{task.replace('/', '_')}.json"


@dataclass(frozen=True)
class PlanRecord:
    """What must be in plan.json. Other keys are read where they are there."""

    base: str
    base_sha256: str
    suite_sha256: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    base_path: str | None = None
    base_revision: str | None = None
    base_files: dict[str, str] | None = None  # name -> SHA-256; None in runs of earlier versions
    template_sha256: str | None = None  # of model.chat_template


@dataclass(frozen=True)
class DrawRecord:
    """What must be in an entry of draws.json: the name of the phase, and the fields of its draw."""

    name: str
    round: int
    seed: int
    level: str
    ratio: float
    updated: list[str]
    frozen: list[str]
    matrices_reached: float
    elements_reached: float
    updated_fraction: float
    sha256: str


@dataclass(frozen=True)
class Ledger:
    """What must be in draws.json."""

    rounds: list[DrawRecord]


@dataclass(frozen=True)
class TensorInMemory:
    """What frozen.json says of a tensor."""

    dtype: str
    sha256: str


@dataclass(frozen=True)
class FrozenRecord:
    """What must be in frozen.json."""

    tensors: dict[str, TensorInMemory]


@dataclass(frozen=True)
class ResultsRecord:
    """What must be in results.json to print a summary."""

    stage: str
    rounds: list[dict[str, Any]]
    eval: dict[str, Any]
    continual: dict[str, Any]
    verification: dict[str, Any]


@dataclass(frozen=True)
class RunDir:
    """The directory of a run."""

    folder: Path

    config = Child("config.yaml")
    overrides = Child("overrides.yaml")
    plan = Child("plan.json")
    deepspeed = Child("deepspeed.json")  # only with DeepSpeed
    environment = Child("environment.json")
    draws = Child("draws.json")
    importance = Child("importance.json")  # only with selection=importance: what the draws were made by
    metrics = Child("metrics.jsonl")
    model = Child("model")
    results = Child("results.json")
    tracking = Child("tracking.json")  # what has been sent to the tracker
    done = Child("DONE")  # written last
    lock = Child(".lock")  # locked by the process that works on the run
    nodes = Child(".nodes")  # the secret of a run on several nodes, as long as node 0 works on it; mode 600

    def round(self, number: int, name: str) -> RoundDir:
        """The directory of the phase `number`, counted from 1."""
        return RoundDir(self.folder / "rounds" / f"{number:02d}-{name}")


def finished(path: str | Path) -> RunDir:
    """The run in the folder `path`.

    Raises:
        UserError: if there is no run, or it is not finished (no DONE).
    """
    run = RunDir(Path(path))
    if not run.folder.is_dir():
        raise UserError(f"There is no run directory {path}.")
    if not run.config.exists():
        raise UserError(f"{path} is not the directory of a run: it has no config.yaml.")
    if not run.done.exists():
        raise UserError(f"The run in {path} is not finished. Continue it with: hft train … output_dir={path}")
    return run
