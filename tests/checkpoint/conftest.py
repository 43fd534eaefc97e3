"""Fixtures: checkpoint folders of the architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from architectures import random_model
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture's random model, written once by save_pretrained."""

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("model")
        random_model(name).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def edited(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an architecture's folder whose tensors went through `change`, and whose config took `config`."""

    def edit(name: str, change: Callable[[dict[str, Any]], dict[str, Any]] = dict, **config: Any) -> Path:
        tensors = change(load_file(saved(name) / "model.safetensors"))
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
        old = json.loads((saved(name) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(old | config))
        return tmp_path

    return edit
