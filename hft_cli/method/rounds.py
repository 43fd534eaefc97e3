"""The phases of a run: what each method trains, in which order. Standard library only.

To add a method, write one function and add one row to METHODS at the foot of this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.checkpoint.naming import Param
from hft_cli.config.data_sets import as_paths, count_rounds, mixed_sets, test_sets, training_sets, value_for_task
from hft_cli.config.schema import DataConfig, RunConfig
from hft_cli.config.settings import FORCED_METRICS, WITHOUT_TRAINING
from hft_cli.config.training import TrainConfig
from hft_cli.data.files import ANY_HUB, Hub
from hft_cli.data.sources import Source, ValidationSet
from hft_cli.errors import UserError, choose
from hft_cli.method.selection import Draw, Importance, draw, lora_draw, union_draw

AnyRun = TypeVar("AnyRun", bound=RunConfig)

# Model types whose attention was seen to keep packed rows apart, with sdpa and eager: its masks follow the position ids
# of each row. State spaces, ALiBi (BLOOM, MPT) and learned positions of some types (OPT) do not.
PACKABLE = (
    "apertus", "arcee", "aria_text", "axk1", "beam", "bitnet", "codegen", "cohere", "cohere2", "cohere2_moe",
    "cohere_compass_text", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text",
    "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama", "llama4_text", "mellum",
    "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
)  # fmt: skip


INTERPOLATION = "interpolate"  # stage and name of a phase that puts tensors a part of the way back


@dataclass(frozen=True)
class Phase:
    """One training of a run, or one Half-Reset or interpolation.

    Attributes:
        number: position in the run, from 1.
        round: number of the draw, from 1. A replay has the round of the task before it.
        name: label in tables and in the name of its directory.
        stage: how it trains, "sft" or "dpo", or one of WITHOUT_TRAINING.
        sources: the training rows; without training the base model, empty for that of the run.
        test: the rows that the model is scored on afterwards.
        metric: the metric of that score.
        epochs: passes over the training rows, unless train.max_steps is set.
        memories: the rows of past tasks that GEM keeps.
        replays: whether it trains on rows of past tasks.
        validation: the rows whose loss is measured while it trains.
        set_part: which of the `set_parts` parts of the training on its set it is, from 1: data.rounds_per_set.
        set_name: the name of its set, where that of the phase has the part too.
    """

    number: int
    round: int
    name: str
    stage: str
    sources: tuple[Source, ...]
    test: str | None = None
    metric: str = "exact_match"
    epochs: float | None = None
    memories: tuple[Source, ...] = ()
    replays: bool = False
    validation: ValidationSet | None = None
    set_part: int = 1
    set_parts: int = 1
    set_name: str = ""

    @property
    def trains(self) -> bool:
        """Whether it trains, and not only computes with files."""
        return self.stage not in WITHOUT_TRAINING

    @property
    def ends_set(self) -> bool:
        """Whether the training on its set is complete after it, so that the model is scored."""
        return self.set_part == self.set_parts

    def steps_of_set(self, train: TrainConfig, rows: int) -> range:
        """Which optimizer steps of the training on its set of `rows` rows it takes, counted from 0.

        With data.rounds_per_set the last batch of an epoch goes on with the rows of the next one.
        """
        steps = math.ceil(rows_read(train, rows) / train.batch_size)
        return range(steps * (self.set_part - 1) // self.set_parts, steps * self.set_part // self.set_parts)

    @property
    def data(self) -> str:
        """The paths of its sources, as text."""
        return ", ".join(source.path for source in self.sources)

    @property
    def test_hub(self) -> Hub:
        """Subset and revision of the test rows: those of the training rows, if both are in one data set."""
        own = self.sources[0] if self.sources and self.sources[0].path == self.test else None
        return Hub(own.subset, own.revision) if own else ANY_HUB

    @property
    def task(self) -> str:
        """The name of its score in tables."""
        return (self.set_name or self.name) if self.trains else _label(str(self.test))


def rows_read(train: TrainConfig, rows: int) -> int:
    """How many rows a training on `rows` rows reads, over all epochs."""
    return train.max_steps * train.batch_size if train.max_steps else round(float(train.epochs) * rows)


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    return METHODS[choose("method.name", config.method.name, METHODS)](config)


def draws(config: RunConfig, params: Sequence[Param], importance: Importance | None = None) -> tuple[Draw, ...]:
    """The draw of each phase. LoRA adapts the same matrices in all rounds.

    Args:
        importance: for selection=importance, of the matrices of the base; without it the largest matrices are taken.

    Raises:
        UserError: if the model cannot satisfy the selection.
    """
    seed = config.seed if config.selection.seed is None else config.selection.seed
    drawn: list[Draw] = []
    for phase in phases(config):
        if config.method.trains and not phase.trains:
            drawn.append(union_draw(params, drawn))
        elif config.method.name == "lora":
            drawn.append(lora_draw(params, config.selection, phase.round, seed))
        else:
            drawn.append(draw(params, config.selection, phase.round, seed, importance))
    return tuple(drawn)


def phase_config(config: AnyRun, phase: Phase) -> AnyRun:
    """The configuration of one phase: `train` with the values that a DPO round, a task or a replay has of its own."""
    values: dict[str, Any] = {"epochs": phase.epochs}
    if phase.stage == "dpo":
        values = {
            "learning_rate": config.dpo.learning_rate,
            "epochs": phase.epochs if config.dpo.epochs is None else config.dpo.epochs,
            "max_steps": config.dpo.max_steps,
            "warmup": config.dpo.warmup,
        }
    train = replace(config.train, **{name: value for name, value in values.items() if value is not None})
    return replace(config, train=replace(train, max_steps=None) if phase.replays else train)


def with_model_limits(config: AnyRun, model: dict[str, Any], name: str) -> AnyRun:
    """The configuration with train.max_length set for the model with config.json `model`, called `name` in errors.

    Raises:
        UserError: if the model has too few positions, or rows cannot be kept apart in one sequence of it.
    """
    model = model.get("text_config") or model
    positions, model_type = max_positions(model), model.get("model_type")
    train, answer_tokens = config.train, config.generation.max_new_tokens
    if positions and train.max_length and train.max_length > positions:
        raise UserError(
            f"train.max_length={train.max_length} is more than the {positions} positions of {name}. "
            f"Set train.max_length={positions} or less."
        )
    joins = "packing" if train.packing else "padding_free" if train.padding_free else None
    if joins and model_type not in PACKABLE:
        raise UserError(
            f"train.{joins}=true is supported for model types whose packed rows do not see each other (Llama, Qwen, "
            f"Gemma, …: hft_cli/method/README.md); {name} is of type {model_type!r}, which is none of them. Set "
            f"train.{joins}=false."
        )
    if train.router_aux_loss and "router_aux_loss_coef" not in model:
        raise UserError(
            f"train.router_aux_loss={train.router_aux_loss} is for mixtures of experts; {name} has no "
            "router_aux_loss_coef in its config.json. Set train.router_aux_loss=0."
        )
    generates = any(phase.test and phase.metric not in FORCED_METRICS for phase in phases(config))
    if positions and generates and answer_tokens >= positions - 1:
        raise UserError(
            f"generation.max_new_tokens={answer_tokens} leaves no room for a prompt in the {positions} positions of "
            f"{name}. Set generation.max_new_tokens={positions // 2} or less."
        )
    max_length = train.max_length or min(positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    return replace(config, train=replace(train, max_length=max_length))


def _training_phases(config: RunConfig) -> tuple[Phase, ...]:
    """One phase for each training set with the sets of data.mix, and after it a replay if `continual` asks for one."""
    data, continual = config.data, config.continual
    paths, tests, rounds = training_sets(data), test_sets(data), count_rounds(data)
    stages = config.method.stages * (rounds if len(config.method.stages) == 1 else 1)
    tests = tests if len(tests) > 1 else (tests * rounds)
    names = _round_names(paths) or ["mix"] * rounds
    tasks = data.tasks or names
    sources = [_source(data, path, task) for path, task in zip(paths, tasks, strict=False)]
    mix = tuple(Source(**vars(mixed)) for mixed in mixed_sets(data))
    run: list[Phase] = []
    for index, (name, stage, task) in enumerate(zip(names, stages, tasks, strict=True)):
        past = sources[:index]
        phase = Phase(
            number=len(run) + 1,
            round=index * data.rounds_per_set + 1,
            name=name,
            stage=stage,
            sources=(*sources[index : index + 1], *mix, *_mixed_replay(config, past)),
            test=tests[index] if tests else None,
            metric=value_for_task("data.metric", data.metric, task),
            epochs=value_for_task("train.epochs", config.train.epochs, task),
            validation=_validation(data, index, sources[index : index + 1]),
        )
        if continual.name == "gem":
            phase = replace(phase, memories=tuple(replace(source, at_most=continual.gem_memory) for source in past))
        run += _in_parts(phase, data.rounds_per_set)
        phase = run[-1]
        if continual.name == "replay" and (replayed := _replayed(config, past)):
            replay = replace(phase, number=phase.number + 1, name=f"{name}-replay", sources=replayed, replays=True)
            replay = replace(replay, validation=None, set_part=1, set_parts=1, set_name="")
            run.append(replace(replay, epochs=continual.replay_epochs))
    if config.method.alpha is not None:  # what all rounds have changed goes a part of the way back
        run.append(Phase(len(run) + 1, run[-1].round, INTERPOLATION, INTERPOLATION, ()))
    return tuple(run)


def _in_parts(phase: Phase, parts: int) -> list[Phase]:
    """The parts of the training on a set, each a round. The model is scored after the last one."""
    if parts == 1:
        return [phase]
    return [
        replace(
            phase,
            number=phase.number + index,
            round=phase.round + index,
            name=f"{phase.name}-{index + 1}of{parts}",
            set_name=phase.name,
            test=phase.test if index + 1 == parts else None,
            set_part=index + 1,
            set_parts=parts,
        )
        for index in range(parts)
    ]


def _replayed(config: RunConfig, past: Iterable[Source]) -> tuple[Source, ...]:
    """The rows of a replay: a share of each past task, and the general set."""
    return (*(replace(source, fraction=config.continual.replay_ratio) for source in past), *_general(config))


def _mixed_replay(config: RunConfig, past: Iterable[Source]) -> tuple[Source, ...]:
    """What `continual=mixed_replay` adds to a round: equal shares of each past task and the general set."""
    replayed = (*past, *_general(config))
    if config.continual.name != "mixed_replay":
        return ()
    return tuple(replace(source, share=config.continual.replay_share / len(replayed)) for source in replayed)


def _general(config: RunConfig) -> tuple[Source, ...]:
    """The set of general instructions that replays include."""
    return () if config.continual.replay_general is None else (Source(config.continual.replay_general),)


def _validation(data: DataConfig, index: int, own: Sequence[Source]) -> ValidationSet | None:
    """The validation rows of a round, which are read like its own."""
    sets = as_paths(data.validation)
    value = sets[index] if len(sets) > 1 else next(iter(sets), None)
    if value is None or isinstance(value, float):
        return value
    like = own[0] if own else Source("")
    hub = (like.subset, like.revision) if like.path == value else (None, None)
    return Source(value, data.validation_split, *hub, data.format, None, data.columns, data.roles)


def _source(data: DataConfig, path: str, task: str) -> Source:
    split, subset, revision = (
        value_for_task(f"data.{name}", getattr(data, name), task) for name in ("split", "subset", "revision")
    )
    return Source(path, split, subset, revision, data.format, data.max_rows, data.columns, data.roles)


def _phase_without_training(config: RunConfig) -> tuple[Phase, ...]:
    """One phase without training. Its only data are the rows that the model is scored on."""
    test = next(iter(as_paths(config.data.test_path)), None)
    metric = value_for_task("data.metric", config.data.metric, _label(str(test)))
    return (Phase(1, 1, config.method.name, config.method.name, (Source(str(config.model.base)),), test, metric),)


def _round_names(paths: tuple[str, ...]) -> list[str]:
    """The labels of the training sets, with a number where two are the same."""
    names = [_label(path) for path in paths]
    while len(set(names)) < len(names):
        names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return names


def _label(path: str) -> str:
    """The name of a data set: that of its file, or of its folder if the file is only called train or test."""
    parts = PurePosixPath(path.replace("\\", "/").replace(":", "/"))
    stem = parts.name.split(".")[0]
    name = parts.parent.name if stem in ("train", "test") and parts.parent.name else stem
    return re.sub(r"[^\w-]+", "-", name) or "data"


# method.name -> config -> its phases. FFT and HFT have the same phases, and so have their DPO variants: they differ in
# the selection, which fft and dpo set to `all`.
METHODS: dict[str, Callable[[RunConfig], tuple[Phase, ...]]] = {
    "fft": _training_phases,
    "hft": _training_phases,
    "lora": _training_phases,
    "dpo": _training_phases,
    "hft_dpo": _training_phases,
    "half_reset": _phase_without_training,
    "interpolate": _phase_without_training,
}
