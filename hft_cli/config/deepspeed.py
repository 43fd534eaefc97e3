"""The DeepSpeed settings of a run: generated, and laid over a user's own JSON, which is checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError, choose
from hft_cli.files import flatten, read_json
from hft_cli.paths import expanded

# Settings of a user's JSON that hft accepts: they change neither which weights train nor the bits of frozen weights.
FREE = (
    "comms_logger", "communication_data_type", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print",
    "wall_clock_breakdown",
)  # fmt: skip

# The same for the block zero_optimization: numbers of elements, and switches.
SIZES = (
    "allgather_bucket_size", "reduce_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
)  # fmt: skip

SWITCHES = (
    "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "overlap_comm", "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
)  # fmt: skip

QUANTIZES = "it quantizes weights, so frozen weights would change"
UNTRIED = "it belongs to ZeRO++, which was not tried with frozen weights"

# Setting -> why it is refused.
REASONS = {
    "optimizer": "AdamW is set by train.learning_rate, weight_decay, beta1 and beta2",
    "scheduler": "the schedule is set by train.schedule and train.warmup",
    "fp16": "set model.dtype=bfloat16 or float32",
    "amp": "set model.dtype=bfloat16 or float32",
    "activation_checkpointing": "it is set by train.gradient_checkpointing",
    "zero_optimization.zero_quantized_weights": QUANTIZES,
    "zero_optimization.zero_quantized_nontrainable_weights": QUANTIZES,
    "zero_optimization.zero_quantized_gradients": UNTRIED,
    "zero_optimization.zero_hpz_partition_size": UNTRIED,
    "zero_optimization.round_robin_gradients": "with it DeepSpeed returns weights under each other's names",
    "compile": "DeepCompile fails with frozen parameters (DeepSpeed #8214)",
    "compression_training": "it changes frozen weights",
    "checkpoint": "hft marks and reads checkpoints itself",
    "tensorboard": "use tracking=tensorboard",
    "wandb": "use tracking=wandb",
    "csv_monitor": "metrics.jsonl has the same values",
}


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for a run; empty without DeepSpeed. transformers fills in the values "auto".

    Raises:
        UserError: if engine.deepspeed cannot be read, contradicts the run's own keys, or has a setting that is not
            known to keep frozen weights bit for bit.
    """
    if config.engine.zero_stage is None:
        return {}
    generated = _generated(config)
    path = config.engine.deepspeed
    if path is None:
        return generated
    try:
        settings = read_json(expanded(path))
    except UserError as error:
        raise UserError(f"engine.deepspeed: {error}") from None
    fixed = _fixed_values(config)
    for key, value in flatten(settings).items():
        if value != {}:  # an empty block sets nothing
            _check(key, value, fixed, path)
    return _filled(settings, generated)


def _generated(config: RunConfig) -> dict[str, Any]:
    """The settings that hft writes."""
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
        # Without this block ZeRO-2 would train in bfloat16 and ZeRO-3 in float32.
        "bf16": {"enabled": "auto"},
        # Otherwise the gradients of micro-batches would be added in bfloat16, whose rounding grows with their number.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # Offload steps with torch's fused AdamW. DeepSpeed's own needs a compiler and two minutes on each machine.
        **({"zero_force_ds_cpu_optimizer": False} if engine.offload_optimizer else {}),
    }


def _fixed_values(config: RunConfig) -> dict[str, tuple[Any, str]]:
    """Settings that follow from the run's own keys: setting -> (value, the key that sets it)."""
    train, engine = config.train, config.engine
    device = {True: "cpu", False: "none"}
    return {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            config.accumulation,
            "train.batch_size / (train.micro_batch_size x ranks)",
        ),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (config.model.dtype == "bfloat16", "model.dtype"),
        "fp16.enabled": (False, "model.dtype"),
        "amp.enabled": (False, "model.dtype"),
        "data_types.grad_accum_dtype": ("fp32", "hft, which adds gradients of micro-batches in float32"),
        "zero_optimization.stage": (engine.zero_stage, "engine"),
        "zero_optimization.offload_optimizer.device": (device[engine.offload_optimizer], "engine"),
        "zero_optimization.offload_param.device": (device[engine.offload_parameters], "engine"),
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": (True, "hft"),
        "zero_force_ds_cpu_optimizer": (False, "hft, which steps with torch's AdamW"),
        "zero_allow_untested_optimizer": (True, "hft, which steps with torch's AdamW"),
    }


def _check(key: str, value: Any, fixed: Mapping[str, tuple[Any, str]], path: str) -> None:
    """Check one setting of a user's JSON: it must be known to be harmless, or agree with the run.

    Args:
        key: the setting, with dots between the names of blocks.
        fixed: see `_fixed_values`.
        path: the JSON file, for messages.

    Raises:
        UserError: with the setting, the reason and the fix.
    """
    where = f"engine.deepspeed={path}"
    text = json.dumps(value)
    if key in fixed:
        run_value, source = fixed[key]
        if value not in ("auto", run_value):
            raise UserError(
                f"{where} has {key}={text}, but in this run it is {json.dumps(run_value)}, set by {source}. Make the "
                'two agree, write "auto", or leave it out.'
            )
        return
    block, _, inner = key.partition(".")
    name = inner.split(".")[0]
    if block in FREE:
        return
    if block == "zero_optimization":
        if not name:
            raise UserError(f"{where} has {block}={text}, which is not a block of settings.")
        if name in (*SIZES, *SWITCHES):
            _check_zero_value(name, value, f"{where} has {key}={text}")
            return
        if name in ("offload_optimizer", "offload_param"):
            if not key.endswith(".pin_memory") or not isinstance(value, bool):
                raise UserError(f"{where} has {key}. Of offload only device=cpu and pin_memory are accepted.")
            return
        block = f"{block}.{name}"
    if reason := REASONS.get(block):
        raise UserError(f"{where} has {block}, which is not accepted: {reason}. Leave it out.")
    accepted = [*FREE, *(f"zero_optimization.{name}" for name in (*SIZES, *SWITCHES)), *fixed]
    choose(f"key of {where}", block, accepted)


def _check_zero_value(name: str, value: Any, what: str) -> None:
    """Check the type of one of SIZES or SWITCHES; `what` begins the message."""
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise UserError(f"{what}. It must be true or false.")
    elif value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
        raise UserError(f'{what}. It must be a number of elements, or "auto".')


def _filled(settings: Mapping[str, Any], generated: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the generated value where it has none or "auto", block by block."""
    filled = dict(settings)
    for key, value in generated.items():
        if isinstance(value, Mapping):
            filled[key] = _filled(filled.get(key, {}), value)
        elif filled.get(key, "auto") == "auto":
            filled[key] = value
    return filled
