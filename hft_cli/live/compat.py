"""Private or undocumented behaviour of other packages that concerns weights in memory. Tests pin it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hft_cli.errors import UserError


def unwrapped(model: Any) -> Any:
    """The model itself, without DeepSpeed's engine around it.

    UPSTREAM: transformers 5.23.0: callbacks are given either of them. An engine holds its model as `module`.
    """
    return getattr(model, "module", model)


def local_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values of a parameter that this rank holds: all, or its shard under ZeRO-3 (without padding) or FSDP2.

    UPSTREAM: deepspeed 0.19.8: a shard is in the undocumented `ds_tensor`. All ranks have shards of one size; what the
    last ones have too many is memory that nothing was written to.
    """
    sharded: Any = parameter
    if isinstance(parameter, DTensor):
        local: torch.Tensor = sharded.detach().to_local()
        return local
    if not hasattr(sharded, "ds_tensor"):
        return parameter.detach()
    shard: torch.Tensor = sharded.ds_tensor.detach()
    start = torch.distributed.get_rank(sharded.ds_process_group) * shard.numel()
    return shard.reshape(-1)[: max(0, sharded.ds_numel - start)]


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where this rank holds a shard of it.

    UPSTREAM: deepspeed 0.19.8: a partitioned parameter has no elements, and its shape in the undocumented `ds_shape`.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """A context in which a parameter has all its values. Collective over the ranks.

    UPSTREAM: deepspeed 0.19.8: a partitioned parameter is known by its undocumented `ds_id`.
    """
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([parameter])
    return context if hasattr(parameter, "ds_id") else nullcontext()


def master_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole float32 master value of a parameter, on the CPU. Collective over the ranks.

    UPSTREAM: deepspeed 0.19.8: `safe_get_full_fp32_param` fails without an engine. A parameter that has one is known by
    its undocumented `ds_id` (ZeRO-3) or `_hp_mapping` (ZeRO-1 and 2).
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = safe_get_full_fp32_param(parameter)
    return parameter.detach().cpu()


def whole_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole value of a parameter on the CPU, of an engine its float32 master value. Collective over the ranks.

    UPSTREAM: deepspeed 0.19.8: as for `master_value`.
    """
    if isinstance(parameter, DTensor):
        sharded: Any = parameter
        whole: torch.Tensor = sharded.detach().full_tensor().cpu()
        return whole
    if parameter.requires_grad:
        return master_value(parameter)
    with gathered(parameter):  # an engine has no master value of a frozen parameter
        return parameter.detach().cpu().clone()


def forget_optimizer(trainer: Any) -> None:
    """Drop the optimizer and the schedule of a Trainer, so that its next train() makes new ones.

    UPSTREAM: transformers 5.23.0: they are also held by the accelerator and by the handler of callbacks, and the model
    that was prepared with them is `model_wrapped`.

    Raises:
        UserError: under DeepSpeed or FSDP, whose engine holds the optimizer.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise UserError("Under DeepSpeed or FSDP give each round a new Trainer: the engine holds the old optimizer.")
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model
