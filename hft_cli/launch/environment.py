"""The machine and its software: versions, GPUs, memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@cache
def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can be told without importing torch."""
    packages = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "hydra-core", "omegaconf")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
        "packages": {name: metadata.version(name) for name in packages},
        "hft": metadata.version("hft-cli"),
        "git_commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }


def _output(command: list[str]) -> list[str]:
    """A command's lines; none if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def gpus() -> list[float | None]:
    """Memory in bytes of each GPU that a worker would see; None where that is not known (a part of a GPU)."""
    found: list[float | None] = []
    for line in environment()["gpus"]:
        size = re.search(r"(\d+) MiB", line)
        found.append(float(size[1]) * 2**20 if size else None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not found:
        return found
    chosen: list[float | None] = []
    for name in map(str.strip, visible.split(",")):
        if name.isdigit() and int(name) < len(found):
            chosen.append(found[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            chosen.append(None)
        else:  # as CUDA does: what follows a name of no GPU is not seen
            break
    return chosen


def cuda_build() -> bool:
    """Whether torch was built for GPUs, read from its version file: importing it takes seconds."""
    spec = find_spec("torch")
    text = (Path(str(spec.origin)).parent / "version.py").read_text() if spec else ""
    return bool(re.search(r"^(cuda|hip)\b[^=]*= *['\"]", text, re.MULTILINE))


def torch_sees_gpu() -> bool:
    """Of makers whose tools we do not ask."""
    import torch

    return bool(torch.cuda.is_available())


def host_memory() -> float:
    """Bytes of this machine's memory, or of what the scheduler's control group leaves us of it."""
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        limit = file.read_text().strip() if file.exists() else ""
        if limit.isdigit():
            whole = min(whole, float(limit))
    return whole


def _limits(own: Path, root: Path) -> Iterator[Path]:
    """Where limits of our control group and of those around it stand, for both versions of Linux's."""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, kinds, place = line.split(":", 2)
        if kinds in ("", "memory"):
            inside, file = (root, "memory.max") if not kinds else (root / kinds, "memory.limit_in_bytes")
            group = inside / place.lstrip("/")
            yield from (folder / file for folder in (group, *group.parents) if folder.is_relative_to(inside))
