"""Refuse what cannot work, before anything expensive starts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from hft_cli.config.schema import (
    REQUIRED,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    PlanConfig,
    RunConfig,
    SuiteConfig,
    as_paths,
    test_sets,
    training_sets,
)
from hft_cli.errors import UserError, choose


def check(config: RunConfig) -> None:
    """Refuse what cannot work, before anything expensive starts.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    resets = config.method.name == "half_reset"
    _check_missing(config)
    model, data, selection, engine, train = config.model, config.data, config.selection, config.engine, config.train
    choose("method.name", config.method.name, METHODS)
    _check_model(model)
    _check_suite(config.suite)
    choose("data.format", data.format, ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "trace"))
    choose("data.loss", data.loss, ("assistant", "all"))
    choose("selection.level", selection.level, ("all", "category", "layer", "model"))
    choose("selection.balance", selection.balance, ("matrices", "elements"))
    choose("selection.redraw", selection.redraw, ("independent", "complementary", "balanced", "fixed"))
    choose("data.long_prompts", data.long_prompts, ("drop", "cut"))
    choose("continual", config.continual.name, ("seqft", "replay", "gem", "lora"))
    for metric in data.metric.values() if isinstance(data.metric, dict) else [data.metric]:
        choose("data.metric", metric, METRICS)
    choose("tracking", config.tracking.name, TRACKERS)
    choose("train.schedule", train.schedule, ("linear", "cosine", "constant", "constant_with_warmup"))
    for name in ("embeddings", "head", "final_norm"):
        choose(f"selection.{name}", getattr(selection, name), ("update", "freeze"))

    for path, value, low in (
        ("continual.gem_margin", config.continual.gem_margin, 0),
        ("continual.gem_memory", config.continual.gem_memory, 1),
        ("continual.lora_rank", config.continual.lora_rank, 1),
        ("data.max_rows", data.max_rows, 1),
        ("dpo.max_steps", config.dpo.max_steps, 1),
        ("engine.num_nodes", engine.num_nodes, 1),
        ("engine.num_processes", engine.num_processes, 1),
        ("generation.batch_size", config.generation.batch_size, 1),
        ("generation.max_new_tokens", config.generation.max_new_tokens, 1),
        ("generation.max_prompt_length", config.generation.max_prompt_length, 1),
        ("generation.temperature", config.generation.temperature, 0),
        ("seed", config.seed, 0),
        ("selection.seed", selection.seed, 0),
        ("train.batch_size", train.batch_size, 1),
        ("train.log_every", train.log_every, 1),
        ("train.max_grad_norm", train.max_grad_norm, 0),
        ("train.max_length", train.max_length, 2),
        ("train.max_steps", train.max_steps, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.save_every", train.save_every, 1),
        ("train.save_limit", train.save_limit, 1),
        ("train.weight_decay", train.weight_decay, 0),
    ):
        _at_least(path, value, low)
    for path, value in (("seed", config.seed), ("selection.seed", selection.seed)):
        if value is not None and value >= 2**32:
            raise UserError(f"{path}={value} is too large: it must be below 2^32.")
    for path, value in (
        ("train.learning_rate", train.learning_rate),
        ("train.save_minutes", train.save_minutes),
        *_each("train.epochs", train.epochs),
        ("continual.replay_ratio", config.continual.replay_ratio),
        ("continual.replay_epochs", config.continual.replay_epochs),
        ("continual.lora_alpha", config.continual.lora_alpha),
        ("dpo.beta", config.dpo.beta),
        ("dpo.learning_rate", config.dpo.learning_rate),
        ("dpo.epochs", config.dpo.epochs),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{path}={value} must be above 0.")
    for path, value in (
        ("train.warmup", train.warmup),
        ("train.beta1", train.beta1),
        ("train.beta2", train.beta2),
        ("dpo.warmup", config.dpo.warmup),
        ("continual.lora_dropout", config.continual.lora_dropout),
    ):
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{path}={value} must be in [0, 1).")
    if config.continual.replay_ratio > 1:
        raise UserError(f"continual.replay_ratio={config.continual.replay_ratio} is a share: it must be in (0, 1].")
    if not 0 <= selection.ratio <= 1:
        raise UserError(f"selection.ratio={selection.ratio} is a share: it must be in [0, 1].")
    if selection.redraw == "balanced" and selection.balance == "elements":
        raise UserError("selection.redraw=balanced counts matrices, so it needs selection.balance=matrices.")
    if selection.level == "all" and selection.ratio not in (0.5, 1.0):
        raise UserError(
            f"selection.ratio={selection.ratio} has no meaning with selection=all, which updates every matrix. "
            "Use selection=category, layer or model."
        )

    if resets and model.base is None:
        raise UserError(
            "method=half_reset needs model.base=…, the model to go back to (and model.tuned=…, the tuned one)."
        )
    if not resets and model.base is not None:
        raise UserError(
            f"model.base is for method=half_reset alone; method={config.method.name} starts from model.path."
        )
    if not resets and not (config.method.save_model and not config.method.shared_rows):
        raise UserError(f"method.save_model and method.shared_rows are not for method={config.method.name}.")
    if not config.method.save_model and (config.suite.benchmarks or config.suite.harness or config.suite.probe):
        raise UserError(
            f"method.save_model=false leaves no model that the benchmarks of suite={config.suite.name} could be scored "
            "on. Use suite=pocket or data.test_path, or write the model."
        )
    if resets and engine.zero_stage is not None:
        raise UserError(f"method=half_reset copies files and needs no ranks: leave out engine={engine.name}.")
    every = config.method.name in ("fft", "dpo")
    if every and selection.level != "all":
        raise UserError(
            f"method={config.method.name} updates every matrix, so selection={selection.level} cannot hold. "
            f"Use method={'hft' if config.method.name == 'fft' else 'hft_dpo'}, or leave selection out."
        )
    outside = {name: getattr(selection, name) for name in ("embeddings", "head", "final_norm")}
    if every and "freeze" in outside.values():
        frozen = ", ".join(f"selection.{name}=freeze" for name, state in outside.items() if state == "freeze")
        raise UserError(f"method={config.method.name} updates every matrix, so {frozen} cannot hold. Use method=hft.")
    _check_engine(engine)
    for stage in config.method.stages:
        choose("stage in method.stages", stage, ("sft", "dpo"))
    rounds = training_sets(data)
    if not resets and len(config.method.stages) not in (1, len(rounds)):
        raise UserError(
            f"method.stages names {len(config.method.stages)} stages for {len(rounds)} training sets: give "
            "one for all, or one for each."
        )
    _check_continual(config)
    choose("dpo.reference", config.dpo.reference, ("precomputed", "shared", "full"))
    choose("dpo.ties", config.dpo.ties, ("keep", "drop"))
    if "dpo" in config.method.stages and config.dpo.reference == "shared" and engine.zero_stage == 3:
        raise UserError(
            "dpo.reference=shared cannot be with engine=zero3, which shards every tensor for one model only. Use "
            "dpo.reference=precomputed, which needs no second model in memory, or full."
        )
    if "dpo" in config.method.stages and train.packing:
        raise UserError("train.packing=true is for SFT; DPO's pairs are not packed. Set train.packing=false.")
    if model.attention == "flash_attention_2" and model.dtype != "bfloat16":
        raise UserError(
            "model.attention=flash_attention_2 computes in bfloat16 only: set model.dtype=bfloat16, or "
            "model.attention=sdpa."
        )
    step_rows = train.micro_batch_size * engine.ranks
    if train.batch_size % step_rows:
        nodes = f" x engine.num_nodes={engine.num_nodes}" if engine.num_nodes > 1 else ""
        raise UserError(
            f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size} "
            f"x engine.num_processes={engine.num_processes}{nodes}. Nearest that is: "
            f"{max(1, round(train.batch_size / step_rows)) * step_rows}."
        )
    if not all(isinstance(place, str) for value in (data.path, data.test_path) for place in as_paths(value)):
        raise UserError("data.path and data.test_path are each a path or a list of paths.")
    if data.tasks and (not isinstance(data.path, str) or data.test_path is not None):
        raise UserError(
            "data.tasks names folders below data.path, which hold their test rows too: give one data.path, and no "
            "data.test_path."
        )
    if data.tasks and resets:
        raise UserError("method=half_reset trains on nothing: leave out data.tasks; data.test_path can be scored.")
    if not rounds and not resets:
        raise UserError("data.path is empty: give a file, a folder, a hub name, or a list of them.")
    if len(test_sets(data)) not in (0, 1, len(rounds) * (not resets)):
        raise UserError(
            f"data.test_path names {len(test_sets(data))} sets for {len(rounds)} training sets: "
            "give none, one, or one for each."
        )


def check_eval(config: EvalConfig) -> None:
    """The same for `hft eval`.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    _check_missing(config)
    _check_model(config.model)
    _check_suite(config.suite)
    _at_least("engine.num_processes", config.engine.num_processes, 1)
    choose("engine.device", config.engine.device, ("auto", "gpu", "cpu"))
    if config.engine.num_nodes > 1:
        raise UserError("hft eval scores on one node: leave out engine.num_nodes.")
    if not config.models:
        raise UserError("models is empty: give after, before or both.")
    for name in config.models:
        choose("models", name, ("after", "before"))


def _check_missing(config: RunConfig | EvalConfig) -> None:
    for path, value in _leaves(config):
        if value == REQUIRED and path == "method.name":
            raise UserError(f"No method: give one of +method={'|'.join(METHODS)}. For instance: hft train +method=hft")
        if value == REQUIRED:
            raise UserError(f"{path} is not set. Give it on the command line: {path}=…")


def _check_model(model: ModelConfig) -> None:
    choose("model.dtype", model.dtype, ("float32", "bfloat16"))
    if model.attention is not None:
        choose("model.attention", model.attention, ("sdpa", "eager", "flash_attention_2"))


def _check_suite(suite: SuiteConfig) -> None:
    for path, value, low in (
        ("suite.batch_size", suite.batch_size, 1),
        ("suite.limit", suite.limit, 1),
        ("suite.seed", suite.seed, 0),
    ):
        _at_least(path, value, low)
    choose("suite.chat", suite.chat.lower(), ("auto", "true", "false"))


def _at_least(path: str, value: float | None, low: float) -> None:
    if value is not None and not value >= low:
        raise UserError(f"{path}={value} is too small: it must be at least {low}.")


def _check_engine(engine: EngineConfig) -> None:
    """Refuse ranks, nodes and offload that an engine cannot have."""
    choose("engine.device", engine.device, ("auto", "gpu", "cpu"))
    if engine.zero_stage not in (None, 1, 2, 3):
        raise UserError(f"engine.zero_stage={engine.zero_stage} does not exist: choose 1, 2 or 3.")
    for key in ("num_processes", "num_nodes"):
        if engine.zero_stage is None and getattr(engine, key) > 1:
            raise UserError(
                f"engine={engine.name} is one process, but engine.{key}={getattr(engine, key)}. "
                "Use engine=zero1, zero2 or zero3."
            )
    if engine.offload_optimizer and engine.zero_stage not in (2, 3):
        raise UserError(
            f"engine.offload_optimizer=true is for ZeRO-2 and 3, not for engine={engine.name}. Use "
            "engine=zero2_offload or zero3_offload."
        )
    if engine.offload_parameters and not (engine.zero_stage == 3 and engine.offload_optimizer):
        raise UserError(
            "engine.offload_parameters=true is for ZeRO-3 with engine.offload_optimizer=true. Use engine=zero3_offload."
        )
    if engine.deepspeed is not None and engine.zero_stage is None:
        raise UserError(
            f"engine.deepspeed={engine.deepspeed} is for DeepSpeed, and engine={engine.name} runs without it. Use "
            "engine=zero1, zero2 or zero3, whichever stage the file has."
        )
    if engine.node_rank is not None and not 0 <= engine.node_rank < engine.num_nodes:
        raise UserError(
            f"engine.node_rank={engine.node_rank} is not one of engine.num_nodes={engine.num_nodes} nodes: they count "
            "from 0."
        )
    if engine.rendezvous is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", engine.rendezvous):
        raise UserError(f"engine.rendezvous={engine.rendezvous} is not HOST:PORT, for instance node0:29500.")


def _check_continual(config: RunConfig) -> None:
    """Refuse strategies of continual learning where they cannot do what they are for."""
    name, rounds = config.continual.name, training_sets(config.data)
    if config.continual.replay_general is not None and name != "replay":
        raise UserError(f"continual.replay_general is for continual=replay; with continual={name} nothing reads it.")
    if name == "replay" and config.train.packing and not config.continual.replay_shuffle:
        raise UserError("train.packing=true packs rows in an order of its own: set continual.replay_shuffle=true.")
    if name == "seqft":
        return
    if config.method.name not in ("fft", "hft") or set(config.method.stages) != {"sft"}:
        raise UserError(f"continual={name} is for SFT by method=fft or hft, not for DPO or Half-Reset.")
    if name in ("replay", "gem") and len(rounds) < 2:
        raise UserError(
            f"continual={name} needs a sequence of tasks, and there is {len(rounds)} round. Give several training sets "
            "(data.path=[…]) or data=trace."
        )
    if name == "lora" and config.method.name != "fft":
        raise UserError(
            "continual=lora trains adapters beside all matrices, so there is no half to draw: use method=fft."
        )
    if name in ("gem", "lora") and config.engine.offload_optimizer:
        raise UserError(f"continual={name} was never tried with offload: use engine=single, zero1 or zero2.")
    if name in ("gem", "lora") and config.engine.zero_stage == 3:
        raise UserError(f"continual={name} cannot be with engine=zero3: use engine=single, zero1 or zero2.")
    if config.train.packing and name == "gem":
        raise UserError("continual=gem takes gradients of single rows: set train.packing=false.")


def _each(key: str, value: Any) -> list[tuple[str, float]]:
    """A key's number, or those of its map from task to number, each under its own name.

    Raises:
        UserError: for anything else.
    """
    found = {f"{key}.{task}": own for task, own in value.items()} if isinstance(value, dict) else {key: value}
    for name, own in found.items():
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise UserError(f"{name}={own} is neither a number nor a map from task to number.")
    return list(found.items())


METRICS = (
    "exact_match",
    "accuracy",
    "first_character",
    "rouge_l",
    "edit_similarity",
    "code_edit_similarity",
    "sari",
)

TRACKERS = ("none", "tensorboard", "wandb", "trackio")

METHODS = ("fft", "hft", "half_reset", "dpo", "hft_dpo")


def _leaves(config: Any, where: str = "") -> Iterable[tuple[str, Any]]:
    for spec in fields(config):
        path = f"{where}.{spec.name}" if where else spec.name
        value = getattr(config, spec.name)
        if is_dataclass(value):
            yield from _leaves(value, path)
        else:
            yield path, value


def check_plan(config: PlanConfig) -> None:
    """Refuse what `hft plan` cannot reckon with."""
    for key, value in (
        ("gpu_memory", config.gpu_memory),
        ("tflops", config.tflops),
        ("utilization", config.utilization),
        ("rows", config.rows),
        ("row_tokens", config.row_tokens),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} must be above 0.")
    if config.utilization > 1:
        raise UserError(f"utilization={config.utilization} is a share: it must be in (0, 1].")
