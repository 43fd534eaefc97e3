"""`hft plan`: what `hft train` would do under a configuration and what that costs, without weights or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from hft_cli.config.conf import options_of
from hft_cli.config.deepspeed import deepspeed_settings
from hft_cli.config.schema import EngineConfig, PlanConfig, RunConfig
from hft_cli.config.settings import AUTO, FLASH_ATTENTION, REQUIRED
from hft_cli.config.validate import check
from hft_cli.data.mixing import read_mixed, read_source
from hft_cli.data.sources import row_counts
from hft_cli.errors import UserError
from hft_cli.method.rounds import Phase, draws, phase_config, phases, with_model_limits
from hft_cli.method.selection import UNDRAWN, Draw, heaviest_draw
from hft_cli.paths import expanded, resolve_path
from hft_cli.plan.compat import MAX_LIVE, PERSISTENT, REDUCE_BUCKET, SUB_GROUP
from hft_cli.plan.flops import Flops, flops, hours
from hft_cli.plan.memory import Memory, activations, host_memory, memory
from hft_cli.plan.model import Model, read_model
from hft_cli.plan.speed import step_seconds
from hft_cli.plan.traffic import Disk, Network, checkpoint_bytes, network
from hft_cli.plan.workload import Setup, Workload, lora_adapters

NO_DATA = "/dev/null/data"  # a path at which nothing can be


@dataclass(frozen=True)
class PlannedPhase:
    """One phase of the plan.

    Attributes:
        rows: training rows; None if neither the data nor rows=N says.
        steps: optimizer steps; None likewise.
        memory: under this draw.
        worst: under the heaviest draw.
        full: of full fine-tuning.
        host: bytes of host memory of a rank, with offload.
        flops: of a step.
        full_flops: of a step of full fine-tuning.
        network: of a step.
        hours: None unless steps and tflops=N are known.
    """

    phase: Phase
    draw: Draw
    setup: Setup
    rows: int | None = None
    steps: int | None = 0
    memory: Memory = field(default_factory=Memory)
    worst: Memory = field(default_factory=Memory)
    full: Memory = field(default_factory=Memory)
    host: float = 0
    flops: Flops = field(default_factory=Flops)
    full_flops: Flops = field(default_factory=Flops)
    network: Network = field(default_factory=Network)
    hours: float | None = None


@dataclass(frozen=True)
class Fit:
    """The peak memory of a GPU with an engine, under the worst draw, in bytes; None if the engine is refused.

    `seconds` puts engines in order (see `step_seconds`): of a step of the phase that takes longest. `refusal` is why an
    engine is refused.
    """

    engine: str
    checkpointing: bool
    bytes: float | None
    seconds: float = 0.0
    refusal: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run does and costs. `worst_elements`: elements that the heaviest draw updates."""

    config: PlanConfig
    model: Model
    rounds: tuple[PlannedPhase, ...]
    worst_elements: int
    disk: Disk
    fits: tuple[Fit, ...]

    @property
    def has_draws(self) -> bool:
        """Whether the selection is random."""
        return self.config.selection.level not in UNDRAWN and self.config.method.name != "lora"

    @property
    def heaviest(self) -> PlannedPhase:
        """The phase that needs most memory."""
        return max(self.rounds, key=lambda planned: planned.worst.total)

    def expected(self) -> dict[str, Any]:
        """The costs in plan.json: bytes of one GPU (or rank) and of the disk, operations of a step."""
        return {
            "disk_bytes": {**asdict(self.disk), "total": self.disk.total},
            "rounds": [
                {
                    "name": planned.phase.name,
                    "steps": planned.steps,
                    "memory_bytes": {**asdict(planned.memory), "total": planned.memory.total},
                    "memory_bytes_worst_draw": planned.worst.total,
                    "memory_bytes_fft": planned.full.total,
                    "host_memory_bytes": planned.host,
                    "flops_of_a_step": planned.flops.total,
                    "flops_of_a_step_fft": planned.full_flops.total,
                    "network_bytes_of_a_step": planned.network.total,
                }
                for planned in self.rounds
            ],
        }


def plan(config: PlanConfig, row_counts: Mapping[int, int] | None = None) -> Plan:
    """Plan a run. `row_counts` has the training rows of each phase by its number, if they are counted already.

    Raises:
        UserError: for a mistake that `hft train` would refuse too, or a model of unknown architecture.
    """
    config = with_data(config)
    check(config)
    model = read_model(config.model)
    config = with_model_limits(config, dict(model.config), config.model.name)
    run, drawn = phases(config), draws(config, model.params)
    trains = run[0].trains
    if trains and not drawn[0].updated:
        raise UserError("Nothing would be trained: selection.ratio=0 with embeddings, head and final_norm frozen.")
    if row_counts is None:
        counts = {phase.number: _count_rows(phase, config) for phase in run if phase.trains}
    else:
        counts = dict(row_counts)
    planned = tuple(
        _plan_phase(config, model, phase, draw, counts.get(phase.number))
        for phase, draw in zip(run, drawn, strict=True)
    )
    worst = set(_worst_draw(config, model, drawn[0]) if trains else drawn[0].updated)
    return Plan(
        config=config,
        model=model,
        rounds=planned,
        worst_elements=sum(p.elements for p in model.params if p.name in worst),
        disk=_disk(config, model, planned, trains),
        fits=tuple(_fits(config, model, run, drawn)) if trains else (),
    )


def with_data(config: PlanConfig) -> PlanConfig:
    """The config with stand-ins for training sets that are not named: a plan needs only their number of rows."""
    data = config.data
    if not config.method.trains or data.path not in (REQUIRED, []):
        return config
    path = NO_DATA if data.tasks else [NO_DATA] * len(config.method.stages)
    return replace(config, data=replace(data, path=path))


def _disk(config: PlanConfig, model: Model, planned: Sequence[PlannedPhase], trains: bool) -> Disk:
    saved = config.method.save_model
    deltas = sum(model.stored[name] for phase in planned for name in phase.draw.updated)
    checkpoint = 0.0
    if trains and (config.train.save_every or config.train.save_minutes):
        checkpoint = max(checkpoint_bytes(workload(config, model, p.draw.updated, p.setup)) for p in planned)
    # The oldest checkpoint is deleted when the newest is complete, and the model before a round when the next one is.
    models = sum(model.stored.values()) * min(len(planned), 2)
    return Disk(deltas * saved, models * saved, checkpoint * (config.train.save_limit + 1))


def make_setup(config: PlanConfig, phase: Phase, model: Model) -> Setup:
    """How a phase trains. `config` is that of the phase."""
    train, engine, hidden = config.train, config.engine, model.shape.hidden
    zero = deepspeed_settings(config).get("zero_optimization", {})

    def elements(key: str, default: int, auto: int) -> int:
        value = zero.get(key, default)
        return auto if value == "auto" else int(value)  # transformers replaces "auto" by hidden ** 2 or 10 * hidden

    return Setup(
        zero_stage=engine.zero_stage,
        ranks=engine.ranks,
        dtype=config.model.dtype,
        rows=train.micro_batch_size,
        length=int(train.max_length or 0),
        accumulation=config.accumulation,
        attention=config.model.attention or "sdpa",  # the default of transformers
        checkpointing=train.gradient_checkpointing,
        stage=phase.stage,
        reference=config.dpo.reference,
        tasks=len(phase.memories),
        memory_rows=config.continual.gem_memory,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        optimizer=train.optimizer,
        decays=train.weight_decay > 0,
        anchor=config.anchor.name,
        filtered=train.momentum_filter is not None,
        low_files=model.dtype in ("bfloat16", "BF16"),
        bucket=elements("reduce_bucket_size", REDUCE_BUCKET, hidden**2),
        live=elements("stage3_max_live_parameters", MAX_LIVE, MAX_LIVE),
        sub_group=elements("sub_group_size", SUB_GROUP, SUB_GROUP),
        persistent=elements("stage3_param_persistence_threshold", PERSISTENT, 10 * hidden),
    )


def workload(config: PlanConfig, model: Model, updated: Iterable[str], setup: Setup) -> Workload:
    """The workload of a phase that updates the named parameters; with LoRA, of their adapters."""
    names = frozenset(updated)
    if config.method.name != "lora":
        return Workload(model.params, names, model.shape, setup)
    adapters = lora_adapters(model.params, names, config.lora)
    return Workload(model.params + adapters, frozenset(p.name for p in adapters), model.shape, setup)


def _worst_draw(config: PlanConfig, model: Model, draw: Draw) -> tuple[str, ...]:
    """Names of the heaviest draw. LoRA has only one."""
    return draw.updated if config.method.name == "lora" else heaviest_draw(model.params, config.selection)


def _worst_memory(config: PlanConfig, model: Model, draw: Draw, setup: Setup) -> Memory:
    """Part by part at least the memory of any draw: most elements, and the inputs of all matrices saved."""
    heaviest = workload(config, model, _worst_draw(config, model, draw), setup)
    # The saved inputs do not depend on the number of elements alone, so every matrix that some draw trains counts.
    everything = heaviest if config.method.name == "lora" else _full(model, setup)
    bound = replace(memory(heaviest), activations=activations(everything))
    return bound.at_least(memory(workload(config, model, draw.updated, setup)))


def _full(model: Model, setup: Setup) -> Workload:
    """Full fine-tuning."""
    return Workload(model.params, frozenset(p.name for p in model.params), model.shape, setup)


def _plan_phase(config: PlanConfig, model: Model, phase: Phase, draw: Draw, rows: int | None) -> PlannedPhase:
    phase_settings: PlanConfig = phase_config(config, phase)
    setup = make_setup(phase_settings, phase, model)
    if not phase.trains:
        return PlannedPhase(phase, draw, setup, rows)
    train, work, full = phase_settings.train, workload(config, model, draw.updated, setup), _full(model, setup)
    tokens = setup.length if train.packing else min(config.row_tokens or setup.length, setup.length)
    step_flops = flops(work, train.batch_size, tokens)
    steps = _count_steps(phase_settings, phase, rows)
    duration = None
    if config.tflops is not None and steps is not None:
        operations = step_flops.total * steps
        if phase.stage == "dpo" and config.dpo.reference == "precomputed" and rows is not None:
            operations += flops(work, rows, tokens).forward
        duration = hours(operations, setup.ranks, config.tflops, config.utilization)
    return PlannedPhase(
        phase=phase,
        draw=draw,
        setup=setup,
        rows=rows,
        steps=steps,
        memory=memory(work),
        worst=_worst_memory(config, model, draw, setup),
        full=memory(full),
        host=host_memory(work),
        flops=step_flops,
        full_flops=flops(full, train.batch_size, tokens),
        network=network(work),
        hours=duration,
    )


def slow_packing(config: RunConfig) -> str | None:
    """What to do where rows in one sequence are slow; None if each is alone, or the attention knows their bounds."""
    train = config.train
    if not (train.packing or train.padding_free) or config.model.attention in FLASH_ATTENTION:
        return None
    key, sequence = ("packing", "sequence") if train.packing else ("padding_free", "micro-batch")
    return (
        f"train.{key}=true without flash attention computes attention between all rows of a {sequence}, and masks it. "
        "model.attention=flash_attention_2 does not; train.group_by_length=true avoids most padding with any attention."
    )


def _count_rows(phase: Phase, config: PlanConfig) -> int | None:
    """Training rows of a phase: counted if the data are on this machine, otherwise from rows=N; None if unknown."""
    local = [expanded(resolve_path(source.path)).exists() for source in phase.sources]
    if all(local):
        return len(read_mixed(phase.stage, phase.sources, config, phase.validation).rows)
    if config.rows is None:
        return None
    sizes = [
        len(read_source(phase.stage, source, config)) if known else min(config.rows, source.max_rows or config.rows)
        for source, known in zip(phase.sources, local, strict=True)
    ]
    rows = sum(row_counts(phase.sources, sizes))
    return rows - round(rows * phase.validation) if isinstance(phase.validation, float) else rows


def _count_steps(config: PlanConfig, phase: Phase, rows: int | None) -> int | None:
    """Optimizer steps of a phase, as the trainer counts them. Packed rows count as full without row_tokens=N."""
    train, ranks = config.train, config.engine.ranks
    if rows is None and not train.max_steps:
        return None
    if phase.set_parts > 1:
        return len(phase.steps_of_set(train, rows or 0))
    if rows is None or train.max_steps:
        return train.max_steps
    if train.packing and config.row_tokens and train.max_length:
        rows = ceil(rows * min(config.row_tokens, train.max_length) / train.max_length)
    batches = ceil(rows / (train.micro_batch_size * ranks))
    steps_of_an_epoch = max(ceil(batches * train.micro_batch_size * ranks / train.batch_size), 1)
    return ceil(float(train.epochs) * steps_of_an_epoch)


def engine_fits(config: PlanConfig) -> tuple[Fit, ...]:
    """The engines that engine=auto can take on config.engine.num_processes x num_nodes ranks.

    Raises:
        UserError: as for `plan`.
    """
    config = with_data(config)
    check(config)
    model = read_model(config.model)
    config = with_model_limits(config, dict(model.config), config.model.name)
    fits = _fits(config, model, phases(config), draws(config, model.params))
    return tuple(
        fit
        for fit in fits
        if (fit.engine != "single" or config.engine.ranks == 1)
        and (fit.checkpointing or not config.train.gradient_checkpointing)
    )


def _fits(config: PlanConfig, model: Model, run: Sequence[Phase], drawn: Sequence[Draw]) -> Iterable[Fit]:
    """The memory with each engine, with and without checkpointing, of the heaviest phase under the worst draw."""
    trained = [(phase, each) for phase, each in zip(run, drawn, strict=True) if phase.trains]
    machines = {key: getattr(config.engine, key) for key in ("num_processes", "num_nodes", "node_rank")}
    for name, values in options_of("engine").items():
        if name == AUTO:
            continue
        engine = EngineConfig(**values)
        engine = engine if engine.zero_stage is None else replace(engine, **machines)
        for checkpointing in (False, True):
            train = replace(config.train, gradient_checkpointing=checkpointing)
            variant = replace(config, engine=engine, train=train)
            try:
                check(variant)
            except UserError as error:
                yield Fit(name, checkpointing, None, refusal=str(error))
                continue
            drawn_setups = [(each, make_setup(phase_config(variant, phase), phase, model)) for phase, each in trained]
            peaks = [_worst_memory(variant, model, draw, setup).total for draw, setup in drawn_setups]
            works = [workload(variant, model, draw.updated, setup) for draw, setup in drawn_setups]
            yield Fit(name, checkpointing, max(peaks), max(step_seconds(work, train.batch_size) for work in works))
