"""The machine and its software: versions, GPUs, memory. Found out without importing torch, which takes seconds."""

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

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "hydra-core", "omegaconf")


@cache
def environment() -> dict[str, Any]:
    """What environment.json of a run holds: versions, hardware, git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _output_lines(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "hft": metadata.version("hft-cli"),
        "git_commit": _output_lines(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }


def _output_lines(command: list[str]) -> list[str]:
    """The lines that a command prints; none if it does not exist or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=20
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def gpus() -> list[float | None]:
    """Memory in bytes of each GPU that a worker would see; None if it is not known (a MIG instance)."""
    sizes: list[float | None] = []
    for line in environment()["gpus"]:
        size = re.search(r"(\d+) MiB", line)
        sizes.append(float(size[1]) * 2**20 if size else None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not sizes:
        return sizes
    visible_sizes: list[float | None] = []
    for name in map(str.strip, visible.split(",")):
        if name.isdigit() and int(name) < len(sizes):
            visible_sizes.append(sizes[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            visible_sizes.append(None)
        else:  # CUDA ignores the names after one that is no GPU
            break
    return visible_sizes


def compute_in_bfloat16() -> bool:
    """Whether all GPUs of this machine compute in bfloat16 (NVIDIA: compute capability 8.0, Ampere, or newer)."""
    lines = _output_lines(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return bool(lines) and all(re.fullmatch(r"\d+\.\d+", line.strip()) and float(line) >= 8 for line in lines)


def cuda_build() -> bool:
    """Whether torch was built for GPUs, read from its version file."""
    spec = find_spec("torch")
    text = (Path(str(spec.origin)).parent / "version.py").read_text(encoding="utf-8") if spec else ""
    return bool(re.search(r"^(cuda|hip)\b[^=]*= *['\"]", text, re.MULTILINE))


def torch_sees_gpu() -> bool:
    """Whether torch finds a GPU, also of makers other than NVIDIA. Imports torch."""
    import torch

    return bool(torch.cuda.is_available())


def host_memory() -> float:
    """Memory of this machine in bytes, or the limit that a scheduler's control group sets."""
    size = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        limit = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        if limit.isdigit():
            size = min(size, float(limit))
    return size


def _limits(membership: Path, root: Path) -> Iterator[Path]:
    """The files with the memory limits of this process's control group and of those around it (cgroup v1 and v2).

    Args:
        membership: /proc/self/cgroup, lines of ID:CONTROLLERS:PATH; v2 has no controllers.
        root: where control groups are mounted.
    """
    for line in membership.read_text(encoding="utf-8").splitlines() if membership.exists() else ():
        _, controllers, place = line.split(":", 2)
        if controllers in ("", "memory"):
            mount, file = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
            group = mount / place.lstrip("/")
            yield from (folder / file for folder in (group, *group.parents) if folder.is_relative_to(mount))
