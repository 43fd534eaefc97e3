"""What happens at each optimizer step of a phase, beside the step itself: callbacks of one job each."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from hft_cli.files import write_text
from hft_cli.launch.jobs import Progress
from hft_cli.launch.ranks import Flag
from hft_cli.live.checksum import frozen_checksum
from hft_cli.live.compat import unwrapped
from hft_cli.training import universal
from hft_cli.training.anchors import optimizer_callbacks
from hft_cli.training.compat import KL, count_tokens
from hft_cli.training.procedures import Procedure
from hft_cli.training.proof import prove_loaded, prove_loss
from hft_cli.training.resume import complete, remove_older, stop_requested
from hft_cli.training.session import Losses, Session, SessionCallback, diverged
from hft_cli.training.validation import Objective, Validation


def phase_callbacks(
    session: Session, procedure: Procedure, progress: Progress, dataset: Dataset, validation: Validation | None = None
) -> list[TrainerCallback]:
    """The callbacks of a phase. The trainer calls them in this order, after its own.

    - `RestoreMasters` is first: the others must see the weights that the phase starts from, anchors as well.
    - `Meter` is before the other ones because they report its values, and because its clock must stop before
      `FrozenProof` reads all weights at the end. It starts at the first epoch, after every `on_train_begin`.
    - `FrozenProof` is before `LossProof`, which needs the right weights.
    - `Validation` is before `Metrics` and `ProgressReport`, which report its loss, and before `Stop`, because a phase
      that ends by early stopping needs no checkpoint.
    - `Stop` is before `Checkpoints`, which makes the trainer log before each checkpoint, whoever asked for it.
    """
    return [
        RestoreMasters(session, procedure.restore_masters),
        *optimizer_callbacks(session),
        Meter(session),
        FrozenProof(session),
        LossProof(session, procedure.objective, dataset),
        EngineHistory(session),
        *([validation] if validation else []),
        Metrics(session, (*procedure.metrics, KL)),
        ProgressReport(session, progress),
        Stop(session),
        Checkpoints(session),
    ]


class RestoreMasters(SessionCallback):
    """At the phase's start, give DeepSpeed's float32 master weights the values that bfloat16 has rounded."""

    def __init__(self, session: Session, restore: Callable[[Any, Session], None]) -> None:
        super().__init__(session)
        self.restore = restore

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        config = self.session.job.config
        if state.global_step == 0 and config.engine.zero_stage and config.model.dtype == "bfloat16":
            self.restore(unwrapped(model), self.session)


class Meter(SessionCallback):
    """Measure steps, tokens, time and memory. Tokens are added up over the ranks when something is logged."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state.first_step, self.tokens = state.global_step, count_tokens(self.trainer)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state.start = self.state.start or time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state.tokens = self.tokens()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.state.end = time.perf_counter()
        self.state.tokens = self.tokens()


def peak_memory() -> int:
    """The most bytes that this process had allocated on its GPU, or that were resident if it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class FrozenProof(SessionCallback):
    """Prove that the frozen weights in memory are those of the model's files and do not change during training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **parts: Any) -> None:
        session, checkpoint = self.session, self.session.checkpoint
        self.state.frozen = session.ranks.gather(frozen_checksum(model))
        # Of a converted checkpoint other ranks hold other parts, so that checksums say nothing.
        known = checkpoint.marker.get("frozen_sums") if checkpoint else None  # earlier versions had other checksums
        if checkpoint and known and not checkpoint.converted and self.state.frozen != known:
            raise RuntimeError("The checkpoint restored other frozen weights than the model's files hold.")
        prove_loaded(unwrapped(model), session, resumed=checkpoint is not None)
        if checkpoint and checkpoint.converted:
            step, ranks = state.global_step, session.ranks
            universal.prove_updated(unwrapped(model), parts["optimizer"], checkpoint.folder, step, ranks)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.session.ranks.gather(frozen_checksum(model)) != self.state.frozen:
            raise RuntimeError("A frozen weight changed in memory during training: this is a fault of the engine.")


class LossProof(SessionCallback):
    """Prove, before the first step, that TRL's loss is the model's own."""

    def __init__(self, session: Session, objective: Objective, dataset: Dataset) -> None:
        super().__init__(session)
        self.objective, self.dataset = objective, dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ids, labels = next(iter(self.objective.sequences(self.dataset[0])))
        row = (torch.tensor(ids), torch.tensor(labels))
        prove_loss(self.trainer, row, self.session.job.config.model.dtype)


class EngineHistory(SessionCallback):
    """Record on which engine the phase is trained from which step on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine, identity = self.session.job.config.engine, self.session.identity
        current = {
            "name": engine.name,
            "zero_stage": identity.zero_stage,
            "ranks": identity.ranks,
            "micro_batch_size": args.per_device_train_batch_size,
            **({"deepspeed": engine.deepspeed} if engine.deepspeed else {}),
        }
        engines = self.state.engines
        if not engines or {**engines[-1], "from_step": 0} != {**current, "from_step": 0}:
            engines.append({"from_step": state.global_step, **current})


class Metrics(SessionCallback):
    """Write a line of metrics.jsonl for each log, sum the losses, and stop a run whose loss is not finite."""

    def __init__(self, session: Session, names: Sequence[str]) -> None:
        super().__init__(session)
        self.names, self.file = names, Path(session.job.metrics)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.logged_step = state.global_step
        if self.session.ranks.first and self.file.exists():
            drop_lines_after(self.file, self.session.job.phase.name, state.global_step)
        if state.global_step == 0 and self.state.validations:
            self._write({"step": 0, "validation_loss": self.state.validations[0][1]})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        loss, steps = logs["loss"], state.global_step - self.logged_step
        if not math.isfinite(loss):
            raise diverged(f"The loss is {loss} at step {state.global_step}", self.session.job.config)
        sums = self.state.losses
        self.state.losses = Losses(sums.total + loss * steps, sums.steps + steps)
        self.logged_step = state.global_step
        self.state.metrics = {name: logs[name] for name in self.names if name in logs}
        step, validated = self.state.validations[-1] if self.state.validations else (None, None)
        self._write(
            {
                "step": state.global_step,
                "seconds": round(self.state.seconds(), 4),
                "tokens_per_second": self.state.tokens_per_second(),
                **({"validation_loss": validated} if step == state.global_step else {}),
                **{name: logs[name] for name in ("loss", "learning_rate", "grad_norm", "epoch") if name in logs},
                **self.state.metrics,
            }
        )

    def _write(self, values: dict[str, Any]) -> None:
        phase = self.session.job.phase
        if self.session.ranks.first:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": phase.round, "name": phase.name, **values}) + "\n")


def drop_lines_after(file: Path, phase: str, last_step: int) -> None:
    """Drop the lines of metrics.jsonl that a stopped session of the phase wrote after `last_step`."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the stopped session was killed while it wrote this line
            continue
        if line["name"] != phase or 0 < last_step >= line["step"]:
            lines.append(text + "\n")
    write_text(file, "".join(lines))


class ProgressReport(SessionCallback):
    """Report each step to the parent process, with the loss and the tokens per second that were logged last."""

    def __init__(self, session: Session, progress: Progress) -> None:
        super().__init__(session)
        self.progress = progress
        self.loss: float | None = None
        self.rate: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.activity(f"step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.count(state.global_step, state.max_steps, self.loss, self.rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.loss, self.rate = logs.get("loss", self.loss), self.state.tokens_per_second()


class Stop(SessionCallback):
    """End the session with a checkpoint after the step at which a stop was requested; several ranks one step later."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.requested = Flag(session.ranks)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps or control.should_training_stop:
            return  # the phase's end is better than a checkpoint
        if self.requested(stop_requested(self.session.folder, self.session.ranks)):
            self.state.stopped = True
            control.should_save = control.should_training_stop = True


class Checkpoints(SessionCallback):
    """Ask for checkpoints every train.save_minutes, mark each as complete, and then remove older ones."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.due, self.asked = Flag(session.ranks), False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_save = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_end = time.perf_counter()
        if state.global_step == state.max_steps or (control.should_training_stop and not self.state.stopped):
            control.should_save = False  # the trainer would write one, and resuming from it train one step too many
            return
        minutes = self.session.job.config.train.save_minutes
        if minutes is not None:
            now = self.session.ranks.first and not self.asked and self.step_end - self.last_save >= 60 * minutes
            self.asked = self.asked or now
            if self.due(now):  # the ranks learn of it one step later
                control.should_save, self.asked = True, False
        # Losses that were not logged would be missing in a resumed phase.
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session = self.session
        session.ranks.barrier()  # every rank has written its part
        if session.ranks.first:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            size = complete(folder, self.state.marker(session.identity))
            remove_older(folder.parent, session.job.config.train.save_limit)
            seconds = time.perf_counter() - self.step_end
            self.state.checkpoint = {"checkpoint_seconds": round(seconds, 3), "checkpoint_bytes": size}
        self.state.marked_best = self.state.best_step() if self.state.validations else None
        self.last_save = time.perf_counter()
