"""`hft plan`: what `hft train` would do under a configuration and what that costs, without weights or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import config_from_hub, stored_tensors
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_fields, parameters_from_folder
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import PlanConfig
from hft_cli.config.validate import check
from hft_cli.data.preferences import read_preferences
from hft_cli.data.rows import Source, read_sources
from hft_cli.errors import UserError, choose
from hft_cli.files import read_json
from hft_cli.method.rounds import Phase, draws, phase_config, phases, with_model_limits
from hft_cli.method.selection import Draw, heaviest_draw
from hft_cli.paths import ARCHITECTURES, resolve_path
from hft_cli.plan import costs
from hft_cli.plan.costs import Disk, Flops, Memory, Network, Setup, Shape

# What the engines are: their ZeRO stage, and whether the optimizer and the weights lie in the host's memory.
ENGINES: dict[str, tuple[int | None, bool, bool]] = {
    "single": (None, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero2_offload": (2, True, False),
    "zero3": (3, False, False),
    "zero3_offload": (3, True, True),
}

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    Attributes:
        config: its config.json.
        source: where its shapes were read.
        dtype: of its files, as far as they have one.
        stored: bytes of each parameter in the files.
    """

    config: Mapping[str, Any]
    source: str
    params: tuple[Param, ...]
    shape: Shape
    dtype: str
    stored: Mapping[str, int]


@dataclass(frozen=True)
class Round:
    """One step of the plan. `worst` is the memory under the heaviest draw, `full` that of full fine-tuning,
    `host` what offload takes of the host's.

    `steps` is None where neither the data nor rows=… says; `once` are the FLOPs that a round has before its first step.
    """

    phase: Phase
    draw: Draw
    setup: Setup
    rows: int | None
    steps: int | None
    memory: Memory
    worst: Memory
    full: Memory
    host: float
    flops: Flops
    full_flops: Flops
    once: float
    network: Network
    hours: float | None


@dataclass(frozen=True)
class Fit:
    """The most memory that a GPU needs under the worst draw, with an engine; None where the engine is refused."""

    engine: str
    checkpointing: bool
    bytes: float | None


@dataclass(frozen=True)
class Plan:
    config: PlanConfig
    model: Model
    rounds: tuple[Round, ...]
    worst_elements: int
    disk: Disk
    fits: tuple[Fit, ...]

    @property
    def draws(self) -> bool:
        """Whether there is anything to draw."""
        return self.config.selection.level != "all" and self.config.continual.name != "lora"

    @property
    def heaviest(self) -> Round:
        """The round that needs most memory."""
        return max(self.rounds, key=lambda found: found.worst.total)

    def expected(self) -> dict[str, Any]:
        """The costs for plan.json: bytes of one GPU (without one: of one rank) and of the disk, and FLOPs of a step."""
        return {
            "disk_bytes": {**asdict(self.disk), "total": self.disk.total},
            "rounds": [
                {
                    "name": found.phase.name,
                    "steps": found.steps,
                    "memory_bytes": {**asdict(found.memory), "total": found.memory.total},
                    "memory_bytes_worst_draw": found.worst.total,
                    "memory_bytes_fft": found.full.total,
                    "host_memory_bytes": found.host,
                    "flops_of_a_step": found.flops.total,
                    "flops_of_a_step_fft": found.full_flops.total,
                    "network_bytes_of_a_step": found.network.total,
                }
                for found in self.rounds
            ],
        }


def plan(config: PlanConfig, counted: Mapping[int, int] | None = None) -> Plan:
    """What the configuration would train, and what that costs. `counted` has the rows of steps that are known already.

    Raises:
        UserError: for a mistake that `hft train` would refuse too, a model whose shapes are not known here, or a number
            out of its range.
    """
    check(config)
    model = _model(config)
    config = with_model_limits(config, dict(model.config), config.model.name)
    drawn = draws(config, model.params)
    planned = phases(config)
    trains = planned[0].stage != "half_reset"
    if trains and not drawn[0].updated:
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    rows = {step.number: _rows(step, config) for step in planned if trains} if counted is None else counted
    rounds = tuple(
        _round(config, model, step, chosen, rows.get(step.number)) for step, chosen in zip(planned, drawn, strict=True)
    )
    worst = _worst(config, model, drawn[0]) if trains else drawn[0].updated
    deltas = sum(model.stored[name] for chosen in drawn for name in chosen.updated) * config.method.save_model
    whole = sum(model.stored.values()) * config.method.save_model
    kept = 0.0
    if trains and (config.train.save_every or config.train.save_minutes):
        kept = max(
            costs.checkpoint(*trained(config, model, chosen.updated), found.setup)
            for chosen, found in zip(drawn, rounds, strict=True)
        )
    return Plan(
        config=config,
        model=model,
        rounds=rounds,
        worst_elements=sum(p.elements for p in model.params if p.name in set(worst)),
        # The oldest checkpoint goes when the newest is whole, and the model of the round before when the next one is.
        disk=Disk(deltas, whole * min(len(rounds), 2), kept * (config.train.save_limit + 1)),
        fits=tuple(_fits(config, model, planned)) if trains else (),
    )


def _model(config: PlanConfig) -> Model:
    """The model's shapes: of its folder if it is here, else of model.architecture, else of the hub's config.json.

    Raises:
        UserError: if none of them is there.
    """
    path, asked, kinds = config.model.path, config.model.architecture, config.model.kinds
    folder = Path(resolve_path(path))
    if folder.is_dir() and list(folder.glob("*.safetensors")):
        read = read_json(folder / "config.json")
        files = stored_tensors(folder)
        params = parameters_from_folder(folder, kinds)
        infos = {p.name: [files[name] for name in p.stored] for p in params}
        dtypes = {info.dtype for own in infos.values() for info in own}
        named = "mixed dtypes" if len(dtypes) > 1 else dtypes.pop()
        stored = {name: sum(info.size for info in own) for name, own in infos.items()}
        return Model(read, f"the files in {path}", params, costs.shape(_text(read), params), named, stored)
    if asked is None:
        file = folder / "config.json" if folder.is_dir() else config_from_hub(path)
    elif Path(asked).suffix == ".json" or "/" in asked:
        file = Path(asked).expanduser()
    else:
        choose("model.architecture", asked, sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        file = ARCHITECTURES / f"{asked}.json"
    read = read_json(file)
    found = parameters_from_fields(read, kinds)
    params = parameters_from_config(file, kinds) if found is None else found
    dtype = str(read.get("dtype") or read.get("torch_dtype") or config.model.dtype)
    stored = {p.name: p.elements * WIDTHS.get(dtype, 4) for p in params}
    return Model(read, f"{file.name} (no weights)", params, costs.shape(_text(read), params), dtype, stored)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is the text model's."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _setup(config: PlanConfig, step: Phase, width: int) -> Setup:
    """How a step trains. `config` is the step's own, `width` the model's hidden size."""
    train, engine = config.train, config.engine
    # What transformers takes where nothing is asked for.
    attention = config.model.attention or "sdpa"
    zero = deepspeed_settings(config).get("zero_optimization", {})
    return Setup(
        zero_stage=engine.zero_stage,
        ranks=engine.ranks,
        dtype=config.model.dtype,
        rows=train.micro_batch_size,
        length=int(train.max_length or 0),
        accumulation=train.batch_size // (train.micro_batch_size * engine.ranks),
        attention=attention,
        checkpointing=train.gradient_checkpointing,
        stage=step.stage,
        reference=config.dpo.reference,
        tasks=len(step.memories),
        memory_rows=config.continual.gem_memory,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        bucket=_elements(zero, "reduce_bucket_size", costs.BUCKET, width**2),
        live=_elements(zero, "stage3_max_live_parameters", costs.LIVE, costs.LIVE),
        sub_group=_elements(zero, "sub_group_size", costs.SUB_GROUP, costs.SUB_GROUP),
        persistent=_elements(zero, "stage3_param_persistence_threshold", costs.PERSISTENT, 10 * width),
    )


def _elements(zero: Mapping[str, Any], key: str, default: int, auto: int) -> int:
    """A setting of DeepSpeed's; for "auto" transformers takes the hidden size times ten, or squared."""
    value = zero.get(key, default)
    return auto if value == "auto" else int(value)


def trained(config: PlanConfig, model: Model, updated: Iterable[str]) -> tuple[tuple[Param, ...], frozenset[str]]:
    """All parameters in memory, and the names of those that are trained: of LoRA the adapters."""
    names = frozenset(updated)
    if config.continual.name != "lora":
        return model.params, names
    added = costs.adapters(model.params, names, config.continual.lora_rank)
    return model.params + added, frozenset(p.name for p in added)


def _worst(config: PlanConfig, model: Model, chosen: Draw) -> tuple[str, ...]:
    """Names of the heaviest draw; LoRA has one only."""
    return chosen.updated if config.continual.name == "lora" else heaviest_draw(model.params, config.selection)


def _worst_memory(config: PlanConfig, model: Model, chosen: Draw, setup: Setup) -> Memory:
    """Part by part at least what any draw needs: most elements, and all inputs of matrices saved."""
    params, names = trained(config, model, _worst(config, model, chosen))
    most = costs.memory(params, names, model.shape, setup)
    # Which inputs are saved hangs on more than the number of elements, so all that are trained in some draw count.
    every = names if config.continual.name == "lora" else frozenset(p.name for p in params)
    bound = replace(most, activations=costs.activations(params, every, model.shape, setup))
    return bound.at_least(costs.memory(*trained(config, model, chosen.updated), model.shape, setup))


def _round(config: PlanConfig, model: Model, step: Phase, chosen: Draw, rows: int | None) -> Round:
    own: PlanConfig = phase_config(config, step)
    setup = _setup(own, step, model.shape.hidden)
    params, names = trained(config, model, chosen.updated)
    everything = frozenset(p.name for p in model.params)
    if step.stage == "half_reset":
        none = Memory()
        return Round(
            step, chosen, setup, rows, 0, none, none, none, 0, Flops(0, 0, 0), Flops(0, 0, 0), 0, Network(), None
        )
    tokens = setup.length if own.train.packing else min(config.row_tokens or setup.length, setup.length)
    needed = costs.flops(params, names, model.shape, setup, own.train.batch_size, tokens)
    count = _steps(own, rows, config.row_tokens)
    once = 0.0
    if step.stage == "dpo" and config.dpo.reference == "precomputed" and rows is not None:
        once = costs.flops(params, names, model.shape, setup, rows, tokens).forward
    time = None
    if config.tflops is not None and count is not None:
        time = costs.hours(needed.total * count + once, setup.ranks, config.tflops, config.utilization)
    return Round(
        phase=step,
        draw=chosen,
        setup=setup,
        rows=rows,
        steps=count,
        memory=costs.memory(params, names, model.shape, setup),
        worst=_worst_memory(config, model, chosen, setup),
        full=costs.memory(model.params, everything, model.shape, setup),
        host=costs.host(params, names, setup),
        flops=needed,
        full_flops=costs.flops(model.params, everything, model.shape, setup, own.train.batch_size, tokens),
        once=once,
        network=costs.network(params, names, model.shape, setup),
        hours=time,
    )


def _rows(step: Phase, config: PlanConfig) -> int | None:
    """Rows that a step trains on: counted where the data are here, else from rows=…; None if neither says."""
    total = 0
    for source in step.sources:
        here = Path(resolve_path(source.path)).exists()
        if here and step.stage == "dpo":
            read = read_preferences(
                resolve_path(source.path), split=source.split, max_rows=config.data.max_rows, ties=config.dpo.ties
            )
            total += len(read.rows)
        elif here:
            total += len(read_sources([source], config.data, config.seed))
        elif config.rows is None or source.general:
            return None
        else:
            total += _share(source, min(config.rows, config.data.max_rows or config.rows))
    return total


def _share(source: Source, rows: int) -> int:
    """As read_sources takes them."""
    return min(max(round(source.share * rows) if source.rows is None else source.rows, 1), rows)


def _steps(config: PlanConfig, rows: int | None, row_tokens: int | None) -> int | None:
    """Optimizer steps of a round, as the trainer counts them. Packed rows are taken as full unless row_tokens says."""
    train = config.train
    if train.max_steps:
        return train.max_steps
    if rows is None:
        return None
    if train.packing and row_tokens and train.max_length:
        rows = ceil(rows * min(row_tokens, train.max_length) / train.max_length)
    processes = config.engine.ranks
    batches = ceil(rows / (train.micro_batch_size * processes))
    a_pass = max(ceil(batches * train.micro_batch_size * processes / train.batch_size), 1)
    return ceil(float(train.epochs) * a_pass)


def _fits(config: PlanConfig, model: Model, planned: Sequence[Phase]) -> Iterable[Fit]:
    """What each engine needs, with and without checkpointing, in the heaviest round under the worst draw."""
    drawn = draws(config, model.params)
    for name, (stage, optimizer, parameters) in ENGINES.items():
        engine = replace(
            config.engine,
            name=name,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            deepspeed=None,
        )
        engine = replace(engine, num_processes=1, num_nodes=1, node_rank=None) if stage is None else engine
        for checkpointing in (False, True):
            train = replace(config.train, gradient_checkpointing=checkpointing)
            other = replace(config, engine=engine, train=train)
            try:
                check(other)
            except UserError:
                yield Fit(name, checkpointing, None)
                continue
            setups = [_setup(phase_config(other, step), step, model.shape.hidden) for step in planned]
            found = [
                _worst_memory(other, model, chosen, setup).total for chosen, setup in zip(drawn, setups, strict=True)
            ]
            yield Fit(name, checkpointing, max(found))
