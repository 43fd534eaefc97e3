"""What a worker is told: job files, written by the parent and read by the worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.config.schema import GenerationConfig, ModelConfig, ProbeConfig, RunConfig
from hft_cli.data.rows import Source
from hft_cli.files import from_dict, read_json, write_json
from hft_cli.method.rounds import Phase


@dataclass(frozen=True)
class PhaseJob:
    """All that a training worker is told. `model` is the folder of the round's start, `metrics` the run's log.

    `adapter` is the folder of the LoRA adapters to go on from, `base_sha256` the hash of the weights that the run began
    with, `deepspeed` its settings, empty without it.
    """

    config: RunConfig
    phase: Phase
    model: str
    metrics: str
    updated: tuple[str, ...]
    frozen: tuple[str, ...]
    adapter: str | None = None
    base_sha256: str = ""
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> PhaseJob:
        values = read_json(path)
        config, step = from_dict(RunConfig, values.pop("config")), values.pop("phase")
        for key in ("sources", "memories"):
            step[key] = tuple(Source(**source) for source in step[key])
        updated, frozen = (tuple(values.pop(key)) for key in ("updated", "frozen"))
        return cls(config=config, phase=Phase(**step), updated=updated, frozen=frozen, **values)


@dataclass(frozen=True)
class RowsTask:
    """A set of rows that a model is scored on, and how."""

    path: str
    metric: str = "exact_match"
    format: str = "auto"


@dataclass(frozen=True)
class RowsJob:
    """What an evaluation worker is told. `tasks`: suite -> task -> its rows and metric.

    `reset` names parameters that, in memory only, are put back to the model at `base`: a Half-Reset without its files.
    """

    model: ModelConfig
    path: str
    tasks: dict[str, dict[str, RowsTask]]
    batch_size: int
    generation: GenerationConfig
    seed: int
    base: str | None = None
    reset: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> RowsJob:
        values = read_json(path)
        model = from_dict(ModelConfig, values.pop("model"))
        generation = from_dict(GenerationConfig, values.pop("generation"))
        tasks = {
            suite: {name: RowsTask(**task) for name, task in own.items()} for suite, own in values.pop("tasks").items()
        }
        return cls(model=model, generation=generation, tasks=tasks, **values)


@dataclass(frozen=True)
class ProbeJob:
    """What a worker is told. `outs`: probe -> file of scores; the items go beside it. `limit`: facts a relation."""

    model: ModelConfig
    path: str
    probes: dict[str, ProbeConfig]
    outs: dict[str, str]
    limit: int | None
    chat: bool
    batch_size: int
    seed: int

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ProbeJob:
        values = read_json(path)
        probes = {name: ProbeConfig(**own) for name, own in values.pop("probes").items()}
        return cls(model=from_dict(ModelConfig, values.pop("model")), probes=probes, **values)


@dataclass(frozen=True)
class HarnessTask:
    """One benchmark to score. `settings` is null for a task that goes by the harness's name; `out`: file of scores.

    The items go into a file beside `out`, with .jsonl for .json.
    """

    name: str
    settings: dict[str, Any] | None
    limit: int | None
    chat: bool
    out: str


@dataclass(frozen=True)
class HarnessJob:
    """What a worker is told. `path`: the model's folder; `data_dir`: the local files, null takes the hub's."""

    model: ModelConfig
    path: str
    todo: tuple[HarnessTask, ...]
    data_dir: str | None
    batch_size: int
    seed: int

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> HarnessJob:
        values = read_json(path)
        todo = tuple(HarnessTask(**one) for one in values.pop("todo"))
        return cls(model=from_dict(ModelConfig, values.pop("model")), todo=todo, **values)
