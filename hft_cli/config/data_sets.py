"""Training sets and test sets of a data config, and values that differ between tasks."""

from __future__ import annotations

from typing import Any

from hft_cli.config.schema import DataConfig, MixedSet
from hft_cli.config.settings import check_settings
from hft_cli.errors import UserError, first_line, nearest_hint
from hft_cli.files import from_dict

MIX_FORM = "Write it as '[{path: general.jsonl, share: 0.01}]'."


def as_paths(value: Any) -> tuple[str, ...]:
    """data.path or data.test_path as a tuple of paths; null is the empty tuple."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def training_sets(data: DataConfig) -> tuple[str, ...]:
    """The path of the training rows of each round."""
    return tuple(f"{data.path}/{task}" for task in data.tasks) if data.tasks else as_paths(data.path)


def count_rounds(data: DataConfig) -> int:
    """The number of rounds that train: one for each training set, or one for the sets of data.mix alone."""
    return len(training_sets(data)) or int(bool(data.mix))


def mixed_sets(data: DataConfig) -> tuple[MixedSet, ...]:
    """The sets of data.mix.

    Raises:
        UserError: if it is no list of sets, or a key or a value of a set is not allowed.
    """
    if data.mix is None:
        return ()
    if not isinstance(data.mix, list):
        raise UserError(f"data.mix={data.mix} is not a list. {MIX_FORM}")
    return tuple(_mixed_set(values, f"data.mix[{number}]") for number, values in enumerate(data.mix))


def _mixed_set(values: Any, where: str) -> MixedSet:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(values, dict):
        raise UserError(f"{where}={values} is not an object. {MIX_FORM}")
    from_dict(MixedSet, values, f"{where}.")  # names unknown keys
    try:
        mixed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MixedSet), values))
    except OmegaConfBaseException as error:
        if "path" not in values:
            raise UserError(f"{where} has no path. {MIX_FORM}") from None
        raise UserError(f"{where}.{error.full_key}: {first_line(error)}") from None
    check_settings(mixed, f"{where}.")
    if mixed.share is not None and mixed.rows is not None:
        raise UserError(f"{where} has a share and a number of rows: give one of them.")
    return mixed  # type: ignore[no-any-return]


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
