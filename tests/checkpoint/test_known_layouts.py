"""A layout that was read once is read again without transformers, and anew when anything that it depends on changes."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint import known_layouts, parameters
from hft_cli.checkpoint.architectures import SAME_NAMES
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.errors import UserError


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hft" / "layouts"


@pytest.fixture
def built(monkeypatch) -> list[Any]:
    """The models that were built with transformers."""
    made, build = [], parameters.meta_model
    monkeypatch.setattr(parameters, "meta_model", lambda *given: made.append(given) or build(*given))
    return made


@pytest.mark.parametrize("name", [name for name, (kind, *_) in ARCHITECTURES.items() if kind not in SAME_NAMES])
def test_the_second_reading_is_the_first_without_transformers(name, saved, built):
    first = parameters_from_folder(saved(name)), parameters_from_config(saved(name) / "config.json")
    assert len(built) == 2
    assert (parameters_from_folder(saved(name)), parameters_from_config(saved(name) / "config.json")) == first
    assert len(built) == 2


def test_what_it_depends_on_is_read_anew(saved, built, monkeypatch, tmp_path):
    folder = Path(shutil.copytree(saved("gpt2"), tmp_path / "model"))
    before = parameters_from_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": config["n_positions"] + 1}))
    with pytest.raises(UserError, match=r"disagree on the shape of 'transformer\.wpe\.weight'"):
        parameters_from_folder(folder)
    with pytest.raises(UserError, match="disagree on the shape"):  # a fault is not kept
        parameters_from_folder(folder)
    assert len(built) == 3
    tensors = load_file(folder / "model.safetensors")
    table = next(name for name in tensors if name.endswith("wpe.weight"))
    longer = {**tensors, table: torch.cat([tensors[table], tensors[table][:1]])}
    save_file(longer, folder / "model.safetensors", {"format": "pt"})
    after = {param.name: param.shape for param in parameters_from_folder(folder)}
    assert after["transformer.wpe.weight"][0] == config["n_positions"] + 1
    assert after.keys() == {param.name for param in before}
    assert len(built) == 4
    version = metadata.version
    monkeypatch.setattr(
        known_layouts.metadata, "version", lambda name: "9.9.9" if name == "transformers" else version(name)
    )
    parameters_from_folder(folder)
    assert len(built) == 5
    monkeypatch.setattr(known_layouts, "hash_code", lambda _: "of other code")
    parameters_from_folder(folder)
    assert len(built) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shapes": 1}', '{"shapes": {"a": 1}}'])
def test_a_broken_file_of_the_cache_is_made_again(content, saved, built, cache):
    first = parameters_from_folder(saved("gpt2"))
    (file,) = cache.glob("*.json")
    whole = file.read_text()
    file.write_text(content)
    assert parameters_from_folder(saved("gpt2")) == first
    assert len(built) == 2
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(saved, built, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert parameters_from_folder(saved("gpt2")) == parameters_from_folder(saved("gpt2"))
    assert len(built) == 2
