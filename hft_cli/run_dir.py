"""The files of a run's directory: names, what is sealed for the workers, and writing whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hft_cli.errors import UserError


@dataclass(frozen=True)
class RoundDir:
    """One round: rounds/NN-NAME. `folder.name` counts from 01."""

    folder: Path

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
