"""Stopping and resuming within a phase: requests to stop, and the newest complete checkpoint."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir

SIGNALS: list[int] = []  # that this process has received

MARKER = "hft.json"  # written last into a checkpoint: a checkpoint without it is not complete

# The fields of Identity in which a checkpoint may differ and is converted (universal.py). Others must agree.
LAYOUT = ("ranks", "zero_stage", "zero_optimization")


def record_signals() -> None:
    """Record SIGTERM and SIGUSR1 instead of ending at once. Schedulers send them, and the kernel if the parent ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: SIGNALS.append(number))


def stop_requested(folder: RoundDir, ranks: Ranks) -> bool:
    """Whether this rank was asked to stop: any rank by a signal, the first rank also by the phase's stop file."""
    return bool(SIGNALS) or (ranks.first and folder.stop.exists())


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to. Its marker file holds these fields."""

    draw: str  # hash of the names of the updated parameters
    data: str  # hash of the rows
    ranks: int
    zero_stage: int | None  # None for a single process
    zero_optimization: dict[str, Any] | None  # DeepSpeed's settings, which also decide where values are stored


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, the content of its marker file, and whether it was converted from another layout."""

    folder: Path
    marker: Mapping[str, Any]
    converted: bool = False


def newest_checkpoint(folder: Path, identity: Identity, ranks: Ranks) -> Checkpoint | None:
    """Return the newest complete checkpoint in `folder`, and remove incomplete ones. Collective over the ranks.

    Raises:
        UserError: if it was made with another draw or other data.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    complete = [path for path in checkpoints if (path / MARKER).exists()]
    if ranks.first:
        for path in set(checkpoints) - set(complete):
            shutil.rmtree(path)
    ranks.barrier()
    if not complete:
        return None
    marker = read_json(complete[0] / MARKER)
    for key, value in asdict(identity).items():
        if key not in LAYOUT and marker[key] != value:
            raise UserError(
                f"{complete[0]} was made with another {key} ({marker[key]}, now {value}), so training cannot resume "
                "from it. Use the same configuration and data, or another output_dir."
            )
    return Checkpoint(complete[0], marker)
