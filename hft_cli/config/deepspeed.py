"""The DeepSpeed settings of a run: generated, laid over a user's own JSON, which is checked. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError, choose

# What a user's JSON may say besides what hft says itself: nothing here changes which weights train, or their bits.
FREE = (
    "comms_logger", "communication_data_type", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print",
    "wall_clock_breakdown",
)  # fmt: skip

SIZES = (  # in elements
    "allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip

SWITCHES = (
    "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "overlap_comm", "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
)  # fmt: skip

FREE_OF_ZERO = (*SIZES, *SWITCHES)

QUANTIZES = "it quantizes weights, and frozen ones would not keep their bits"

REASONS = {
    "optimizer": "AdamW is set by train.learning_rate, weight_decay, beta1 and beta2",
    "scheduler": "the schedule is set by train.schedule and train.warmup",
    "fp16": "set model.dtype=bfloat16 or float32",
    "amp": "set model.dtype=bfloat16 or float32",
    "activation_checkpointing": "it is set by train.gradient_checkpointing",
    "zero_optimization.zero_quantized_weights": QUANTIZES,
    "zero_optimization.zero_quantized_nontrainable_weights": QUANTIZES,
    "zero_optimization.zero_quantized_gradients": "it is of ZeRO++, which was never tried with frozen weights",
    "zero_optimization.zero_hpz_partition_size": "it is of ZeRO++, which was never tried with frozen weights",
    "zero_optimization.round_robin_gradients": "with it DeepSpeed gives back weights under each other's names",
    "compile": "DeepCompile fails where parameters are frozen (DeepSpeed #8214)",
    "compression_training": "it changes frozen weights",
    "checkpoint": "hft marks and reads checkpoints itself",
    "tensorboard": "use tracking=tensorboard",
    "wandb": "use tracking=wandb",
    "csv_monitor": "metrics.jsonl has it",
}


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for this run, numbers that transformers fills in as "auto"; empty without DeepSpeed.

    Raises:
        UserError: if engine.deepspeed cannot be read, contradicts the run's own keys, or holds what is not known to
            keep frozen weights as they are.
    """
    if config.engine.zero_stage is None:
        return {}
    own = _own(config)
    path = config.engine.deepspeed
    if path is None:
        return own
    given = _read(path)
    fixed = _fixed(config)
    for key, value in _leaves(given):
        _check(key, value, fixed, path)
    return _laid_over(given, own)


def _own(config: RunConfig) -> dict[str, Any]:
    """What hft sets."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # Always there: without the block ZeRO-2 would train in bfloat16 and ZeRO-3 in float32.
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        # Offload steps with torch's fused AdamW: DeepSpeed's own needs a compiler and two minutes on each machine.
        **({"zero_force_ds_cpu_optimizer": False} if engine.offload_optimizer else {}),
    }


def _fixed(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Keys whose value follows from the run's own: the value, and what it is set by."""
    train, engine = config.train, config.engine
    device = {True: "cpu", False: "none"}
    return {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            train.batch_size // (train.micro_batch_size * engine.ranks),
            "train.batch_size / (train.micro_batch_size x ranks)",
        ),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (config.model.dtype == "bfloat16", "model.dtype"),
        "fp16.enabled": (False, "model.dtype"),
        "amp.enabled": (False, "model.dtype"),
        "zero_optimization.stage": (engine.zero_stage, "engine"),
        "zero_optimization.offload_optimizer.device": (device[engine.offload_optimizer], "engine"),
        "zero_optimization.offload_param.device": (device[engine.offload_parameters], "engine"),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": (True, "hft"),
        "zero_force_ds_cpu_optimizer": (False, "hft, which has torch's AdamW step"),
        "zero_allow_untested_optimizer": (True, "hft, which has torch's AdamW step"),
    }


def _check(key: str, value: Any, fixed: Mapping[str, tuple[Any, str]], path: str) -> None:
    """Refuse one value of a user's JSON unless it is known to be harmless, or says what hft says."""
    if key in fixed:
        own, by = fixed[key]
        if value not in ("auto", own):
            raise UserError(
                f"engine.deepspeed={path} has {key}={json.dumps(value)}, but here it is {json.dumps(own)}, set by "
                f'{by}. Make the two agree, write "auto", or leave it out.'
            )
        return
    top, _, inner = key.partition(".")
    name = inner.split(".")[0]
    if top in FREE:
        return
    if top == "zero_optimization" and not name:
        raise UserError(f"engine.deepspeed={path} has {top}={json.dumps(value)}, which is not a block of settings.")
    if name in FREE_OF_ZERO:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if not (isinstance(value, bool) if name in SWITCHES else number or value == "auto"):
            kind = "true or false" if name in SWITCHES else 'a number of elements, or "auto"'
            raise UserError(f"engine.deepspeed={path} has {key}={json.dumps(value)}, which is to be {kind}.")
        return
    if name in ("offload_optimizer", "offload_param"):
        if not key.endswith(".pin_memory") or not isinstance(value, bool):
            raise UserError(
                f"engine.deepspeed={path} has {key}: of offload only device=cpu and pin_memory=true|false are taken."
            )
        return
    known = top if top != "zero_optimization" else f"{top}.{name}"
    if reason := REASONS.get(known):
        raise UserError(f"engine.deepspeed={path} has {known}, which is not taken: {reason}. Leave it out.")
    names = [*FREE, *(f"zero_optimization.{own}" for own in FREE_OF_ZERO), *fixed]
    choose(f"key of engine.deepspeed={path}", known, names)


def _read(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        raise UserError(f"engine.deepspeed={path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"engine.deepspeed={path} is not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise UserError(f"engine.deepspeed={path} does not hold a JSON object.")
    return given


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _laid_over(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, which was checked, with what it leaves to us filled in, block by block."""
    merged = dict(given)
    for key, value in own.items():
        if isinstance(value, Mapping):
            merged[key] = _laid_over(merged.get(key, {}), value)
        elif merged.get(key, "auto") == "auto":
            merged[key] = value
    return merged
