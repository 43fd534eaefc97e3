"""Layouts of checkpoints that were read before. To read one anew, torch and transformers are loaded, in seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from typing import Any

from hft_cli.checkpoint.conversion import Layout
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError
from hft_cli.files import read_json, write_json
from hft_cli.paths import user_cache

FORMAT = 1  # of the files; to raise when hft reads layouts in another way


def known_layout(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], part: str | None, read: Callable[[], Layout]
) -> Layout:
    """The layout of a checkpoint: from the user's cache, or what `read` returns, which is kept there.

    It depends on config.json, the names and shapes of the tensors, model.part, and the version of transformers.

    Raises:
        UserError: as `read` does; nothing is kept then.
    """
    shapes = sorted((name, tensor.shape) for name, tensor in tensors.items())
    known_by = json.dumps([FORMAT, config, shapes, part, metadata.version("transformers")])
    file = user_cache() / "layouts" / f"{hashlib.sha256(known_by.encode()).hexdigest()}.json"
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
