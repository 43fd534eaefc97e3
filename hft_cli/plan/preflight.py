"""What a machine must have for a run, checked before anything expensive starts."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from hft_cli.config.optimizers import DEFAULT, OPTIMIZERS
from hft_cli.config.schema import EngineConfig, RunConfig
from hft_cli.config.settings import FLASH_ATTENTION
from hft_cli.errors import UserError
from hft_cli.launch.environment import cuda_build, gpus, host_memory, torch_sees_gpu
from hft_cli.paths import expanded
from hft_cli.plan.planner import Plan
from hft_cli.text import format_bytes, plural

# Why versions that hft does not accept are wrong.
VERSION_FAULTS = {
    "deepspeed": "ZeRO-3 with activation checkpointing fails on frozen parameters before 0.19.4, transformers #47254",
}

LARGE_MODEL = 1e9  # elements; a training step takes minutes on a CPU


def preflight(config: RunConfig, plan: Plan, new: bool) -> None:
    """Refuse a run that this machine cannot do. `new`: nothing of the run is on the disk yet."""
    check_packages(config)
    if plan.rounds[0].phase.trains:
        gpu_memories = gpus()
        check_optimizer(config.train.optimizer, bool(gpu_memories))
        check_device(config.engine, gpu_memories, sum(p.elements for p in plan.model.params))
        if config.engine.check_memory:
            check_memory(config, plan, gpu_memories, host_memory())
    if new:
        check_disk(expanded(config.output_dir), plan.disk.total)


def check_packages(config: RunConfig) -> None:
    """Compare the installed versions with those that pyproject.toml accepts. Others were seen to work differently."""
    from packaging.requirements import Requirement

    for line in metadata.requires("hft-cli") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        fix = f"Install it with: pip install '{needed.name}{needed.specifier}'"
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{needed.name} is not installed, and hft needs it. {fix}") from None
        _require_not_hidden(needed.name)
        if not needed.specifier.contains(version, prereleases=True):
            reason = f" ({VERSION_FAULTS[needed.name]})" if needed.name in VERSION_FAULTS else ""
            raise UserError(
                f"{needed.name} {version} is installed; hft needs {needed.name}{needed.specifier}{reason}. {fix}"
            )
    attention = config.model.attention
    module, package = FLASH_ATTENTION.get(attention or "", (None, None))
    if module is not None and find_spec(module) is None:
        raise UserError(
            f"model.attention={attention} needs the package {package}, which is not installed. Install it, or set "
            "model.attention=sdpa."
        )


def _require_not_hidden(library: str) -> None:
    """Raise UserError if workers would import a module of the user's own instead of an installed library."""
    file = f"{library}/__init__.py"
    installed = Path(str(metadata.distribution(library).locate_file(file)))
    if not installed.exists():  # installed from a checkout, or its module has another name
        return
    folders = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for own in (Path(folder, name) for folder in folders for name in (f"{library}.py", file)):
        if own.is_file() and not own.samefile(installed):
            raise UserError(
                f"{own} hides the library {library}: workers import from the working folder and from PYTHONPATH first. "
                "Rename it, or start hft elsewhere."
            )


def check_optimizer(name: str, has_gpu: bool) -> None:
    """Check that the optimizer is installed, and works on the device."""
    optimizer = OPTIMIZERS[name]
    if optimizer.package and find_spec(optimizer.package) is None:
        raise UserError(
            f"train.optimizer={name} needs the package {optimizer.package}, which is not installed. Install it, or set "
            f"train.optimizer={DEFAULT}."
        )
    if optimizer.package and optimizer.cpu_since and not has_gpu:
        from packaging.version import Version

        version = metadata.version(optimizer.package)
        if Version(version) < Version(optimizer.cpu_since):
            raise UserError(
                f"train.optimizer={name} needs a GPU with {optimizer.package} {version}, and there is none here. "
                f"Install {optimizer.package} {optimizer.cpu_since} or newer, or set train.optimizer={DEFAULT}."
            )


def check_device(engine: EngineConfig, gpu_memories: list[float | None], elements: int) -> None:
    """Check that there are GPUs where the configuration wants them, and one for each rank.

    `gpu_memories`: bytes of each GPU that a worker would see, None if unknown. `elements`: the size of the model.
    """
    device, ranks, count = engine.device, engine.num_processes, len(gpu_memories)
    if device == "cpu" and count:
        raise UserError(
            "engine.device=cpu, but a worker would see a GPU and use it. Hide it: CUDA_VISIBLE_DEVICES= hft train …"
        )
    if count and not cuda_build():
        raise UserError(
            f"This machine has a GPU, but torch {metadata.version('torch')} was built without CUDA. Install the build "
            "for it (README, Installing), or train on the CPU: CUDA_VISIBLE_DEVICES= hft train …"
        )
    if count and ranks > count:
        raise UserError(
            f"engine.num_processes={ranks} needs one GPU for each rank, and this machine has {count}. "
            f"Set engine.num_processes={count} (engine.num_nodes counts machines)."
        )
    if count or device == "cpu":
        return
    if device == "gpu" and not torch_sees_gpu():
        raise UserError("engine.device=gpu, but there is no GPU here. Use a machine with GPUs, or engine.device=cpu.")
    if device == "auto" and elements > LARGE_MODEL and not torch_sees_gpu():
        raise UserError(
            f"There is no GPU here, and on the CPU a step of {elements / 1e9:.1f}B parameters takes minutes. Use a "
            "machine with GPUs, or set engine.device=cpu to train on the CPU anyway. (hft plan needs no GPU.)"
        )


def check_memory(config: RunConfig, plan: Plan, gpu_memories: list[float | None], host: float) -> None:
    """Check that the heaviest phase of the plan fits, under its own draw; otherwise name engines that fit."""
    anyway = "The plan is an estimate; engine.check_memory=false tries it anyway."
    ranks = config.engine.num_processes
    known = [memory for memory in gpu_memories[:ranks] if memory is not None]
    heaviest = max(plan.rounds, key=lambda planned: planned.memory.total)
    if known and heaviest.memory.total > min(known):
        raise UserError(
            f"According to the plan, round {heaviest.phase.name} needs {format_bytes(heaviest.memory.total)} on each "
            f"GPU, and they have {format_bytes(min(known))}. {_ways_to_fit(config, plan, min(known))} "
            f"(hft plan shows the parts.) {anyway}"
        )
    # Without a GPU everything is in host memory. Activations and buffers, which are temporary, are not counted.
    needed = ranks * (heaviest.host if gpu_memories else heaviest.host + heaviest.memory.persistent)
    if needed > host:
        raise UserError(
            f"According to the plan, round {heaviest.phase.name} needs {format_bytes(needed)} of host memory for "
            f"{plural(ranks, 'rank')}, and this machine has {format_bytes(host)}. {anyway}"
        )


def _ways_to_fit(config: RunConfig, plan: Plan, limit: float) -> str:
    """The two fastest engines that fit."""
    fits = [fit for fit in plan.fits if fit.bytes is not None and fit.bytes <= limit]
    fits = [fit for fit in fits if fit.engine != "single" or config.engine.ranks == 1]
    ways = ", ".join(
        f"engine={fit.engine}{' train.gradient_checkpointing=true' * fit.checkpointing}"
        for fit in sorted(fits, key=lambda fit: fit.seconds)[:2]
    )
    return f"What fits: {ways}." if ways else "More GPUs or shorter rows need less."


def check_disk(folder: Path, needed: float) -> None:
    """Check that the files of a run fit on the disk of its directory."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"According to the plan, the run keeps {format_bytes(needed)} in {folder}, where {format_bytes(free)} are "
            "free. Free some, choose another output_dir, or keep fewer checkpoints (train.save_limit)."
        )
