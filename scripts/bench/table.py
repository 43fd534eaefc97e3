"""What the benchmarks share: medians with their spread, bars, the table, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "deepspeed")


@dataclass(frozen=True)
class Row:
    """A measurement: its values in `unit`, and the bar that their median should not exceed."""

    what: str
    values: tuple[float, ...]
    unit: str = "s"
    bar: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        return None if self.bar is None else self.median <= self.bar

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "median": self.median, "unit": self.unit, "bar": self.bar, "met": self.is_met,
                "least": min(self.values), "most": max(self.values), "number": len(self.values)}  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| what | median | least to most | bar | met |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:.3g} {row.unit}"
        met = {None: "", True: "yes", False: "no"}[row.is_met]
        spread = f"{min(row.values):.3g} to {max(row.values):.3g}" if len(row.values) > 1 else ""
        lines.append(f"| {row.what} | {row.median:.3g} {row.unit} | {spread} | {bar} | {met} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, memory, GPUs and versions."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = []
    return {
        "processor": cpu, "cores": os.cpu_count(), "gpus": gpus, "python": platform.python_version(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
