"""Values that depend on the machine: model.dtype=auto and engine=auto become what fits it before anything else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from hft_cli.config.conf import options_of
from hft_cli.config.schema import EngineConfig, ModelConfig, PlanConfig, RunConfig
from hft_cli.config.settings import AUTO
from hft_cli.config.validate import check
from hft_cli.errors import UserError
from hft_cli.launch.environment import compute_in_bfloat16, gpus
from hft_cli.plan.planner import Fit, engine_fits, with_data
from hft_cli.text import format_bytes, plural

AnyRun = TypeVar("AnyRun", bound=RunConfig)

USABLE = 0.9  # of the memory of a GPU: the plan does not count CUDA's context and fragmentation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """The GPUs of a node: their number, the bytes of the smallest one (None: unknown), whether they have bfloat16."""

    gpus: int
    memory: float | None
    bfloat16: bool


def this_machine() -> Machine:
    """The GPUs that a worker on this machine would see."""
    sizes = gpus()
    memory = min((size for size in sizes if size is not None), default=None) if None not in sizes else None
    return Machine(len(sizes), memory, bool(sizes) and compute_in_bfloat16())


def machine_of(config: RunConfig) -> Machine:
    """The machine that a config is for: this one, or that of `hft plan … gpu_memory=80`."""
    here, engine = this_machine(), config.engine
    if isinstance(config, PlanConfig) and (config.gpu_memory is not None or config.tflops is not None):
        memory = here.memory if config.gpu_memory is None else config.gpu_memory * 2**30
        return Machine(engine.num_processes or here.gpus, memory, bfloat16=True)
    return here


def with_dtype(model: ModelConfig, machine: Machine) -> ModelConfig:
    """The config of a model with model.dtype=auto replaced: bfloat16 if the GPUs compute in it, else float32."""
    return replace(model, dtype="bfloat16" if machine.bfloat16 else "float32") if model.dtype == AUTO else model


def automatic(config: AnyRun, machine: Machine | None = None, folder: Path | None = None) -> AnyRun:
    """The config with model.dtype=auto and engine=auto replaced by values.

    engine=auto takes, of the engines that fit the GPUs, the one with the shortest step (`Fit.seconds`). It turns on
    train.gradient_checkpointing where that is needed, and lowers train.micro_batch_size to a divisor of what a rank has
    of train.batch_size.

    Args:
        machine: None takes `machine_of(config)`, and only if there is something to replace: it asks the driver.
        folder: where the model of the config is on this machine, if it is not model.path.

    Raises:
        UserError: for a mistake in the config, if the memory of the GPUs is unknown, or if nothing fits.
    """
    if AUTO not in (config.model.dtype, config.engine.name):
        return config
    machine = machine or machine_of(config)
    config = replace(config, model=with_dtype(config.model, machine))
    if config.engine.name != AUTO:
        return config
    if not machine.gpus and config.engine.ranks:
        raise UserError(
            f"engine=auto: there is no GPU here for engine.num_processes={config.engine.num_processes}. Leave it out, "
            "or choose the engine: engine=zero2. (hft plan: give gpu_memory=N.)"
        )
    if not machine.gpus or not config.method.trains:
        single = EngineConfig(**options_of("engine")["single"], device=config.engine.device)
        logger.info("engine=auto: single, " + ("on the CPU." if not machine.gpus else "which computes with files."))
        return replace(config, engine=single)
    check(with_data(_planned(config)))
    config = _on_ranks(config, machine)
    ranks = plural(config.engine.ranks, "GPU")
    if machine.memory is None:
        raise UserError("engine=auto: the memory of the GPUs is not known here. Choose engine=zero1, zero2 or zero3.")
    fits = engine_fits(replace(_planned(config), model=replace(config.model, path=str(folder or config.model.path))))
    fit = fastest(fits, machine.memory * USABLE)
    if all(fit.bytes is None for fit in fits):
        raise UserError(f"engine=auto: no engine can do this on {ranks}. {fits[0].refusal}")
    if fit is None:
        least = min(fit.bytes for fit in fits if fit.bytes is not None)
        raise UserError(
            f"engine=auto: nothing fits {ranks} of {format_bytes(machine.memory)}: the engine that needs least takes "
            f"{format_bytes(least)} of each according to the plan. Take more GPUs, a smaller train.micro_batch_size or "
            "train.max_length, or choose an engine yourself."
        )
    logger.info(
        f"engine=auto: {fit.engine}{' with train.gradient_checkpointing' * fit.checkpointing} on {ranks}, "
        f"{format_bytes(fit.bytes or 0)} of {format_bytes(machine.memory)} each according to the plan."
    )
    train = replace(config.train, gradient_checkpointing=fit.checkpointing)
    return replace(config, train=train, engine=engine_of(fit.engine, config.engine))


def _planned(config: RunConfig) -> PlanConfig:
    return config if isinstance(config, PlanConfig) else PlanConfig(**vars(config))


def _on_ranks(config: AnyRun, machine: Machine) -> AnyRun:
    """The config with a rank for each GPU unless their number is typed, and a micro-batch that divides the batch."""
    engine = replace(config.engine, num_processes=config.engine.num_processes or machine.gpus)
    rows, rest = divmod(config.train.batch_size, engine.ranks)
    if rest:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not a multiple of the {plural(engine.ranks, 'GPU')}. Set "
            f"train.batch_size={max(1, round(config.train.batch_size / engine.ranks)) * engine.ranks}, or "
            "engine.num_processes=N."
        )
    size = next(size for size in range(min(config.train.micro_batch_size, rows), 0, -1) if rows % size == 0)
    return replace(config, engine=engine, train=replace(config.train, micro_batch_size=size))


def engine_of(name: str, like: EngineConfig) -> EngineConfig:
    """The engine `name` on the machines of another one."""
    values: dict[str, Any] = {key: getattr(like, key) for key in MACHINE_KEYS}
    return replace(EngineConfig(**options_of("engine")[name]), **values)


MACHINE_KEYS = ("num_processes", "num_nodes", "node_rank", "rendezvous", "deepspeed", "device", "check_memory")


def fastest(fits: Sequence[Fit], limit: float) -> Fit | None:
    """The engine with the shortest step among those that need at most `limit` bytes; None if there is none.

    Offload comes last: how fast a host steps is not known.
    """
    fitting = [fit for fit in fits if fit.bytes is not None and fit.bytes <= limit]
    return min(fitting, key=lambda fit: ("offload" in fit.engine, fit.seconds), default=None)
