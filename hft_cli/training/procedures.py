"""How phases are trained: a table with a row for SFT, DPO, GEM and LoRA. To add one, write its functions and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.data.phase_rows import PhaseRows
from hft_cli.launch.jobs import PhaseJob
from hft_cli.training import dpo, gem, lora, sft, weights
from hft_cli.training.session import Session, SessionState, TrainerParts
from hft_cli.training.validation import Objective


@dataclass(frozen=True)
class Procedure:
    """What differs between the ways to train a phase. `train_phase` calls the functions in this order.

    Attributes:
        settings: (config) -> the class of the trainer's arguments, and those that the procedure sets.
        rows: (job, tokenizer) -> the rows with the data set that the trainer takes, and counts for the outcome. Only
            the first rank calls it.
        prepare_model: (model, job) -> the model with the parameters to train, and only those, requiring a gradient.
        build_trainer: (parts, session) -> the trainer.
        restore_masters: (model, session): give DeepSpeed's float32 master weights the values that they have in files.
            It is called at the phase's start where the model is in bfloat16.
        write_delta: (model, session): write what was trained. Collective over the ranks.
        outcome: (state) -> further entries of the outcome.
        objective: of the validation loss.
        metrics: names of TRL's logs that metrics.jsonl and the outcome keep, besides the common ones.
    """

    settings: Callable[[RunConfig], tuple[type, dict[str, Any]]]
    rows: Callable[[PhaseJob, Any], tuple[PhaseRows, dict[str, Any]]]
    prepare_model: Callable[[Any, PhaseJob], Any]
    build_trainer: Callable[[TrainerParts, Session], Any]
    restore_masters: Callable[[Any, Session], None]
    write_delta: Callable[[Any, Session], None]
    objective: Objective
    outcome: Callable[[SessionState], dict[str, Any]] = lambda state: {}
    metrics: tuple[str, ...] = ()


def procedure_of(job: PhaseJob) -> Procedure:
    """The procedure of the run's method or strategy of continual learning, if it has one, or of the phase's stage."""
    names = (job.config.method.name, job.config.continual.name, job.phase.stage)
    return PROCEDURES[next(name for name in names if name in PROCEDURES)]


def freeze_undrawn(model: Any, job: PhaseJob) -> Any:
    """The model with exactly the parameters of the draw requiring a gradient."""
    return weights.freeze(model, job.updated, job.frozen)


SFT = Procedure(
    settings=sft.settings,
    rows=sft.chat_rows,
    prepare_model=freeze_undrawn,
    build_trainer=sft.build_trainer,
    restore_masters=weights.restore_masters,
    write_delta=weights.write_updated,
    objective=sft.OBJECTIVE,
)

PROCEDURES = {
    "sft": SFT,
    "dpo": replace(
        SFT,
        settings=dpo.settings,
        rows=dpo.pair_rows,
        build_trainer=dpo.build_trainer,
        objective=dpo.OBJECTIVE,
        metrics=dpo.METRICS,
    ),
    "gem": replace(SFT, build_trainer=gem.build_trainer, outcome=gem.outcome),
    "lora": replace(
        SFT,
        prepare_model=lora.adapt,
        restore_masters=lora.restore_masters,
        write_delta=lora.write_merged,
    ),
}
