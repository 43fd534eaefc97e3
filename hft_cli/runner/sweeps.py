"""The jobs of a sweep and the folders that they go into, as Hydra counts them: for the runner and for the report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

LONGEST_NAME = 200  # characters; file systems take 255 bytes


def folder_name(job: Sequence[str], given: Sequence[str]) -> str:
    """The name of a job's folder: its values of what is swept in `given`, so that the sweep can be extended.

    `job` holds one value for each key, `given` what was typed and what an experiment's file sweeps.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([text for text in given if "=" in text and text[0] != "-"])
    keys = {override.key_or_group for override in parsed if override.is_sweep_override()}
    pairs = [text.lstrip("+").partition("=") for text in job]
    named = sorted((key != "method", key, value) for key, _, value in pairs if key in keys)
    name = re.sub(r"[^\w.=,+-]+", "-", ",".join(f"{key}={value}" for _, key, value in named)) or "run"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def params(sweeper: Any) -> list[str]:
    """What an experiment's file sweeps over, as overrides."""
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def jobs(sweep: Path) -> list[tuple[Path, list[str]]]:
    """The folders that the sweep kept in a multirun.yaml was to fill, and each one's overrides; none if unreadable."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        hydra = yaml.safe_load(sweep.read_text())["hydra"]
        typed = [str(override) for override in hydra["overrides"]["task"]]
        given = [*params(hydra["sweeper"]), *typed]
        (found,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), max_batch_size=None)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, HydraException):
        return []
    return [(sweep.parent / folder_name(job, given), job) for job in found]
