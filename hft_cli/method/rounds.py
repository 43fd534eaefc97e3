"""The phases of a run: what each method trains, in which order. Standard library only.

To add a method, write one function and add one row to METHODS at the foot of this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from hft_cli.checkpoint.architectures import DEFAULT_MAX_LENGTH, max_positions
from hft_cli.checkpoint.naming import Param
from hft_cli.config.data_sets import as_paths, test_sets, training_sets, value_for_task
from hft_cli.config.schema import RunConfig
from hft_cli.data.rows import Source
from hft_cli.errors import UserError, choose
from hft_cli.method.selection import Draw, draw, lora_draw

AnyRun = TypeVar("AnyRun", bound=RunConfig)

# Model types whose attention was seen to keep packed rows apart: its masks follow the position ids of each row.
PACKABLE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3")


@dataclass(frozen=True)
class Phase:
    """One training of a run, or one Half-Reset.

    Attributes:
        number: position in the run, from 1.
        round: number of the draw, from 1. A replay has the round of the task before it.
        name: label in tables and in the name of its directory.
        stage: how it trains, "sft" or "dpo", or "half_reset".
        sources: the training rows; of a Half-Reset the base model.
        test: the rows that the model is scored on afterwards.
        metric: the metric of that score.
        epochs: passes over the training rows, unless train.max_steps is set.
        memories: the rows of past tasks that GEM keeps.
        replays: whether it trains on rows of past tasks.
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

    @property
    def data(self) -> str:
        """The paths of its sources, as text."""
        return ", ".join(source.path for source in self.sources)

    @property
    def task(self) -> str:
        """The name of its score in tables."""
        return _label(str(self.test)) if self.stage == "half_reset" else self.name


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    return METHODS[choose("method.name", config.method.name, METHODS)](config)


def draws(config: RunConfig, params: Sequence[Param]) -> tuple[Draw, ...]:
    """The draw of each phase. LoRA adapts the same matrices in all rounds.

    Raises:
        UserError: if the model cannot satisfy the selection.
    """
    seed = config.seed if config.selection.seed is None else config.selection.seed
    strategy = lora_draw if config.continual.name == "lora" else draw
    return tuple(strategy(params, config.selection, phase.round, seed) for phase in phases(config))


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
        UserError: if the model has too few positions, or packing is not supported for it.
    """
    model = model.get("text_config") or model
    positions, model_type = max_positions(model), model.get("model_type")
    train, answer_tokens = config.train, config.generation.max_new_tokens
    if positions and train.max_length and train.max_length > positions:
        raise UserError(
            f"train.max_length={train.max_length} is more than the {positions} positions of {name}. "
            f"Set train.max_length={positions} or less."
        )
    if train.packing and model_type not in PACKABLE:
        raise UserError(
            f"train.packing=true is supported for the model types {', '.join(PACKABLE)}; {name} is of type "
            f"{model_type!r}, whose packed rows might see each other. Set train.packing=false."
        )
    generates = any(phase.test and phase.metric != "exact_match" for phase in phases(config))
    if positions and generates and answer_tokens >= positions - 1:
        raise UserError(
            f"generation.max_new_tokens={answer_tokens} leaves no room for a prompt in the {positions} positions of "
            f"{name}. Set generation.max_new_tokens={positions // 2} or less."
        )
    max_length = train.max_length or min(positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    return replace(config, train=replace(train, max_length=max_length))


def _training_phases(config: RunConfig) -> tuple[Phase, ...]:
    """One phase for each training set, and after it a replay where `continual` asks for one."""
    data, continual = config.data, config.continual
    paths, tests = training_sets(data), test_sets(data)
    stages = config.method.stages * (len(paths) if len(config.method.stages) == 1 else 1)
    tests = tests if len(tests) > 1 else (tests * len(paths))
    names = _round_names(paths)
    tasks = data.tasks or names
    sources = [
        Source(path, split=value_for_task("data.split", data.split, task))
        for path, task in zip(paths, tasks, strict=True)
    ]
    run: list[Phase] = []
    for index, (name, stage, task) in enumerate(zip(names, stages, tasks, strict=True)):
        past = sources[:index]
        phase = Phase(
            number=len(run) + 1,
            round=index + 1,
            name=name,
            stage=stage,
            sources=(sources[index],),
            test=tests[index] if tests else None,
            metric=value_for_task("data.metric", data.metric, task),
            epochs=value_for_task("train.epochs", config.train.epochs, task),
        )
        if continual.name == "gem":
            phase = replace(phase, memories=tuple(replace(source, rows=continual.gem_memory) for source in past))
        run.append(phase)
        if continual.name == "replay" and (replayed := _replayed(config, past)):
            replay = replace(phase, number=phase.number + 1, name=f"{name}-replay", sources=replayed, replays=True)
            run.append(replace(replay, epochs=continual.replay_epochs))
    return tuple(run)


def _replayed(config: RunConfig, past: Iterable[Source]) -> tuple[Source, ...]:
    """The rows of a replay: a share of each past task, and the general set."""
    continual = config.continual
    sources = tuple(replace(source, share=continual.replay_ratio) for source in past)
    return sources if continual.replay_general is None else (*sources, Source(continual.replay_general, general=True))


def _half_reset_phases(config: RunConfig) -> tuple[Phase, ...]:
    """One phase without training. Its only data are the rows that the model is scored on."""
    test = next(iter(as_paths(config.data.test_path)), None)
    metric = value_for_task("data.metric", config.data.metric, _label(str(test)))
    return (Phase(1, 1, "half_reset", "half_reset", (Source(str(config.model.base)),), test, metric),)


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
    "dpo": _training_phases,
    "hft_dpo": _training_phases,
    "half_reset": _half_reset_phases,
}
