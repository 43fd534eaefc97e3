"""Training sets and test sets of a data config, and values that differ between tasks."""

from __future__ import annotations

from typing import Any

from hft_cli.config.schema import DataConfig
from hft_cli.errors import UserError, nearest_hint


def as_paths(value: Any) -> tuple[str, ...]:
    """data.path or data.test_path as a tuple of paths; null is the empty tuple."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def training_sets(data: DataConfig) -> tuple[str, ...]:
    """The path of the training rows of each round."""
    return tuple(f"{data.path}/{task}" for task in data.tasks) if data.tasks else as_paths(data.path)


def test_sets(data: DataConfig) -> tuple[str, ...]:
    """The paths of the test rows: none, one for all rounds, or one for each round."""
    return training_sets(data) if data.tasks else as_paths(data.test_path)


def test_format(data: DataConfig) -> str:
    """The shape of the test rows: with data.tasks that of the training rows, otherwise "auto"."""
    return data.format if data.tasks else "auto"


def value_for_task(key: str, value: Any, task: str) -> Any:
    """The value of `key` for `task`, if the key holds one value for all tasks or a map from task to value.

    Raises:
        UserError: if the map does not have the task.
    """
    if not isinstance(value, dict):
        return value
    if task not in value:
        raise UserError(
            f"{key} has no value for {task} (it has: {', '.join(value) or 'none'}).{nearest_hint(task, value)} Give "
            f"one value for all, {key}=…, or one for each task, '{key}={{{task}: …, …}}'."
        )
    return value[task]
