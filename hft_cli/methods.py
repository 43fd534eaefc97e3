"""What each method does: config -> the steps of a run. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from hft_cli.schema import RunConfig, choose, places


@dataclass(frozen=True)
class Step:
    """One round: `number` counts from 1, `stage` is how it trains, `data` and `test` say on which rows."""

    number: int
    name: str
    stage: str
    data: str
    test: str | None

    @property
    def task(self) -> str:
        """What the score on `test` is called in tables."""
        return _label(str(self.test)) if self.stage == "half_reset" else self.name


def steps(config: RunConfig) -> tuple[Step, ...]:
    """The rounds of a run, in order."""
    return METHODS[choose("method.name", config.method.name, METHODS)](config)


def _train(config: RunConfig) -> tuple[Step, ...]:
    data = places(config.data.path)
    stages = config.method.stages * (len(data) if len(config.method.stages) == 1 else 1)
    given = places(config.data.test_path)
    tests = given if len(given) > 1 else (given[0] if given else None,) * len(data)
    return tuple(
        Step(number, name, stage, path, test)
        for number, (name, stage, path, test) in enumerate(zip(_names(data), stages, data, tests, strict=True), start=1)
    )


def _half_reset(config: RunConfig) -> tuple[Step, ...]:
    """One step without training; its data are only those it is scored on."""
    test = next(iter(places(config.data.test_path)), None)
    return (Step(1, "half_reset", "half_reset", str(config.model.base), test),)


def _names(data: tuple[str, ...]) -> list[str]:
    """A round's name is its data's, with a number where two are alike."""
    names = [_label(path) for path in data]
    return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names, start=1)]


def _label(path: str) -> str:
    """The name of some data: the file's, or its folder's where the file is only called train or test."""
    parts = PurePosixPath(path.replace("\\", "/").replace(":", "/"))
    stem = parts.name.split(".")[0]
    name = parts.parent.name if stem in ("train", "test") and parts.parent.name else stem
    return re.sub(r"[^\w-]+", "-", name) or "data"


def stage_config(config: RunConfig, stage: str) -> RunConfig:
    """The config of one round: what a DPO round sets for itself stands in `train`."""
    if stage != "dpo":
        return config
    own: dict[str, Any] = {
        "learning_rate": config.dpo.learning_rate,
        "epochs": config.dpo.epochs,
        "max_steps": config.dpo.max_steps,
        "warmup": config.dpo.warmup,
    }
    train = replace(config.train, **{name: value for name, value in own.items() if value is not None})
    return replace(config, train=train)


# FFT and HFT run the same steps, and so do their DPO: what differs is the selection, which fft and dpo set to `all`.
METHODS: dict[str, Callable[[RunConfig], tuple[Step, ...]]] = {
    "fft": _train,
    "hft": _train,
    "dpo": _train,
    "hft_dpo": _train,
    "half_reset": _half_reset,
}
