"""The files of a run's directory: names, what is sealed for the workers, and writing whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.methods import Source, Step
from hft_cli.schema import GenerationConfig, ModelConfig, RunConfig, UserError, from_dict


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may write the same cache at once
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        UserError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is {path.parent} the directory of a run?") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None


def read_config(run: RunDir) -> RunConfig:
    """The sealed configuration of a run.

    Raises:
        UserError: if it is missing or not one of ours.
    """
    import yaml

    try:
        values = yaml.safe_load(run.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run.config} cannot be read: {error}".splitlines()[0]) from None
    if not isinstance(values, dict):
        raise UserError(f"{run.config} is not the configuration of a run.")
    config: RunConfig = from_dict(RunConfig, values)
    return config


@dataclass(frozen=True)
class RoundDir:
    """One round: rounds/NN-NAME. `folder.name` counts from 01."""

    folder: Path

    @property
    def step(self) -> Path:
        """The sealed step that the worker reads."""
        return self.folder / "step.json"

    @property
    def delta(self) -> Path:
        """Only what the round trained, under the names and dtypes of the base's files."""
        return self.folder / "delta.safetensors"

    @property
    def outcome(self) -> Path:
        """What the worker says of the round, written after the delta: a round without it is not finished."""
        return self.folder / "outcome.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tokens(self) -> Path:
        """The tokenized training set, made once and read by all ranks."""
        return self.folder / "tokens"

    @property
    def progress(self) -> Path:
        return self.folder / "progress.json"

    @property
    def template(self) -> Path:
        """The chat template of the round's training, as text."""
        return self.folder / "chat_template.jinja"

    @property
    def adapter(self) -> Path:
        """LoRA: the adapters after the round, in PEFT's layout."""
        return self.folder / "adapter"

    def score(self, suite: str, task: str) -> Path:
        """Of an evaluation: a task's scores; beside them, as .jsonl, what is known of each row."""
        return self.folder / suite / f"{task.replace('/', '_')}.json"

    @property
    def log(self) -> Path:
        """All that the ranks print."""
        return self.folder / "worker.log"

    @property
    def stop(self) -> Path:
        """Its being there asks a training worker to keep a checkpoint of the step that it is at, and end."""
        return self.folder / "stop"

    @property
    def mistake(self) -> Path:
        """A user's mistake that only the worker could see, for the parent to report."""
        return self.folder / "mistake.txt"

    @property
    def model(self) -> Path:
        """The model after the round, while a later round needs it."""
        return self.folder / "model"


@dataclass(frozen=True)
class RunDir:
    """The directory of a run, as DESIGN's contract has it."""

    folder: Path

    def round(self, number: int, name: str) -> RoundDir:
        """The directory of round `number` (from 1)."""
        return RoundDir(self.folder / "rounds" / f"{number:02d}-{name}")

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def overrides(self) -> Path:
        return self.folder / "overrides.yaml"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's settings; not there without it."""
        return self.folder / "deepspeed.json"

    @property
    def environment(self) -> Path:
        return self.folder / "environment.json"

    @property
    def draws(self) -> Path:
        return self.folder / "draws.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    @property
    def done(self) -> Path:
        return self.folder / "DONE"

    @property
    def tracking(self) -> Path:
        """What of the run its trackers were sent."""
        return self.folder / "tracking.json"

    @property
    def nodes(self) -> Path:
        """A number that node 0 writes while it waits for the others, to see that they read the same folder."""
        return self.folder / ".nodes"

    @property
    def lock(self) -> Path:
        """Held by whoever works on the run."""
        return self.folder / ".lock"


@dataclass(frozen=True)
class SealedStep:
    """All that a training worker is told. `model` is the folder of the round's start, `metrics` the run's log.

    `adapter` is the folder of the LoRA adapters to go on from, `base_sha256` the hash of the weights that the run began
    with, `deepspeed` its settings, empty without it.
    """

    config: RunConfig
    step: Step
    model: str
    metrics: str
    updated: tuple[str, ...]
    frozen: tuple[str, ...]
    adapter: str | None = None
    base_sha256: str = ""
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> SealedStep:
        values = read_json(path)
        config, step = from_dict(RunConfig, values.pop("config")), values.pop("step")
        for key in ("sources", "memories"):
            step[key] = tuple(Source(**source) for source in step[key])
        updated, frozen = (tuple(values.pop(key)) for key in ("updated", "frozen"))
        return cls(config=config, step=Step(**step), updated=updated, frozen=frozen, **values)


@dataclass(frozen=True)
class Task:
    """A set of rows that a model is scored on, and how."""

    path: str
    metric: str = "exact_match"
    format: str = "auto"


@dataclass(frozen=True)
class Job:
    """What an evaluation worker is told. `tasks`: suite -> task -> its rows and metric.

    `reset` names parameters that, in memory only, are put back to the model at `base`: a Half-Reset without its files.
    """

    model: ModelConfig
    path: str
    tasks: dict[str, dict[str, Task]]
    batch_size: int
    generation: GenerationConfig
    seed: int
    base: str | None = None
    reset: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        values = read_json(path)
        model = from_dict(ModelConfig, values.pop("model"))
        generation = from_dict(GenerationConfig, values.pop("generation"))
        tasks = {
            suite: {name: Task(**task) for name, task in own.items()} for suite, own in values.pop("tasks").items()
        }
        return cls(model=model, generation=generation, tasks=tasks, **values)


def finished(path: str | Path) -> RunDir:
    """The run at `path`.

    Raises:
        UserError: if there is none, or it is not finished (no DONE).
    """
    run = RunDir(Path(path))
    if not run.folder.is_dir():
        raise UserError(f"There is no run directory {path}.")
    if not run.config.exists():
        raise UserError(f"{path} is not the directory of a run: it has no config.yaml.")
    if not run.done.exists():
        raise UserError(f"The run in {path} is not finished. Continue it with: hft train … output_dir={path}")
    return run
