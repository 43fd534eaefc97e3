"""Stopping and resuming within a phase: requests to stop, and the newest complete checkpoint."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError
from hft_cli.files import read_json, sync_folder, write_json
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir

SIGNALS: list[int] = []  # that this process has received

OWN_FILES = r"hft\.json|universal_zero|latest_universal"  # that hft writes into a complete checkpoint

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


def complete(folder: Path, state: Mapping[str, Any]) -> int:
    """Mark a checkpoint as complete when all its files are on the disk; their size in bytes. By the first rank only.

    The marker holds `state`, and size and SHA-256 of each file.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    with ThreadPoolExecutor() as pool:  # hashing and writing to the disk leave the interpreter free
        facts = pool.map(_fact, paths)
        files = dict(zip((path.relative_to(folder).as_posix() for path in paths), facts, strict=True))
    for path in {folder, *(path.parent for path in paths)}:
        sync_folder(path)
    write_json(folder / MARKER, {**state, "files": files})
    return sum(size for size, _ in files.values())


def _fact(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, which is on the disk then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def remove_older(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints. By the first rank only.

    A checkpoint loses its marker first: a part of it is never taken for a whole one.
    """
    for path in [path for path in _newest_first(folder) if (path / MARKER).exists()][keep:]:
        (path / MARKER).unlink()
        sync_folder(path)
        shutil.rmtree(path)


def damage(folder: Path, marker: Mapping[str, Any]) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Checkpoints of earlier versions list no files."""
    files: dict[str, tuple[int, str]] = marker.get("files", {})
    for path in folder.rglob("*") if files else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and not re.match(OWN_FILES, name):  # DeepSpeed loads what it finds
            return f"{name} was not in it when it was written"
    for name, (size, _) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has another size than when it was written"
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: _fact(folder / name)[1], files)
        return next((f"{n} has changed" for n, h in zip(files, hashes, strict=True) if h != files[n][1]), None)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_checkpoint(folder: Path, identity: Identity, ranks: Ranks) -> Checkpoint | None:
    """Return the newest complete checkpoint in `folder`, and remove incomplete ones. Collective over the ranks.

    Raises:
        UserError: if it was made with another draw or other data, or its files have changed.
    """
    checkpoints = _newest_first(folder)
    whole = [path for path in checkpoints if (path / MARKER).exists()]
    if ranks.first:
        for path in set(checkpoints) - set(whole):
            shutil.rmtree(path)
    ranks.barrier()
    if not whole:
        return None
    marker = read_json(whole[0] / MARKER)
    for key, value in asdict(identity).items():
        if key not in LAYOUT and marker[key] != value:
            raise UserError(
                f"{whole[0]} was made with another {key} ({marker[key]}, now {value}), so training cannot resume "
                "from it. Use the same configuration and data, or another output_dir."
            )
    if wrong := ranks.gather(damage(whole[0], marker) if ranks.first else None)[0]:
        raise UserError(
            f"The checkpoint {whole[0]} is damaged: {wrong}. Delete that folder: the same command then goes on from "
            "the checkpoint before it, or from the start of the round."
        )
    return Checkpoint(whole[0], marker)
