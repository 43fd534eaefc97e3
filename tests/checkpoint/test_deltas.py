"""A base and deltas make a model, bit for bit and in constant memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.deltas import apply_deltas
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.tensors import same_bytes
from hft_cli.errors import UserError


def checkpoint(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "notes.bin").write_bytes(b"not wanted")
    names = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


SHARDS = [
    {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4)},
    {"c": torch.randn(2, 2, 2).half(), "mask": torch.tensor([True, False]), "n": torch.arange(5)},
]


@pytest.mark.parametrize("shards", [[SHARDS[0] | SHARDS[1]], SHARDS], ids=["one file", "sharded"])
def test_a_model_is_the_base_with_the_delta_over_it(tmp_path, shards):
    base = checkpoint(tmp_path / "base", shards)
    delta = {"b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half()}
    save_file(delta, tmp_path / "delta.safetensors")
    apply_deltas(base, [tmp_path / "delta.safetensors"], tmp_path / "out", {"chat_template.jinja": "{{ x }}"})
    made, expected = everything(tmp_path / "out"), everything(base) | delta
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ x }}"
    assert (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/notes.bin").exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("delta", [{"a": torch.zeros(5, 3)}, {"z": torch.zeros(2)}], ids=["shape", "name"])
def test_a_delta_that_does_not_fit_is_refused(tmp_path, delta):
    base = checkpoint(tmp_path / "base", SHARDS)
    save_file(delta, tmp_path / "delta.safetensors")
    with pytest.raises(UserError, match=r"has [az] with shape \[.*\], which .* does not have. Give the base"):
        apply_deltas(base, [tmp_path / "delta.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for number, size in enumerate((4 << 20, 32 << 20)):  # elements of the one big tensor: 16 and 128 MB
        base = checkpoint(tmp_path / f"base{number}", [{"big": torch.zeros(size)}])
        save_file({"big": torch.ones(size)}, tmp_path / "delta.safetensors")
        tracemalloc.start()
        apply_deltas(base, [tmp_path / "delta.safetensors"], tmp_path / f"out{number}")
        assert not same_bytes(stored_tensors(base)["big"], stored_tensors(tmp_path / f"out{number}")["big"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 16 << 20
    assert peaks[1] < 1.2 * peaks[0]
