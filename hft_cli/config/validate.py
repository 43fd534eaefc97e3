"""Refuse configurations that cannot work, before anything expensive starts.

`check_settings` checks each value by itself. What stands here are the rules across keys: small functions from a config
to a message, or to None if the config keeps the rule. Adding a rule is one function and one row in its list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

from hft_cli.config.data_sets import as_paths, count_rounds, mixed_sets, test_sets
from hft_cli.config.method_rules import METHOD_RULES
from hft_cli.config.optimizers import DEFAULT, OPTIMIZERS
from hft_cli.config.schema import EvalConfig, RunConfig
from hft_cli.config.settings import AUTO, FLASH_ATTENTION, REQUIRED, check_settings, leaves
from hft_cli.config.training import TrainConfig
from hft_cli.errors import UserError
from hft_cli.paths import group_options

BETA1, BETA2 = (TrainConfig.beta1, TrainConfig.beta2)

Rule = Callable[[Any], str | None]


def check(config: RunConfig) -> None:
    """Check the config of `hft train` or `hft plan`.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    _check(config, RULES)


def check_eval(config: EvalConfig) -> None:
    """Check the config of `hft eval`.

    Raises:
        UserError: one line with what, where, the choices and the fix.
    """
    _check(config, EVAL_RULES)


def _check(config: RunConfig | EvalConfig, rules: Iterable[Rule]) -> None:
    for key, _, value in leaves(config):
        if value == REQUIRED:
            raise UserError(_not_set(key))
    check_settings(config)
    for rule in rules:
        if (message := rule(config)) is not None:
            raise UserError(message)


def _not_set(key: str) -> str:
    group, _, name = key.partition(".")
    if name == "name":
        return f"No {group}: give {group}=NAME. Available: {', '.join(group_options(group))}."
    return f"{key} is not set. Give it on the command line: {key}=…"


def _paths_are_text(config: RunConfig) -> str | None:
    places = [*as_paths(config.data.path), *as_paths(config.data.test_path)]
    if all(isinstance(place, str) and place for place in places):
        return None
    return "data.path and data.test_path are each a path or a list of paths."


def _folders_are_named(config: RunConfig) -> str | None:
    for key, value in (("output_dir", config.output_dir), ("model.path", config.model.path)):
        if not str(value).strip():
            return f"{key}= is empty. Give a folder."
    return None


def _data_are_named(config: RunConfig) -> str | None:
    tasks = config.data.tasks
    if tasks and config.data.path is None and config.method.trains:
        return (
            f"data.path is not set. Give the folder that holds {tasks[0]}{', …' * (len(tasks) > 1)}: data.path=FOLDER."
        )
    if not config.method.trains or count_rounds(config.data):
        return None
    return f"No data: give data.path=FILE|FOLDER|HUB_NAME or data=NAME. Available: {', '.join(group_options('data'))}."


def _suite_is_no_path(config: RunConfig | EvalConfig) -> str | None:
    name = config.suite.name
    if re.fullmatch(r"[^/\\\0.][^/\\\0]*", name) and name != "data":
        return None
    why = "the test sets of the data have that name" if name == "data" else "files have that name"
    return f"suite.name={name}: {why}. Give a name without / and without a dot at its start, for instance my_suite."


def _shares_leave_room(config: RunConfig) -> str | None:
    data, continual, mix = config.data, config.continual, mixed_sets(config.data)
    if not config.method.trains:
        return f"method={config.method.name} does not train: leave out data.mix." if mix else None
    shares = [each.share for each in mix if each.share is not None]
    replayed = continual.replay_share if continual.name == "mixed_replay" else 0.0
    total = sum(shares) + replayed
    if as_paths(data.path) or len(shares) < len(mix):
        whole = "data.path" if as_paths(data.path) else "the sets without a share"
        return None if total < 1 else f"The shares of data.mix add up to {total:g} and leave no room for {whole}."
    if replayed or not shares or math.isclose(total, 1):
        return "continual=mixed_replay needs data.path." if replayed else None
    fix = ", ".join(f"{share / total:.4g}" for share in shares)
    return f"Every set of data.mix has a share, and they add up to {total:g}, not 1. Use {fix}, or give data.path."


def _mix_is_of_one_stage(config: RunConfig) -> str | None:
    if config.data.mix and len(set(config.method.stages)) > 1:
        return "data.mix adds the same rows to every round, but method.stages has SFT rounds, of chats, and DPO rounds."
    return None


def _validation_sets_are_known(config: RunConfig) -> str | None:
    sets, train = as_paths(config.data.validation), config.train
    for name in ("validate_every", "early_stopping", "keep_best"):
        if getattr(train, name) and not sets:
            return f"train.{name}={getattr(train, name)} needs validation rows: give data.validation=PATH or 0.05."
    if sets and not config.method.trains:
        return f"method={config.method.name} does not train: leave out data.validation."
    if len(sets) > 1 and len(sets) != count_rounds(config.data):
        return (
            f"data.validation names {len(sets)} sets for {count_rounds(config.data)} training sets: give one, or one "
            "for each."
        )
    for value in sets:
        known = value is None or (isinstance(value, str) and value) or (isinstance(value, float) and 0 < value < 1)
        if not known:
            return f"data.validation={value} is neither a path nor a share above 0 and below 1."
    return None


def _tasks_are_in_one_folder(config: RunConfig) -> str | None:
    data = config.data
    if not data.tasks:
        return None
    if not config.method.trains:
        return f"method={config.method.name} does not train: leave out data.tasks. It can score data.test_path."
    if isinstance(data.path, str) and data.test_path is None:
        return None
    return (
        "data.tasks names folders below data.path, which also hold the test rows: give one data.path and no "
        "data.test_path."
    )


def _test_sets_match_training_sets(config: RunConfig) -> str | None:
    tests = len(test_sets(config.data))
    rounds = 0 if not config.method.trains else count_rounds(config.data)
    if tests in (0, 1, rounds):
        return None
    return f"data.test_path names {tests} sets for {rounds} training sets: give none, one, or one for each."


def _sets_can_be_divided(config: RunConfig) -> str | None:
    if config.data.rounds_per_set == 1:
        return None
    name = config.method.name
    if not config.method.trains or name == "lora":
        why = "does not train" if name != "lora" else "trains the same adapters in all rounds"
        return f"method={name} {why}: leave out data.rounds_per_set."
    if config.train.packing or config.train.group_by_length:
        return "data.rounds_per_set fixes the order of rows: set train.packing=false and train.group_by_length=false."
    return None


def _stages_match_training_sets(config: RunConfig) -> str | None:
    stages, rounds = len(config.method.stages), count_rounds(config.data)
    if not config.method.trains or stages in (1, rounds):
        return None
    return f"method.stages names {stages} stages for {rounds} training sets: give one for all sets, or one for each."


def _date_is_a_day(config: RunConfig | EvalConfig) -> str | None:
    try:
        date.fromisoformat(config.model.date or "2026-12-31")
    except ValueError:
        return f"model.date={config.model.date} is no day, as 2026-12-31."
    return None


def _ranks_are_counted(config: RunConfig | EvalConfig) -> str | None:
    if config.engine.num_processes or config.engine.name == AUTO:
        return None
    return "engine.num_processes=0 is for engine=auto. Give the number of GPUs of a node."


def _ranks_need_a_zero_stage(config: RunConfig) -> str | None:
    engine = config.engine
    if engine.name == AUTO:
        return None
    for key in ("num_processes", "num_nodes"):
        if engine.zero_stage is None and getattr(engine, key) > 1:
            return (
                f"engine={engine.name} is one process, but engine.{key}={getattr(engine, key)}. Use engine=zero1, "
                "zero2 or zero3."
            )
    return None


def _offload_needs_its_zero_stage(config: RunConfig) -> str | None:
    engine = config.engine
    if engine.offload_optimizer and engine.zero_stage not in (2, 3):
        return (
            f"engine.offload_optimizer=true is for ZeRO-2 and 3, not for engine={engine.name}. Use "
            "engine=zero2_offload or zero3_offload."
        )
    if engine.offload_parameters and not (engine.zero_stage == 3 and engine.offload_optimizer):
        return (
            "engine.offload_parameters=true is for ZeRO-3 with engine.offload_optimizer=true. Use engine=zero3_offload."
        )
    return None


def _deepspeed_file_needs_deepspeed(config: RunConfig) -> str | None:
    engine = config.engine
    if engine.deepspeed is None or engine.zero_stage is not None:
        return None
    return (
        f"engine.deepspeed={engine.deepspeed} is for DeepSpeed, and engine={engine.name} runs without it. Use "
        "engine=zero1, zero2 or zero3, the stage that the file has."
    )


def _nodes_can_meet(config: RunConfig) -> str | None:
    engine = config.engine
    if engine.node_rank is not None and engine.node_rank >= engine.num_nodes:
        return (
            f"engine.node_rank={engine.node_rank} is not one of engine.num_nodes={engine.num_nodes} nodes: they count "
            "from 0."
        )
    if engine.rendezvous is not None and not re.fullmatch(r"[^\s/]+:\d{1,5}", engine.rendezvous):
        return f"engine.rendezvous={engine.rendezvous} is not HOST:PORT, for instance node0:29500."
    return None


def _optimizer_suits_the_engine(config: RunConfig) -> str | None:
    train = config.train
    if train.optimizer != DEFAULT and config.engine.zero_stage is not None:
        return (
            f"train.optimizer={train.optimizer} is for engine=single: DeepSpeed divides the state of AdamW among the "
            f"ranks, and only that was tried. Set train.optimizer={DEFAULT}."
        )
    optimizer = OPTIMIZERS.get(train.optimizer)
    if optimizer is not None and not optimizer.has_betas and (train.beta1, train.beta2) != (BETA1, BETA2):
        return f"train.beta1 and beta2 have no effect on train.optimizer={train.optimizer}: leave them out."
    return None


def _rows_have_one_order(config: RunConfig) -> str | None:
    if not config.train.group_by_length:
        return None
    if config.train.packing:
        return (
            "train.group_by_length=true has no effect on packed rows: they are all full. Set one of the two to false."
        )
    if config.continual.name == "replay" and not config.continual.replay_shuffle:
        return "train.group_by_length=true changes the order of rows: set continual.replay_shuffle=true."
    return None


def _padding_is_there_to_leave_out(config: RunConfig) -> str | None:
    if not (config.train.padding_free and config.train.packing):
        return None
    return "train.padding_free=true has no effect on packed rows: they are not padded. Set one of the two to false."


def _flash_attention_is_in_bfloat16(config: RunConfig) -> str | None:
    attention = config.model.attention
    if attention not in FLASH_ATTENTION or config.model.dtype in ("bfloat16", AUTO):
        return None
    return f"model.attention={attention} computes in bfloat16 only: set model.dtype=bfloat16, or model.attention=sdpa."


def _batch_is_whole(config: RunConfig) -> str | None:
    train, engine = config.train, config.engine
    rows = train.micro_batch_size * engine.ranks
    if engine.name == AUTO or not rows or train.batch_size % rows == 0:
        return None
    nodes = f" x engine.num_nodes={engine.num_nodes}" if engine.num_nodes > 1 else ""
    return (
        f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size} x "
        f"engine.num_processes={engine.num_processes}{nodes}. Nearest that is: "
        f"{max(1, round(train.batch_size / rows)) * rows}."
    )


RULES: tuple[Rule, ...] = (
    _folders_are_named,
    _suite_is_no_path,
    _paths_are_text,
    _data_are_named,
    *METHOD_RULES,
    _ranks_are_counted,
    _ranks_need_a_zero_stage,
    _offload_needs_its_zero_stage,
    _deepspeed_file_needs_deepspeed,
    _nodes_can_meet,
    _sets_can_be_divided,
    _stages_match_training_sets,
    _optimizer_suits_the_engine,
    _rows_have_one_order,
    _date_is_a_day,
    _padding_is_there_to_leave_out,
    _flash_attention_is_in_bfloat16,
    _batch_is_whole,
    _shares_leave_room,
    _mix_is_of_one_stage,
    _validation_sets_are_known,
    _tasks_are_in_one_folder,
    _test_sets_match_training_sets,
)


def _eval_uses_one_node(config: EvalConfig) -> str | None:
    return "hft eval scores on one node: leave out engine.num_nodes." if config.engine.num_nodes > 1 else None


def _eval_has_models(config: EvalConfig) -> str | None:
    return None if config.models else "models is empty: give after, before or both."


EVAL_RULES: tuple[Rule, ...] = (
    _suite_is_no_path, _date_is_a_day, _ranks_are_counted, _eval_uses_one_node, _eval_has_models,
)  # fmt: skip
