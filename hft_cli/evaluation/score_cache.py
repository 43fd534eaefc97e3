"""Scores of the models that runs start from, kept in the user's cache: scored once for all runs that share a start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft_cli.files import read_json, write_json, write_text
from hft_cli.launch.environment import environment


def kept() -> Path:
    """The folder that the scores are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft" / "scores"


def key(*hangs_on: Any) -> str:
    """The name under which scores are kept: a hash of plain values, and of the versions and the hardware here."""
    here = {name: value for name, value in environment().items() if name in ("gpus", "packages", "hft")}
    return hashlib.sha256(json.dumps([*hangs_on, here], sort_keys=True).encode()).hexdigest()


def take(cells: Mapping[Path, str]) -> int:
    """Copy what is known under the cells' keys to the cells that are not there; returns how many were."""
    taken = 0
    for cell, name in cells.items():
        if (kept() / f"{name}.json").exists() and not cell.exists():
            _copy(kept() / f"{name}.json", cell)
            taken += 1
    return taken


def add(cells: Mapping[Path, str]) -> None:
    """Keep the cells under their keys."""
    for cell, name in cells.items():
        if not (kept() / f"{name}.json").exists():
            _copy(cell, kept() / f"{name}.json")


def _copy(source: Path, target: Path) -> None:
    """Copy scores and items, the items first: a cell whose scores are there is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target.with_suffix(".jsonl"), source.with_suffix(".jsonl").read_text())
    write_json(target, read_json(source))
