"""The jobs of a sweep and the folders that they fill. The command line and the report both need them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hft_cli.runner.compat import parse_overrides, split_sweep

LONGEST_NAME = 200  # characters; file systems take 255 bytes


def folder_name(job: Sequence[str], sweep: Sequence[str]) -> str:
    """The name of a job's folder: its values of the swept keys. An extended sweep so finds its earlier jobs.

    Args:
        job: the job's overrides, with one value for each key.
        sweep: the overrides of the whole sweep: what was typed, and what an experiment's file sweeps over.
    """
    overrides = parse_overrides([text for text in sweep if "=" in text and text[0] != "-"])
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    pairs = [text.lstrip("+").partition("=") for text in job]
    swept_pairs = sorted((key != "method", key, value) for key, _, value in pairs if key in swept)
    name = re.sub(r"[^\w.=,+-]+", "-", ",".join(f"{key}={value}" for _, key, value in swept_pairs)) or "run"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def params(sweeper: Any) -> list[str]:
    """What an experiment's file sweeps over (hydra.sweeper.params), as overrides."""
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def jobs(sweep: Path) -> list[tuple[Path, list[str]]]:
    """The folder and the overrides of each job of a sweep, from its multirun.yaml; empty if that cannot be read."""
    from hydra.errors import HydraException

    try:
        hydra = yaml.safe_load(sweep.read_text(encoding="utf-8"))["hydra"]
        overrides = [*params(hydra["sweeper"]), *map(str, hydra["overrides"]["task"])]
        return [(sweep.parent / folder_name(job, overrides), job) for job in split_sweep(overrides)]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, HydraException):
        return []
