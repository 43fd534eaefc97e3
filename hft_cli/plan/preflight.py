"""What a machine must have for a run, checked before anything expensive starts."""

from __future__ import annotations

import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from hft_cli.config.schema import EngineConfig, RunConfig
from hft_cli.errors import UserError
from hft_cli.launch.environment import cuda_build, gpus, host_memory, torch_sees_gpu
from hft_cli.plan.costs import Memory
from hft_cli.plan.planner import Plan
from hft_cli.text import format_bytes

# What is wrong with versions that we do not take.
WRONG = {
    "deepspeed": "ZeRO-3 with activation checkpointing fails on frozen parameters before 0.19.4, transformers #47254",
}

LARGE = 1e9  # elements, of which a step takes minutes on a CPU


def preflight(config: RunConfig, planned: Plan, new: bool) -> None:
    """Refuse a run that this machine cannot do. `new`: nothing of it is on the disk yet.

    Raises:
        UserError: for packages that do not fit, GPUs that are not there or too small, or too little memory or disk.
    """
    check_packages(config)
    if planned.rounds[0].phase.stage != "half_reset":
        memories = gpus()
        check_device(config.engine, memories, sum(p.elements for p in planned.model.params))
        if config.engine.check_memory:
            check_memory(config, planned, memories, host_memory())
    if new:
        check_disk(Path(config.output_dir).expanduser(), planned.disk.total)


def check_packages(config: RunConfig) -> None:
    """Installed versions against those that hft takes: it relies on what other versions do otherwise, or do wrong."""
    from packaging.requirements import Requirement

    for line in metadata.requires("hft-cli") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"{needed.name} is not installed, and hft needs it. Install it with: "
                f"pip install '{needed.name}{needed.specifier}'"
            ) from None
        if not needed.specifier.contains(found, prereleases=True):
            why = f" ({WRONG[needed.name]})" if needed.name in WRONG else ""
            raise UserError(
                f"{needed.name} {found} is installed; hft needs {needed.name}{needed.specifier}{why}. Install it with: "
                f"pip install '{needed.name}{needed.specifier}'"
            )
    if config.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(
            "model.attention=flash_attention_2 needs the package flash-attn, which is not installed. Install it, or "
            "set model.attention=sdpa."
        )


def check_device(engine: EngineConfig, memories: list[float | None], elements: int) -> None:
    """Whether there are GPUs where they are meant, and one for each rank."""
    asked, ranks = engine.device, engine.num_processes
    if asked == "cpu" and memories:
        raise UserError(
            "engine.device=cpu, but a worker would see a GPU and take it. Hide it: CUDA_VISIBLE_DEVICES= hft train …"
        )
    if memories and not cuda_build():
        raise UserError(
            f"This machine has a GPU, but torch {metadata.version('torch')} was built without CUDA. Install the build "
            "for it (README, Installing), or train on the CPU: CUDA_VISIBLE_DEVICES= hft train …"
        )
    if memories and ranks > len(memories):
        raise UserError(
            f"engine.num_processes={ranks} is one for each GPU, and there {'is' if len(memories) == 1 else 'are'} "
            f"{len(memories)} here. Set engine.num_processes={len(memories)} (engine.num_nodes counts machines)."
        )
    if memories or asked == "cpu":
        return
    if asked == "gpu" and not torch_sees_gpu():
        raise UserError("engine.device=gpu, but there is no GPU here. Run it where one is, or set engine.device=cpu.")
    if asked == "auto" and elements > LARGE and not torch_sees_gpu():
        raise UserError(
            f"There is no GPU here, and on the CPU a step of {elements / 1e9:.1f}B parameters takes minutes. Run it "
            "where GPUs are, or set engine.device=cpu if you mean it. (hft plan needs no GPU.)"
        )


def check_memory(config: RunConfig, planned: Plan, memories: list[float | None], host: float) -> None:
    """Whether the plan's heaviest round fits, under its own draw."""
    anyway = "Or, as the plan is an estimate, try it anyway: engine.check_memory=false."
    ranks = config.engine.num_processes
    known = [memory for memory in memories[:ranks] if memory is not None]
    found = max(planned.rounds, key=lambda one: one.memory.total)
    if known and found.memory.total > min(known):
        fits = [fit for fit in planned.fits if fit.bytes is not None and fit.bytes <= min(known)]
        fits = [fit for fit in fits if fit.engine != "single" or config.engine.ranks == 1]
        ways = ", ".join(
            f"engine={fit.engine}{' train.gradient_checkpointing=true' * fit.checkpointing}"
            for fit in sorted(fits, key=lambda fit: -(fit.bytes or 0))[:2]
        )
        raise UserError(
            f"By its plan round {found.phase.name} needs {format_bytes(found.memory.total)} on each GPU, and they have "
            f"{format_bytes(min(known))}. "
            f"{f'What fits: {ways}.' if ways else 'More GPUs, or shorter rows, need less.'} "
            f"(hft plan shows the parts.) {anyway}"
        )
    # Without a GPU all is in the host's memory; activations and buffers, which come and go, are not counted.
    each = found.host if memories else found.host + _lasting(found.memory)
    if each * ranks > host:
        raise UserError(
            f"By its plan round {found.phase.name} needs {format_bytes(each * ranks)} of this machine's memory for "
            f"{ranks} rank{'s' * (ranks > 1)}, and it has {format_bytes(host)}. {anyway}"
        )


def _lasting(memory: Memory) -> float:
    return memory.weights + memory.gradients + memory.optimizer + memory.masters + memory.reference


def check_disk(folder: Path, needed: float) -> None:
    """Whether what the run keeps fits onto the disk of its directory."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"By its plan the run keeps {format_bytes(needed)} in {folder}, where {format_bytes(free)} are free. "
            "Free some, choose another output_dir, or keep fewer checkpoints (train.save_limit)."
        )
