"""Layouts of checkpoints that were read before. To read one anew, torch and transformers are loaded, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.conversion import Layout
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError
from hft_cli.files import hash_code, hash_values, read_json, write_json
from hft_cli.paths import user_cache


def known_layout(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], part: str | None, read: Callable[[], Layout]
) -> Layout:
    """The layout of a checkpoint: from the user's cache, or what `read` returns, which is kept there.

    It depends on config.json, the names and shapes of the tensors, model.part, transformers, and the code here.

    Raises:
        UserError: as `read` does; nothing is kept then.
    """
    shapes = sorted((name, tensor.shape) for name, tensor in tensors.items())
    code = hash_code(Path(__file__).parent)
    key = hash_values(code, metadata.version("transformers"), config, shapes, part)
    file = user_cache() / "layouts" / f"{key}.json"
    with suppress(OSError, UserError, AttributeError, KeyError, TypeError, ValueError):
        return _from_json(read_json(file))
    layout = read()
    with suppress(OSError):  # a cache that cannot be written costs time only
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(layout))
    return layout


def _from_json(values: dict[str, Any]) -> Layout:
    shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
    return Layout(shapes, values["stored"], [(first, second) for first, second in values["copies"]])
