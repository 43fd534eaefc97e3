"""What each method does: config -> the steps of a run. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import MOST_TOKENS, max_positions
from hft_cli.config.data_sets import as_paths, test_sets, training_sets, value_for_task
from hft_cli.config.schema import RunConfig
from hft_cli.data.rows import Source
from hft_cli.errors import UserError, choose
from hft_cli.method.selection import Draw, draw, lora_draw

AnyRun = TypeVar("AnyRun", bound=RunConfig)

# Whose packed rows were seen not to see each other (their masks heed where each row's positions begin).
PACKABLE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3")


@dataclass(frozen=True)
class Phase:
    """One training, or one Half-Reset. `number` counts from 1; `round` is that of the draw, which a replay shares.

    `stage` is how it trains, on the rows of `sources` (of a Half-Reset: the base), for so many `epochs` unless
    train.max_steps is set. `test` holds the rows that the round is scored on, by `metric`. `memories` are GEM's past
    tasks.
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
        return ", ".join(source.path for source in self.sources)

    @property
    def task(self) -> str:
        """What the score on `test` is called in tables."""
        return _label(str(self.test)) if self.stage == "half_reset" else self.name


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The steps of a run, in order."""
    return METHODS[choose("method.name", config.method.name, METHODS)](config)


def draws(config: RunConfig, params: Sequence[Param]) -> tuple[Draw, ...]:
    """What each step updates. LoRA adapts the same matrices in each round.

    Raises:
        UserError: if the selection cannot be met on this model.
    """
    seed = config.seed if config.selection.seed is None else config.selection.seed
    if config.continual.name == "lora":
        return tuple(lora_draw(params, config.selection, step.round, seed) for step in phases(config))
    return tuple(draw(params, config.selection, step.round, seed) for step in phases(config))


def with_model_limits(config: AnyRun, model: dict[str, Any], name: str) -> AnyRun:
    """The config with what hangs on the model filled in: `model` is its config.json, `name` what errors call it.

    Raises:
        UserError: for what the model's own config rules out.
    """
    model = model.get("text_config") or model
    longest = max_positions(model)
    asked = config.train.max_length
    if longest and asked and asked > longest:
        raise UserError(
            f"train.max_length={asked} is more than the {longest} positions of {name}. "
            f"Set train.max_length={longest} or less."
        )
    if config.train.packing and model.get("model_type") not in PACKABLE:
        raise UserError(
            f"train.packing=true is not known to keep rows apart for model type {model.get('model_type')!r}; it is for "
            f"{', '.join(PACKABLE)}. Set train.packing=false."
        )
    answers = config.generation.max_new_tokens
    if (
        longest
        and answers >= longest - 1
        and any(step.test and step.metric != "exact_match" for step in phases(config))
    ):
        raise UserError(
            f"generation.max_new_tokens={answers} leaves no room for a prompt in the {longest} positions of "
            f"{name}. Set generation.max_new_tokens={longest // 2} or less."
        )
    return replace(config, train=replace(config.train, max_length=asked or min(longest or MOST_TOKENS, MOST_TOKENS)))


def _train(config: RunConfig) -> tuple[Phase, ...]:
    data, continual = config.data, config.continual
    sets, tests = training_sets(data), test_sets(data)
    stages = config.method.stages * (len(sets) if len(config.method.stages) == 1 else 1)
    tests = tests if len(tests) > 1 else (tests * len(sets))
    names = _names(sets)
    tasks = data.tasks or names
    sources = [
        Source(path, split=value_for_task("data.split", data.split, task))
        for path, task in zip(sets, tasks, strict=True)
    ]
    made: list[Phase] = []
    for index, (name, stage, task) in enumerate(zip(names, stages, tasks, strict=True)):
        number = len(made) + 1
        made.append(
            Phase(
                number=number,
                round=index + 1,
                name=name,
                stage=stage,
                sources=(sources[index],),
                test=tests[index] if tests else None,
                metric=value_for_task("data.metric", data.metric, task),
                epochs=value_for_task("train.epochs", config.train.epochs, task),
                memories=tuple(replace(past, rows=continual.gem_memory) for past in sources[:index])
                if continual.name == "gem"
                else (),
            )
        )
        replayed = tuple(replace(past, share=continual.replay_ratio) for past in sources[:index])
        if continual.replay_general is not None:
            replayed += (Source(continual.replay_general, general=True),)
        if continual.name == "replay" and replayed:
            first = made[-1]
            made.append(
                replace(
                    first,
                    number=number + 1,
                    name=f"{name}-replay",
                    sources=replayed,
                    epochs=continual.replay_epochs,
                    replays=True,
                )
            )
    return tuple(made)


def _half_reset(config: RunConfig) -> tuple[Phase, ...]:
    """One step without training; its data are only those it is scored on."""
    test = next(iter(as_paths(config.data.test_path)), None)
    metric = value_for_task("data.metric", config.data.metric, _label(str(test)))
    return (Phase(1, 1, "half_reset", "half_reset", (Source(str(config.model.base)),), test, metric),)


def _names(data: tuple[str, ...]) -> list[str]:
    """A round's name is its data's, with a number where two are alike."""
    names = [_label(path) for path in data]
    while len(set(names)) < len(names):
        names = [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]
    return names


def _label(path: str) -> str:
    """The name of some data: the file's, or its folder's where the file is only called train or test."""
    parts = PurePosixPath(path.replace("\\", "/").replace(":", "/"))
    stem = parts.name.split(".")[0]
    name = parts.parent.name if stem in ("train", "test") and parts.parent.name else stem
    return re.sub(r"[^\w-]+", "-", name) or "data"


def phase_config(config: AnyRun, step: Phase) -> AnyRun:
    """The config of one step: what a DPO round, a task or a replay sets for itself stands in `train`."""
    own: dict[str, Any] = {"epochs": step.epochs}
    if step.stage == "dpo":
        own = {
            "learning_rate": config.dpo.learning_rate,
            "epochs": step.epochs if config.dpo.epochs is None else config.dpo.epochs,
            "max_steps": config.dpo.max_steps,
            "warmup": config.dpo.warmup,
        }
    train = replace(config.train, **{name: value for name, value in own.items() if value is not None})
    return replace(config, train=replace(train, max_steps=None) if step.replays else train)


# FFT and HFT run the same steps, and so do their DPO: what differs is the selection, which fft and dpo set to `all`.
METHODS: dict[str, Callable[[RunConfig], tuple[Phase, ...]]] = {
    "fft": _train,
    "hft": _train,
    "dpo": _train,
    "hft_dpo": _train,
    "half_reset": _half_reset,
}
