"""What is in conf/: the options of a group as plain values, and the experiments with their sizes and sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from hft_cli.errors import UserError, choose
from hft_cli.paths import conf_dir, group_options

SIZES = ("paper", "pocket")  # folders of conf/experiment; the first that has an experiment is its default size


def groups() -> list[str]:
    """The names of all groups, sorted."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def options_of(group: str) -> dict[str, dict[str, Any]]:
    """Option of a group -> the values in its file. For groups whose files do not include others."""
    return {name: _read(f"{group}/{name}") for name in group_options(group)}


def experiments() -> list[str]:
    """The names of all experiments, sorted."""
    return sorted({name for size in SIZES for name in group_options(f"experiment/{size}")})


def experiment_option(name: str, size: str | None) -> str:
    """The option of group `experiment` for experiment=NAME size=SIZE: SIZE/NAME.

    Args:
        name: an experiment, or already an option such as pocket/trace.
        size: one of SIZES; None takes the paper's size if there is one.

    Raises:
        UserError: for an unknown experiment or size, or a size that the experiment does not have.
    """
    folder, _, base = name.rpartition("/")
    choose("experiment", base or name, experiments())
    sizes = [size for size in SIZES if base in group_options(f"experiment/{size}")]
    wanted = size or folder or sizes[0]
    choose("size", wanted, SIZES)
    if wanted not in sizes:
        raise UserError(f"experiment={base} has one size only: leave out size={wanted}.")
    return f"{wanted}/{base}"


def sweep_params(option: str) -> dict[str, str]:
    """What an option of group `experiment` sweeps: key -> values, separated by commas."""
    params: dict[str, str] = {}
    for values in _files(option):
        params |= values.get("hydra", {}).get("sweeper", {}).get("params", {})
    return params


def needs_data_path(option: str) -> bool:
    """Whether the data that an option of group `experiment` chooses have no path of their own (TRACE)."""
    entries = [entry for values in _files(option) for entry in values.get("defaults", []) if isinstance(entry, dict)]
    names = [entry["override /data"] for entry in entries if "override /data" in entry]
    return bool(names) and "path" not in _read(f"data/{names[-1]}")


def _files(option: str) -> Iterator[dict[str, Any]]:
    """The values in the files that an experiment includes, and in its own, which come last and take precedence."""
    values = _read(f"experiment/{option}")
    for entry in values.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/experiment/"):
            yield from _files(entry.removeprefix("/experiment/"))
    yield values


def _read(option: str) -> dict[str, Any]:
    values: dict[str, Any] | None = yaml.safe_load((conf_dir() / f"{option}.yaml").read_text(encoding="utf-8"))
    return values or {}
