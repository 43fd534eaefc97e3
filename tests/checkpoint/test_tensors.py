"""Safetensors files: headers are read as safetensors reads them, files that do not fit are refused, bits are kept."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.tensors import CHUNK, StoredTensor, Writer, read_bytes, read_header, same_bytes, same_each
from hft_cli.errors import UserError


def test_a_header_says_what_safetensors_says(saved: Callable[[str], Path]) -> None:
    file = saved("llama") / "model.safetensors"
    infos, data, tensors = read_header(file), file.read_bytes(), load_file(file)
    assert set(infos) == set(tensors)
    for name, info in infos.items():
        assert (info.dtype, info.shape) == ("F32", tuple(tensors[name].shape))
        assert data[info.start : info.stop] == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.3, 0.999, -1])
def test_a_truncated_file_is_refused(kept: float, saved: Callable[[str], Path], tmp_path: Path) -> None:
    data = (saved("llama") / "model.safetensors").read_bytes()
    cut = int(len(data) * kept) if 0 < kept < 1 else int(kept)
    (tmp_path / "cut.safetensors").write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"cut\.safetensors.* Fetch"):
        read_header(tmp_path / "cut.safetensors")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": GOOD | {"data_offsets": [0, 4]}},
        {"a": GOOD | {"dtype": "F33"}},
        {"a": GOOD | {"shape": [3]}},
        {"a": GOOD | {"shape": [-1, -2]}},
        {"a": GOOD | {"shape": 2}},
        {"a": GOOD, "b": GOOD},
        {"a": {}},
        ["a"],
    ],
)
def test_a_header_that_does_not_fit_is_refused(header: Any, tmp_path: Path) -> None:
    def write(header: Any) -> Path:
        text = json.dumps(header).encode()
        (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        return tmp_path / "file"

    assert read_header(write({"a": GOOD}))["a"].shape == (2,)
    with pytest.raises(UserError, match="Fetch"):
        read_header(write(header))


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS"):
        read_header(tmp_path / "file")


TENSORS = {
    "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4),
    "c": torch.randn(2, 2, 2).half(), "mask": torch.tensor([True, False]), "n": torch.arange(5),
}  # fmt: skip


def test_the_writer_makes_files_that_safetensors_reads(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "source.safetensors")
    header = read_header(tmp_path / "source.safetensors")
    with Writer(tmp_path / "copy.safetensors", header, {"format": "pt"}) as writer:
        for name, tensor in header.items():
            writer.add(name, read_bytes(tensor))
    copy = load_file(tmp_path / "copy.safetensors")
    assert copy.keys() == TENSORS.keys()
    assert all(torch.equal(copy[name], TENSORS[name]) and copy[name].dtype == TENSORS[name].dtype for name in TENSORS)
    with safe_open(tmp_path / "copy.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("wrong", ["order", "size", "too few", "error"])
def test_an_incomplete_file_never_gets_its_name(tmp_path, wrong):
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


def test_same_bytes_compares_bits_not_values(tmp_path: Path) -> None:
    values = {"zero": 0.0, "minus": -0.0, "nan": float("nan"), "other nan": float("nan")}
    arrays = {name: torch.full((1000,), value) for name, value in values.items()}
    save_file(arrays | {"integers": torch.zeros(1000, dtype=torch.int32)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    assert not same_bytes(tensors["zero"], tensors["integers"])
    assert not same_bytes(tensors["zero"], tensors["minus"])
    assert same_bytes(tensors["nan"], tensors["other nan"])


def test_rows_of_a_tensor_are_a_tensor(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(4, 3)
    save_file({"long": table, "short": table[:3].clone(), "wide": torch.zeros(4, 5)}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    long, short = tensors["long"], tensors["short"]
    assert same_bytes(long.rows(0, 3), short)
    assert b"".join(read_bytes(long.rows(1, 4))) == table[1:].numpy().tobytes()
    assert long.extends(short)
    assert not any(long.extends(other) for other in (long, tensors["wide"]))
    assert not short.extends(long)


@pytest.fixture
def large(tmp_path) -> StoredTensor:
    """A tensor of two and a half chunks, after a smaller one."""
    values = torch.arange(5 * CHUNK // 8, dtype=torch.float32)
    save_file({"a": torch.zeros(3), "large": values}, tmp_path / "large.safetensors")
    return read_header(tmp_path / "large.safetensors")["large"]


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK - 1, 5 * CHUNK // 2 - 1])
def test_a_bit_that_differs_is_found_in_every_chunk(large, place, tmp_path):
    content = bytearray(large.file.read_bytes())
    content[large.start + place] ^= 1
    (tmp_path / "other.safetensors").write_bytes(content)
    other = read_header(tmp_path / "other.safetensors")["large"]
    assert same_bytes(large, large)
    assert not same_bytes(large, other)
    assert list(same_each([(large, large), (large, other), (other, other)])) == [True, False, True]


@pytest.mark.parametrize("bytes_in_kernel", [None, 0, 7, CHUNK + 1])
def test_a_copy_is_the_same_if_the_system_copies_a_part_of_it(large, bytes_in_kernel, tmp_path, monkeypatch):
    copy = os.copy_file_range

    def partly(source: int, target: int, count: int, begin: int) -> int:
        if not bytes_in_kernel or begin > large.start:
            raise OSError(errno.EXDEV, "another file system")
        return copy(source, target, min(bytes_in_kernel, count), begin)

    if bytes_in_kernel is not None:
        monkeypatch.setattr(os, "copy_file_range", partly)
    rows = [large.rows(1000, large.shape[0]), large.rows(0, 1000)]
    with Writer(tmp_path / "copy.safetensors", {"t": replace(large, start=0, stop=large.size)}, {}) as writer:
        writer.copy("t", rows)
    copied = read_header(tmp_path / "copy.safetensors")["t"]
    assert b"".join(map(bytes, read_bytes(copied))) == b"".join(bytes(c) for row in rows for c in read_bytes(row))


def test_a_file_that_becomes_shorter_is_no_model(large, tmp_path):
    os.truncate(large.file, large.stop - 1)
    with (
        pytest.raises(UserError, match="ends early"),
        Writer(tmp_path / "copy.safetensors", {"t": replace(large, start=0, stop=large.size)}, {}) as writer,
    ):
        writer.copy("t", [large])
    assert not (tmp_path / "copy.safetensors").exists()
