"""Files written whole or not at all, and plain values as dataclasses."""

from __future__ import annotations

import json
import os
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError, choose


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """Build a config dataclass, nested ones too, from plain values such as a sealed config.yaml holds.

    Raises:
        UserError: for a key that the dataclass does not have, with the nearest one.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        choose("key", where + key, [where + name for name in hints])
    return cls(
        **{
            key: from_dict(hints[key], value, f"{where}{key}.") if is_dataclass(hints[key]) else value
            for key, value in values.items()
        }
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, then rename."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs may write the same cache at once
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: if the file is missing, cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
