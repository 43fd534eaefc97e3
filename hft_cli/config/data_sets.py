"""Training sets and test sets of a data config, and values that differ between tasks."""

from __future__ import annotations

import difflib
from typing import Any

from hft_cli.config.schema import DataConfig
from hft_cli.errors import UserError


def as_paths(value: Any) -> tuple[str, ...]:
    """data.path or data.test_path as a tuple: nothing, one place or several."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def training_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the rows of each round are."""
    return tuple(f"{data.path}/{task}" for task in data.tasks) if data.tasks else as_paths(data.path)


def test_sets(data: DataConfig) -> tuple[str, ...]:
    """Where the test rows are: of none, of all rounds together, or of each round."""
    return training_sets(data) if data.tasks else as_paths(data.test_path)


def test_format(data: DataConfig) -> str:
    """The shape of test rows: that of the training rows, where both are a task's; otherwise told from the first row."""
    return data.format if data.tasks else "auto"


def value_for_task(key: str, value: Any, task: str) -> Any:
    """A task's own value of a key that holds one for all tasks or a map from task to value.

    Raises:
        UserError: if the map lacks the task.
    """
    if not isinstance(value, dict):
        return value
    if task not in value:
        near = difflib.get_close_matches(task, value, n=1)
        hint = f"; did you mean '{near[0]}'" if near else ""
        raise UserError(
            f"{key} has nothing for {task} (it has: {', '.join(value) or 'nothing'}{hint}). Give one value for all, "
            f"{key}=…, or one for each task, '{key}={{{task}: …, …}}'."
        )
    return value[task]
