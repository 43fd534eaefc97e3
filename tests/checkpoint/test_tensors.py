"""Bytes of weights: written by our writer and read by safetensors, laid together, and refused where they do not fit."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.deltas import apply_deltas
from hft_cli.checkpoint.folders import model_folder, stored_tensors
from hft_cli.checkpoint.tensors import Writer, read_header, same_bytes
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


def test_the_writer_makes_files_that_safetensors_reads(tmp_path):
    given = SHARDS[0] | SHARDS[1]
    source = tmp_path / "source.safetensors"
    save_file(given, source)
    headers = read_header(source)
    with Writer(tmp_path / "copy.safetensors", headers, {"format": "pt"}) as writer, source.open("rb") as file:
        for name, info in headers.items():
            file.seek(info.start)
            writer.add(name, [file.read(info.stop - info.start)])
    copy = load_file(tmp_path / "copy.safetensors")
    assert copy.keys() == given.keys()
    assert all(torch.equal(copy[name], given[name]) and copy[name].dtype == given[name].dtype for name in given)
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("wrong", ["order", "size", "too few", "error"])
def test_a_file_that_is_not_what_was_announced_never_gets_its_name(tmp_path, wrong):
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "source.safetensors")
    headers = read_header(tmp_path / "source.safetensors")

    def write() -> None:
        with Writer(tmp_path / "out.safetensors", headers, {}) as writer:
            if wrong == "error":
                raise ValueError("the disk is full")
            writer.add("b" if wrong == "order" else "a", [bytes(4 if wrong == "size" else 8)])

    with pytest.raises(ValueError, match=r"expected|ends before b|disk is full"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


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
def test_a_delta_that_does_not_fit_is_refused_and_writes_nothing(tmp_path, delta):
    base = checkpoint(tmp_path / "base", SHARDS)
    save_file(delta, tmp_path / "delta.safetensors")
    with pytest.raises(UserError, match=r"has [az] with shape \[.*\], which .* does not have. Give the base"):
        apply_deltas(base, [tmp_path / "delta.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_same_bytes_tells_bits_apart_not_values(tmp_path):
    for name, value in {"zero": 0.0, "minus": -0.0, "nan": float("nan"), "again": float("nan")}.items():
        checkpoint(tmp_path / name, [{"x": torch.full((1000,), value)}])
    place = {path.name: stored_tensors(path)["x"] for path in tmp_path.iterdir()}
    assert not same_bytes(place["zero"], place["minus"])
    assert same_bytes(place["nan"], place["again"])


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


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_model_that_is_not_there_is_a_users_mistake(path):
    with pytest.raises(UserError, match=f"model.path={path} is not a folder"):
        model_folder(path)
