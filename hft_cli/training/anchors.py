"""Anchors: what holds a model near where a round starts. Two work on the optimizer, one on the loss.

L2-SP             Li et al. 2018, arXiv 1802.01483. Here decoupled, as AdamW's weight decay: before each step
                  w <- w - learning rate x weight x (w - start).
KL                Li and Hoiem 2016 (learning without forgetting, arXiv 1606.09282), on the training rows: the loss
                  gets weight x KL(start || current), in nats per trained token, over the whole vocabulary.
Momentum filter   MoFO, Chen et al. 2024, arXiv 2407.20999: of each tensor, a step changes only the share of the
                  elements whose first moments are the largest. The others keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob
from hft_cli.training.compat import torch_optimizer
from hft_cli.training.resume import Checkpoint, Identity
from hft_cli.training.session import Session, SessionCallback

START = "hft_start"  # key in the optimizer's state of a tensor: its value at the start, also in checkpoints


def optimizer_callbacks(session: Session) -> list[SessionCallback]:
    """The callbacks of what works on the optimizer. They follow `RestoreMasters`, which gives the start its values."""
    config = session.job.config
    callbacks: list[SessionCallback] = []
    if config.anchor.name == "l2_sp":
        callbacks.append(OnOptimizer(session, lambda optimizer: pull_to_start(optimizer, config.anchor.weight)))
    if (share := config.train.momentum_filter) is not None:
        callbacks.append(OnOptimizer(session, lambda optimizer: filter_by_momentum(optimizer, share)))
    return callbacks


class OnOptimizer(SessionCallback):
    """Call a function with torch's optimizer before the first step of a session."""

    def __init__(self, session: Session, function: Callable[[torch.optim.Optimizer], None]) -> None:
        super().__init__(session)
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.function(torch_optimizer(self.trainer.optimizer))


def pull_to_start(optimizer: torch.optim.Optimizer, weight: float) -> None:
    """Pull weights to where they were before the first step (L2-SP), whole tensors or the shards of a rank.

    Their start is kept in the optimizer's state, 4 bytes an element, so that a checkpoint has it.
    """
    starts: dict[torch.Tensor, torch.Tensor] = {}  # until the optimizer has made its own state of a tensor

    def before(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    start = optimizer.state[tensor].get(START, starts.get(tensor))
                    if start is None:
                        starts[tensor] = tensor.detach().clone()
                    else:
                        tensor.lerp_(start, group["lr"] * weight)

    def after(optimizer: Any, *_: Any) -> None:
        for tensor in [tensor for tensor in starts if optimizer.state[tensor]]:
            optimizer.state[tensor][START] = starts.pop(tensor)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def filter_by_momentum(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Take a step back where the first moment is not among the largest `share` of its tensor (MoFO)."""
    values: dict[torch.Tensor, torch.Tensor] = {}

    def before(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            values.update({tensor: tensor.detach().clone() for tensor in group["params"] if tensor.grad is not None})

    def after(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for tensor, value in values.items():
                sizes = optimizer.state[tensor]["exp_avg"].abs().flatten()
                kept = max(1, round(share * sizes.numel()))
                chosen = torch.zeros_like(sizes, dtype=torch.bool)
                chosen[sizes.topk(kept).indices] = True
                tensor.copy_(torch.where(chosen.view_as(tensor), tensor, value))
        values.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def require_same_layout(job: PhaseJob, checkpoint: Checkpoint, identity: Identity) -> None:
    """Raise UserError if the start would be lost, because DeepSpeed converts a checkpoint without it."""
    if job.config.anchor.name == "l2_sp":
        marker = checkpoint.marker
        raise UserError(
            f"anchor=l2_sp: this round has a checkpoint of {marker['ranks']} ranks on ZeRO-{marker['zero_stage']}, and "
            f"continues on these only, not on {identity.ranks} on ZeRO-{identity.zero_stage}. Use them until the round "
            "ends; the next one may use others."
        )


@dataclass(frozen=True)
class KlAnchor:
    """The KL divergence of the predictions from those of the model at the start.

    Attributes:
        start: the model at the start; frozen parameters are those of the model that is trained.
        weight: of the divergence in the loss.
    """

    start: Any
    weight: float

    def divergence(self, inputs: dict[str, Any], logits: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """The sum of KL(start || current) over the trained positions, in nats; a scalar with a gradient.

        Args:
            inputs: of the model, without labels.
            logits: of the current model, (rows, tokens, vocabulary).
            trained: where the next token has a loss, (rows, tokens).
        """
        with torch.no_grad():
            before = self.start(**inputs).logits[trained].float().log_softmax(dim=-1)
        current = logits[trained].float().log_softmax(dim=-1)
        return torch.nn.functional.kl_div(current, before, reduction="sum", log_target=True)
