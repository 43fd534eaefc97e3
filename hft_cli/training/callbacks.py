"""What happens in each step of training."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.naming import Param
from hft_cli.errors import UserError
from hft_cli.files import write_json, write_text
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training import dpo, gem, lora, resume
from hft_cli.training.resume import MARKER
from hft_cli.training.weights import frozen_checksum, restore_masters

SIGNALS: list[int] = []  # that came and asked us to stop


def watching(
    sealed: PhaseJob,
    folder: RoundDir,
    params: Mapping[str, Param],
    identity: Mapping[str, Any],
    ranks: Ranks,
    before: Mapping[str, Any],
    progress: Progress,
) -> Any:
    """The callback that logs, reports progress, marks checkpoints and watches that frozen weights stay as they are.

    `before` is the marker of the checkpoint that is resumed from, or empty.
    """
    import torch
    from transformers import TrainerCallback

    metrics, minutes = Path(sealed.metrics), sealed.config.train.save_minutes

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.start = self.end = 0.0
            self.first = 0  # the step that this session went on from
            self.tokens = self.tokens_at_start = 0
            self.loss: float | None = None
            self.last: dict[str, float] = {}  # what DPO logged last
            self.checksums: list[int] = []
            self.engines: list[dict[str, Any]] = list(before.get("engines", []))  # that the round was trained on
            self.projections: gem.Steps | None = None
            self.converted: Path | None = None  # the checkpoint that is resumed from, if it was laid out otherwise
            self.stopped = False
            self.saved = self.step_end = 0.0  # when
            self.checkpoint: dict[str, float] = {}  # what the last one cost
            self.losses, self.logged = list(before.get("losses", (0.0, 0))), 0  # their sum and number, up to a log

        def seconds(self) -> float:
            """Training time in all, over resumed sessions."""
            return float(before.get("seconds", 0.0)) + (self.end or time.perf_counter()) - self.start

        def mean_loss(self, own: float, last: int) -> float:
            """Over the round's steps, from this session's mean and what the checkpoint had up to its last log."""
            total, steps = map(float, before.get("losses", (0.0, 0)))
            return round((total + own * (last - self.first)) / max(steps + last - self.first, 1), 6)

        def tokens_per_second(self) -> float:
            """Of this session."""
            return (self.tokens - self.tokens_at_start) / max((self.end or time.perf_counter()) - self.start, 1e-9)

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            model = parts["model"]
            if state.global_step == 0 and sealed.config.engine.zero_stage and sealed.config.model.dtype == "bfloat16":
                plain = getattr(model, "module", model)
                if sealed.adapter is not None:
                    lora.restore_masters(plain, sealed.adapter)
                elif sealed.config.continual.name != "lora":
                    restore_masters(plain, params, Path(sealed.model))
            self.checksums = ranks.gather(frozen_checksum(model))
            if self.converted is not None:
                plain = getattr(model, "module", model)
                resume.mend_and_prove(plain, parts["optimizer"], self.converted, state.global_step, ranks.rank)
                resume.prove_frozen(plain, params, Path(sealed.model))
            elif self.checksums != before.get("frozen", self.checksums):
                raise RuntimeError(
                    "The frozen weights that the checkpoint restored are not those of the model's files."
                )
            self.tokens = self.tokens_at_start = state.num_input_tokens_seen
            now = {"name": sealed.config.engine.name, "zero_stage": identity["zero_stage"], "ranks": ranks.count}
            now |= {"micro_batch_size": args.per_device_train_batch_size}
            now |= {"deepspeed": sealed.config.engine.deepspeed} if sealed.config.engine.deepspeed else {}
            if not self.engines or self.engines[-1] | {"from_step": 0} != now | {"from_step": 0}:
                self.engines.append({"from_step": state.global_step, **now})
            if ranks.first:
                _forget_after(metrics, sealed.phase.name, state.global_step)
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            self.logged = self.first = state.global_step
            self.start = self.saved = time.perf_counter()
            progress.activity(f"step {state.global_step + 1}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.tokens = state.num_input_tokens_seen
            progress.count(state.global_step, state.max_steps, self.loss, self.tokens_per_second())
            self.step_end = time.perf_counter()
            if state.global_step == state.max_steps:  # the round's end is better than a checkpoint
                return
            wanted = stop_asked(folder, ranks) * STOP
            if ranks.first and minutes is not None and self.step_end - self.saved >= 60 * minutes:
                wanted = max(wanted, SAVE)
            wanted = ranks.maximum(wanted)
            control.should_save = control.should_save or wanted >= SAVE
            control.should_log = control.should_log or control.should_save  # or a resumed round would lack these losses
            self.stopped = wanted == STOP
            control.should_training_stop = control.should_training_stop or self.stopped

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs and not math.isfinite(logs["loss"]):
                raise UserError(
                    f"The loss is {logs['loss']} at step {state.global_step}: training has diverged. "
                    f"Lower train.learning_rate={sealed.config.train.learning_rate:g}, or raise train.warmup."
                )
            if "loss" in logs:
                steps = state.global_step - self.logged
                self.losses = [self.losses[0] + logs["loss"] * steps, self.losses[1] + steps]
                self.logged = state.global_step
            if ranks.first and "loss" in logs:
                self.loss = logs["loss"]
                self.last = {key: logs[key] for key in dpo.METRICS if key in logs}
                line = {
                    "round": sealed.phase.round,
                    "name": sealed.phase.name,
                    "step": state.global_step,
                    "tokens_per_second": self.tokens_per_second(),
                }
                keys = ("loss", "learning_rate", "grad_norm", "epoch", *dpo.METRICS)
                line |= {key: logs[key] for key in keys if key in logs}
                with metrics.open("a") as file:
                    file.write(json.dumps(line) + "\n")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ranks.barrier()  # every rank has written its part
            if ranks.first:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                marker = {**identity, "seconds": self.seconds(), "frozen": self.checksums, "losses": self.losses}
                marker["engines"] = self.engines
                marker |= {"projected": self.projections.projected} if self.projections else {}
                write_json(place / MARKER, marker)
                held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
                took = time.perf_counter() - self.step_end
                self.checkpoint = {"checkpoint_seconds": round(took, 3), "checkpoint_bytes": held}
            self.saved = time.perf_counter()

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.end = time.perf_counter()
            if ranks.gather(frozen_checksum(model)) != self.checksums:
                raise RuntimeError("A frozen weight changed in memory during training: this is a fault of the engine.")

    return Watch()


def peak_memory() -> int:
    """Bytes: the most that this process had allocated on its GPU, or without one the most that was resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_after(metrics: Path, name: str, last: int) -> None:
    """Drop the lines that a stopped session wrote after the checkpoint that this one resumes from."""
    if metrics.exists():
        kept = []
        for text in metrics.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut off by what stopped the session
                continue
            if line["name"] != name or line["step"] <= last:
                kept.append(text + "\n")
        write_text(metrics, "".join(kept))


SAVE, STOP = 1, 2  # what a rank may ask for after a step


def stop_asked(folder: RoundDir, ranks: Ranks) -> bool:
    """Whether this rank was asked to stop: by a signal, or the first one by its file."""
    return bool(SIGNALS) or (ranks.first and folder.stop.exists())
