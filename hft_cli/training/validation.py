"""The loss on rows that are not trained on, while a phase trains: when it is measured, and what follows from it.

It is not the trainer's evaluation, whose mean depends on the batch size and on the number of ranks, whose early
stopping forgets its count when a run is resumed, and whose best weights are a whole checkpoint. Here each row's
log-probability is computed once, whichever rank does it. What is kept is a list of losses by step, which checkpoints
hold.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.files import write_json
from hft_cli.launch.jobs import Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training.batches import TokensAndLabels, padded
from hft_cli.training.compat import trained_log_probs
from hft_cli.training.session import Session, SessionCallback, diverged

PARTS = 10  # validations of a phase, unless train.validate_every says otherwise


@dataclass(frozen=True)
class Objective:
    """How the validation loss of a stage is made.

    Attributes:
        sequences: (row of the data set) -> its sequences of tokens, each with its labels.
        loss: (log-probabilities of all sequences, the same before the first step, number of trained tokens, config) ->
            the loss. A log-probability is the sum over the trained tokens of a sequence.
    """

    sequences: Callable[[dict[str, Any]], Iterable[tuple[Sequence[int], Sequence[int]]]]
    loss: Callable[[Sequence[float], Sequence[float], int, RunConfig], float]


class Validation(SessionCallback):
    """Measure the validation loss before the first step, every train.validate_every steps, and after the last one.

    With `train.early_stopping` the phase ends when that many validations were no better than the best one. Then, or
    with `train.keep_best`, the best weights are kept in a folder of their own.

    Args:
        objective: of the phase's stage.
        dataset: the validation rows.
        write_delta: (model, session): write what was trained; collective.
    """

    def __init__(
        self,
        session: Session,
        objective: Objective,
        dataset: Any,
        write_delta: Callable[[Any, Session], None],
        progress: Progress,
    ) -> None:
        super().__init__(session)
        self.objective, self.write_delta, self.progress = objective, write_delta, progress
        self.sequences = [
            (torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32))
            for row in dataset
            for ids, labels in objective.sequences(row)
        ]
        self.tokens = sum(int((labels[1:] != -100).sum()) for _, labels in self.sequences)
        self.start: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        train, file = self.session.job.config.train, start_file(self.session.folder)
        self.every = train.validate_every or math.ceil(state.max_steps / PARTS)
        if state.global_step == 0:
            self.start = self._log_probs()
            if self.session.ranks.first:
                shutil.rmtree(self.session.folder.best, ignore_errors=True)
                write_json(file, self.start)
            self._add(0, self.start)
        else:
            self.start = json.loads(file.read_text(encoding="utf-8"))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        began = time.perf_counter()
        self._add(step, self._log_probs())
        control.should_log = True  # with this loss
        patience = self.session.job.config.train.early_stopping
        if patience is not None and self.state.since_best() >= patience:
            control.should_training_stop = True
        self.state.paused += time.perf_counter() - began

    def _log_probs(self) -> list[float]:
        self.progress.activity("validating")
        size = self.session.job.config.train.micro_batch_size
        return sequence_log_probs(self.trainer, self.sequences, size, self.session.ranks)

    def _add(self, step: int, log_probs: Sequence[float]) -> None:
        config = self.session.job.config
        loss = self.objective.loss(log_probs, self.start, self.tokens, config)
        if not math.isfinite(loss):
            raise diverged(f"The validation loss is {loss} at step {step}", config)
        self.state.validations.append((step, loss))
        self.progress.validated(loss)
        if keeps_best(config) and self.state.best_step() == step:
            self._keep(step)

    def _keep(self, step: int) -> None:
        """Write the weights of `step`, and remove those of earlier steps that the newest checkpoint does not need."""
        session = self.session
        kept = replace(session, folder=best_folder(session.folder, step))
        if session.ranks.first:
            kept.folder.folder.mkdir(parents=True, exist_ok=True)
        self.write_delta(self.trainer.model, kept)
        if session.ranks.first:
            for folder in session.folder.best.iterdir():
                if folder.name not in (str(step), str(self.state.marked_best)):
                    shutil.rmtree(folder)


def keeps_best(config: RunConfig) -> bool:
    """Whether a phase ends with the weights of its lowest validation loss."""
    train = config.train
    return train.early_stopping is not None if train.keep_best is None else train.keep_best


def best_folder(folder: RoundDir, step: int) -> RoundDir:
    """Where the weights after `step` are kept, as a phase leaves its own."""
    return RoundDir(folder.best / str(step))


def start_file(folder: RoundDir) -> Path:
    """The log-probabilities of the validation rows before the first step."""
    return folder.tokens / "validation_start.json"


def use_best(session: Session) -> None:
    """Make the best weights those of the phase, and keep them until the phase is finished. Called by the first rank.

    Raises:
        UserError: if somebody has removed them.
    """
    best = best_folder(session.folder, session.state.best_step())
    if not best.delta.exists():
        raise UserError(
            f"{best.delta}, the weights of the lowest validation loss, is missing. Delete {session.folder.checkpoints} "
            "and run the same command again: the round starts anew."
        )
    shutil.rmtree(session.folder.adapter, ignore_errors=True)
    if best.adapter.exists():
        shutil.copytree(best.adapter, session.folder.adapter)
    session.folder.delta.unlink(missing_ok=True)
    try:
        os.link(best.delta, session.folder.delta)
    except OSError:  # a file system without links
        shutil.copy(best.delta, session.folder.delta)


def validation_outcome(session: Session, steps: int) -> dict[str, Any]:
    """What the outcome of a phase of `steps` steps says of its validation."""
    validations = session.state.validations
    if not validations:
        return {}
    best = session.state.best_step()
    return {
        "validation": {
            "losses": [list(each) for each in validations],
            "best_step": best,
            "best_loss": dict(validations)[best],
            "model_of_step": best if keeps_best(session.job.config) else steps,
            "seconds": round(session.state.paused, 3),
        }
    }


def sequence_log_probs(trainer: Any, sequences: Sequence[TokensAndLabels], size: int, ranks: Ranks) -> list[float]:
    """The log-probability of each sequence's labels given the tokens before them, in nats. Collective over the ranks.

    Args:
        trainer: TRL's, in training or before it; the mode of its model (dropout) is restored.
        sequences: int32 tensors of ids and labels, -100 where there is no loss.
        size: sequences that a rank computes at once.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    model, found = trainer.model, []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(batches), ranks.count):
            own = first + ranks.rank
            # Under ZeRO-3 all ranks compute together, so one without a batch of its own repeats the first.
            batch = batches[own] if own < len(batches) else batches[0]
            values = trained_log_probs(trainer, padded([sequences[index] for index in batch])).double().sum(dim=1)
            if own < len(batches):
                found += list(zip(batch, values.tolist(), strict=True))
    model.train(was_training)
    values_by_index = dict(pair for part in ranks.gather(found) for pair in part)
    return [values_by_index[index] for index in range(len(sequences))]
