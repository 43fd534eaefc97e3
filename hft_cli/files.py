"""JSON and text files that are written completely or not at all, and dataclasses from plain values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError, choose, short

LARGEST_JSON = 1 << 28  # bytes


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write the same cache
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: after a power failure, a renamed or removed file is that again."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # a file system that does not sync folders
        pass
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all files below a folder, and their names, on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when it is complete and on the disk. After an error it is removed."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        sync_tree(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    sync_folder(out.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: if the file cannot be read, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path} is not a file.")
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} has {path.stat().st_size} bytes: too many for the JSON file that it should be.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({short(error)}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def read_record(path: Path, kind: Any) -> dict[str, Any]:
    """Read a JSON object that hft wrote, which must have the fields of the dataclass `kind`, and may have more.

    Raises:
        UserError: as `read_json`, or with the first value that is wrong.
    """
    value = read_json(path)
    require_type(value, kind, path)
    return value


def require_type(value: Any, kind: Any, where: Any) -> Any:
    """Plain values as the type `kind`. Raise UserError, which names the first value that is wrong, if they are not."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is not as hft wrote it: {place}: {first['msg']}. Restore it from a copy.") from None


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def finite(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: the value is no number, or is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"a score or measure is {value}")
    return value


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """Build a config dataclass, with the dataclasses in it, from the plain values of a user's config.

    Raises:
        UserError: for a key that the dataclass does not have, with the nearest one.
    """
    hints = typing.get_type_hints(cls)
    for key in values:
        choose("key", f"{where}{key}", [where + name for name in hints])
        if is_dataclass(hints[key]) and not isinstance(values[key], dict):
            raise UserError(f"{where}{key} is a group of keys, and not {values[key]!r}.")
    return cls(
        **{
            key: from_dict(hints[key], value, f"{where}{key}.") if is_dataclass(hints[key]) else value
            for key, value in values.items()
        }
    )


def hash_values(*values: Any) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@cache
def hash_code(folder: Path) -> str:
    """SHA-256 (hex) of the Python files in a folder: a part of the keys of what they make."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def flatten(values: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested dicts as one dict with keys joined by the separator. An empty dict is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}{separator}", separator)
        else:
            flat[prefix + key] = value
    return flat
