"""SFT, supervised fine-tuning on chats, by TRL's SFTTrainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trl

from hft_cli.config.schema import RunConfig
from hft_cli.data.phase_rows import PhaseRows, phase_rows
from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob
from hft_cli.training.anchors import KlAnchor
from hft_cli.training.compat import LossOnlyTrainer
from hft_cli.training.session import Session, TrainerParts
from hft_cli.training.validation import Objective
from hft_cli.training.weights import copy_of_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_rows(job: PhaseJob, tokenizer: PreTrainedTokenizerBase) -> tuple[PhaseRows, dict[str, Any]]:
    """The rows of an SFT phase, and counts for the outcome.

    Raises:
        UserError: for a bad row, or if no row is left.
    """
    rows = phase_rows("sft", job.phase.sources, job.config, tokenizer, job.phase.validation)
    return rows, {**rows.counts(), "rows_prompt_cut": rows.summary.cut}


def _loss(log_probs: Sequence[float], start: Sequence[float], tokens: int, config: RunConfig) -> float:
    return -math.fsum(log_probs) / tokens


# The mean negative log-likelihood of the trained tokens, in nats.
OBJECTIVE = Objective(lambda row: [(row["input_ids"], row["labels"])], _loss)


def settings(config: RunConfig) -> tuple[type, dict[str, Any]]:
    """The class of the trainer's arguments, and what SFT sets in them."""
    train = config.train
    return trl.SFTConfig, {
        "packing": train.packing,
        "padding_free": train.padding_free,
        # Rows are tokenized and cut already: only packing has work to do, and needs a length.
        "max_length": train.max_length if train.packing else None,
        "dataset_kwargs": None if train.packing else {"skip_prepare_dataset": True},
        "router_aux_loss_coef": config.train.router_aux_loss,  # None: the model's own
    }


def _check_router(model: Any, weight: float | None) -> None:
    """Raise UserError for a mixture of experts whose load-balancing loss TRL cannot compute."""
    weight = getattr(model, "router_aux_loss_coef", 0.0) if weight is None else weight
    if weight and not hasattr(model, "num_experts"):
        raise UserError(
            f"The load-balancing loss of a {model.model_type} model cannot be computed: its config.json has no "
            "num_experts. Set train.router_aux_loss=0."
        )


def build_trainer(parts: TrainerParts, session: Session) -> Any:
    """TRL's SFTTrainer for a phase."""
    train = session.job.config.train
    _check_router(parts.model.config, train.router_aux_loss)
    start = copy_of_start(parts.model) if session.job.config.anchor.name == "kl" else None
    trainer = LossOnlyTrainer(
        model=parts.model,
        args=parts.arguments,
        train_dataset=parts.dataset,
        processing_class=parts.tokenizer,
        callbacks=list(parts.callbacks),
        batch_tokens=train.micro_batch_size * (train.max_length or 0),
    )
    if start is not None:
        trainer.hold(KlAnchor(start.to(parts.arguments.device), session.job.config.anchor.weight))
    return trainer
