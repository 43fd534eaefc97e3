"""Rules across the keys of what a run does: method, selection, anchors, continual learning, DPO."""

from __future__ import annotations

import re
from collections.abc import Callable

from hft_cli.config.data_sets import count_rounds
from hft_cli.config.optimizers import DEFAULT
from hft_cli.config.schema import RunConfig, SelectionConfig

ANCHORED = ("adamw_torch_fused", "adafactor")  # optimizers whose state of a tensor can hold its start

NO_DRAW = (SelectionConfig.ratio, SelectionConfig.redraw, SelectionConfig.balance)

OUTSIDE = ("embeddings", "head", "final_norm")  # fields of SelectionConfig for parameters outside the layers


def _selection_has_a_ratio_to_meet(config: RunConfig) -> str | None:
    selection = config.selection
    if selection.redraw == "balanced" and selection.balance == "elements":
        return "selection.redraw=balanced counts matrices, so it needs selection.balance=matrices."
    if selection.level == "all" and selection.ratio not in (0.5, 1.0):
        return (
            f"selection.ratio={selection.ratio} has no meaning with selection=all, which updates every matrix. Use "
            "selection=category, layer or model."
        )
    return None


def _importance_has_rows(config: RunConfig) -> str | None:
    selection = config.selection
    if selection.level != "importance":
        if selection.importance_rows is not None:
            return f"selection.importance_rows is for selection=importance, not for selection={selection.level}."
        return None
    if selection.importance_rows is None:
        return (
            "selection=importance needs data.general=PATH, a few rows of what the model is to keep (for the embedded "
            "model pocket:facts.jsonl)."
        )
    if (selection.redraw, selection.balance) != NO_DRAW[1:]:
        return "selection=importance draws nothing at random: leave out selection.redraw and selection.balance."
    if config.engine.num_nodes > 1:
        return "selection=importance is measured on one node: use engine.num_nodes=1."
    return None


def _names_are_given(config: RunConfig) -> str | None:
    selection = config.selection
    if (selection.level == "names") != bool(selection.names):
        return (
            f"selection={selection.level} with selection.names={selection.names}: give both selection=names and "
            "selection.names=[PATTERN,…], or none of them."
        )
    if selection.level == "names" and (selection.ratio, selection.redraw, selection.balance) != NO_DRAW:
        return "selection=names draws nothing: leave out selection.ratio, selection.redraw and selection.balance."
    for pattern in selection.names:
        try:
            re.compile(pattern)
        except re.error as error:
            return f"selection.names: {pattern!r} is no regular expression: {error}."
    return None


def _full_methods_freeze_nothing(config: RunConfig) -> str | None:
    method, selection = config.method.name, config.selection
    if method not in ("fft", "dpo", "lora"):
        return None
    half = "hft_dpo" if method == "dpo" else "hft"
    if selection.level != "all":
        return (
            f"method={method} updates every matrix, so selection={selection.level} cannot hold. Use method={half}, or "
            "leave selection out."
        )
    frozen = [f"selection.{name}=freeze" for name in OUTSIDE if getattr(selection, name) == "freeze"]
    if frozen:
        return f"method={method} updates every matrix, so {', '.join(frozen)} cannot hold. Use method={half}."
    return None


def _base_is_named(config: RunConfig) -> str | None:
    method = config.method
    if method.trains or config.model.base is not None:
        return None
    return f"method={method.name} needs model.base=…, the model to go back to (and model.tuned=…, the tuned one)."


def _ranks_train(config: RunConfig) -> str | None:
    if config.method.trains or config.engine.zero_stage is None:
        return None
    return f"method={config.method.name} computes with files and needs no ranks: leave out engine={config.engine.name}."


def _method_has_its_keys(config: RunConfig) -> str | None:
    method = config.method
    if method.name == "half_reset" and (method.alpha is not None or method.alpha_last is not None):
        return "method=half_reset keeps nothing of a change: use method=interpolate for method.alpha."
    if method.alpha is None and (method.name == "interpolate" or method.alpha_last is not None):
        return f"method={method.name} needs method.alpha=…, the share of its change that each matrix keeps."
    if not method.trains:
        return None
    if config.model.base is not None:
        return (
            f"model.base is for method=half_reset and method=interpolate; method={method.name} starts from model.path."
        )
    if method.shared_rows or not method.save_model:
        return f"method.save_model and method.shared_rows are not for method={method.name}."
    return None


def _vllm_needs_a_model_on_disk(config: RunConfig) -> str | None:
    if config.method.save_model or config.generation.backend != "vllm":
        return None
    return (
        "generation.backend=vllm loads the model that is scored from its files, and method.save_model=false writes "
        "none: leave out one of them."
    )


def _benchmarks_need_a_model_on_disk(config: RunConfig) -> str | None:
    suite = config.suite
    if config.method.save_model or not (suite.benchmarks or suite.harness or suite.probe):
        return None
    return (
        f"method.save_model=false leaves no model that the benchmarks of suite={suite.name} could be scored on. Use "
        "suite=pocket or data.test_path, or write the model."
    )


def _replay_keys_need_replay(config: RunConfig) -> str | None:
    continual = config.continual
    if continual.replay_general is not None and continual.name not in ("replay", "mixed_replay"):
        return (
            f"continual.replay_general is for continual=replay and mixed_replay; continual={continual.name} does not "
            "read it."
        )
    if continual.name == "replay" and config.train.packing and not continual.replay_shuffle:
        return "train.packing=true packs rows in an order of its own: set continual.replay_shuffle=true."
    return None


def _continual_suits_the_method(config: RunConfig) -> str | None:
    name, rounds = config.continual.name, count_rounds(config.data)
    if name == "seqft":
        return None
    if config.method.name not in ("fft", "hft", "lora") or set(config.method.stages) != {"sft"}:
        return f"continual={name} is for SFT by method=fft, hft or lora, not for DPO or Half-Reset."
    if name == "mixed_replay" and rounds < 2 and config.continual.replay_general is None:
        return (
            "continual=mixed_replay has nothing to replay in one round: give data.general=PATH, or several "
            "training sets (data.path=[…])."
        )
    if name in ("replay", "gem") and rounds < 2:
        return (
            f"continual={name} needs a sequence of tasks, but there is {rounds} round. Give several training sets "
            "(data.path=[…]) or data=trace."
        )
    return None


def _continual_suits_the_engine(config: RunConfig) -> str | None:
    if config.continual.name != "gem":
        return None
    if config.method.name == "lora":
        return "continual=gem takes gradients of matrices, not of adapters: use method=fft or hft."
    if config.train.packing:
        return "continual=gem takes gradients of single rows: set train.packing=false."
    return _engine_of_stage_2("continual=gem", config)


def _lora_is_sft_of_all_matrices(config: RunConfig) -> str | None:
    if config.method.name != "lora":
        return None
    if set(config.method.stages) != {"sft"}:
        return "method=lora is for SFT: leave out method.stages."
    return _engine_of_stage_2("method=lora", config)


def _anchor_can_hold(config: RunConfig) -> str | None:
    anchor, method, engine = config.anchor, config.method, config.engine
    if (anchor.name == "none") != (anchor.weight == 0):
        return f"anchor={anchor.name}, anchor.weight={anchor.weight}: give anchor=l2_sp or kl, and a weight above 0."
    if anchor.name == "none":
        return None
    if not method.trains or method.name == "lora":
        return f"anchor={anchor.name} holds matrices that are trained, which method={method.name} has none of."
    if anchor.name == "kl":
        if "dpo" in method.stages:
            return "anchor=kl is for SFT: the loss of DPO has a divergence of its own, by dpo.beta."
        if config.continual.name == "gem":
            return "anchor=kl was not tried with continual=gem: use anchor=l2_sp."
        if engine.zero_stage == 3:
            return "anchor=kl needs whole weights, and engine=zero3 has shards: use engine=single, zero1 or zero2."
    elif engine.offload_optimizer or config.train.optimizer not in ANCHORED:
        return (
            "anchor=l2_sp keeps the start in the optimizer's state on the device: without offload, and with "
            "train.optimizer=adamw_torch_fused or adafactor."
        )
    return None


def _momentum_is_whole(config: RunConfig) -> str | None:
    if config.train.momentum_filter is None:
        return None
    if config.engine.zero_stage is not None:
        return (
            "train.momentum_filter ranks the elements of each tensor, and ZeRO gives a rank parts of tensors in one "
            "vector: use engine=single."
        )
    if config.train.optimizer != DEFAULT:
        return f"train.momentum_filter needs AdamW's first moments: set train.optimizer={DEFAULT}."
    return None


def _engine_of_stage_2(what: str, config: RunConfig) -> str | None:
    """A message if the engine has shards of weights, or offload."""
    if config.engine.offload_optimizer:
        return f"{what} was not tried with offload: use engine=single, zero1 or zero2."
    if config.engine.zero_stage == 3:
        return f"{what} does not work on engine=zero3: use engine=single, zero1 or zero2."
    return None


def _dpo_can_be_done(config: RunConfig) -> str | None:
    if "dpo" not in config.method.stages:
        return None
    if config.dpo.reference == "shared" and config.engine.zero_stage == 3:
        return (
            "dpo.reference=shared does not work on engine=zero3, which shards every tensor for one model only. Use "
            "dpo.reference=precomputed, which needs no second model in memory, or full."
        )
    if config.train.packing:
        return "train.packing=true is for SFT; DPO's pairs are not packed. Set train.packing=false."
    if config.train.padding_free:
        return "train.padding_free=true is for SFT; DPO's pairs are padded. Set train.padding_free=false."
    return None


METHOD_RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    _selection_has_a_ratio_to_meet,
    _importance_has_rows,
    _names_are_given,
    _full_methods_freeze_nothing,
    _base_is_named,
    _ranks_train,
    _method_has_its_keys,
    _benchmarks_need_a_model_on_disk,
    _vllm_needs_a_model_on_disk,
    _replay_keys_need_replay,
    _continual_suits_the_method,
    _continual_suits_the_engine,
    _lora_is_sft_of_all_matrices,
    _anchor_can_hold,
    _momentum_is_whole,
    _dpo_can_be_done,
)
