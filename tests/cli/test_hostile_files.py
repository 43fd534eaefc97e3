"""Model folders and runs that are broken, or made to do harm: one line each, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import hft_in_fork
from helpers import BASE
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.tensors import read_header

TRAIN = ("train", "+method=hft", "data=pocket_order", "data.test_path=null", "suite=none", "train.max_steps=1",
         "output_dir=run", "model.path=m")  # fmt: skip
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def refused(folder: Path, harm: Callable[[Path], Any], said: str) -> None:
    """`hft train` on a copy of the embedded model that was harmed is refused in one line."""
    harm(Path(shutil.copytree(BASE, folder / "m")))
    ended = hft_in_fork(folder, *TRAIN)
    assert ended.is_one_clear_line(said), ended


FIELDS = [
    ("hidden_size", "64"), ("hidden_size", [64]), ("hidden_size", None), ("hidden_size", 10**12), ("hidden_size", 128),
    ("num_attention_heads", 0), ("num_attention_heads", -1), ("num_attention_heads", "4"), ("num_key_value_heads", 0),
    ("num_key_value_heads", 3), ("num_hidden_layers", "two"), ("num_hidden_layers", 10**7), ("num_hidden_layers", -1),
    ("num_hidden_layers", 2.5), ("num_hidden_layers", True), ("vocab_size", 5), ("vocab_size", "x"),
    ("vocab_size", 10**12), ("intermediate_size", 0), ("max_position_embeddings", "x"), ("model_type", ["llama"]),
    ("tie_word_embeddings", "yes"), ("dtype", [1]), ("rope_scaling", 5), ("head_dim", "16"), ("eos_token_id", "x"),
    ("quantization_config", {"quant_method": "gptq"}), ("text_config", 5), ("architectures", "LlamaForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FIELDS)
def test_a_config_with_a_field_that_no_model_has(key, value, tmp_path):
    def harm(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {key: value}))

    said = {"quantization_config": "quantized"}.get(key, "m" if value in (5, 128) else key)
    refused(tmp_path, harm, said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "[1, 2]", "does not hold a JSON object"),
        ("config.json", "", "is not JSON"),
        ("config.json", DEEP, "is not JSON"),
        ("generation_config.json", "[1]", "does not hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id='x'"),
        ("tokenizer_config.json", DEEP, "is not JSON"),
        ("model.safetensors", "", "is no safetensors file"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a Git LFS pointer?"),
    ],
)
def test_a_file_of_another_content(name, text, said, tmp_path):
    refused(tmp_path, lambda model: (model / name).write_text(text), said)


def header(content: Any, data: bytes = b"1234", length: int | None = None) -> Callable[[Path], Any]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    return lambda model: (model / "model.safetensors").write_bytes(start + text + data)


def tensor(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


@pytest.mark.parametrize(
    "harm",
    [
        header({}, b"", 10**9), header(b"\xff" * 5_000_000, b""), header(b'{"a":' * 100_000), header([1, 2]),
        header({"a": 5}), header(tensor(dtype="F33")), header(tensor(dtype=["F32"])), header(tensor(shape=["x"])),
        header(tensor(shape=[1.5])), header(tensor(shape=[10**18, 10**18])), header(tensor(data_offsets=[0])),
        header(tensor(data_offsets=["0", "4"])), header(tensor(data_offsets=[0, -4], shape=[-1])),
        header(b'{"\xff\xfe": 1}'), header(tensor(data_offsets=[4, 8])), header(tensor(), b"12"),
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies(harm, tmp_path):
    refused(tmp_path, harm, "model.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ("../outside.safetensors", "Shards must lie in the folder itself"),
        ("/etc/passwd", "Shards must lie in the folder itself"),
        ("sub/a.safetensors", "Shards must lie in the folder itself"),
        ("nowhere.safetensors", "lacks nowhere.safetensors"),
        (5, "has no weight_map"),
    ],
)
def test_an_index_that_points_elsewhere(weight_map, said, tmp_path):
    def harm(model: Path) -> None:
        shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors")
        shards = dict.fromkeys(read_header(model / "model.safetensors"), weight_map)
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    refused(tmp_path, harm, said)


def _adapter_alone(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")


def _sharded(model: Path, index: dict[str, Any]) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    names = dict.fromkeys(read_header(model / "model-1.safetensors"), "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))


def _stored_as(dtype: torch.dtype) -> Callable[[Path], Any]:
    def harm(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, model / "model.safetensors")

    return harm


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda model: (model / "config.json").unlink(), "m has no config.json"),
        (_adapter_alone, "m holds an adapter and no model: merge it"),
        (lambda model: (model / "adapter_config.json").write_text("{}"), "m holds an adapter"),
        (lambda model: _sharded(model, {}), 'has no "metadata"'),
        (_stored_as(torch.float8_e4m3fn), "lm_head.weight as F8_E4M3. Weights are trained as F64, F32, F16, BF16"),
        (_stored_as(torch.int8), "lm_head.weight as I8"),
    ],
    ids=["no config", "adapter alone", "adapter left over", "index without metadata", "float8", "int8"],
)
def test_a_folder_that_is_no_model_to_train(harm, said, tmp_path):
    refused(tmp_path, harm, said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "bert"}, "is a bert model. It reads a text in both directions"),
        ({"model_type": "xlm-roberta", "is_decoder": False}, "It reads a text in both directions"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "is a t5 model with an encoder and a decoder"),
        ({"model_type": "bart"}, "is the decoder of a model with an encoder"),
        ({"model_type": "gemma3", "vision_config": {}}, "with more than text (vision_config"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "with more than text (audio_config"),
    ],
)
def test_a_model_that_is_no_causal_language_model(values, said, tmp_path):
    def harm(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    refused(tmp_path, harm, said)


def test_a_config_that_is_a_pipe_is_not_waited_for(tmp_path):
    def harm(model: Path) -> None:
        (model / "config.json").unlink()
        os.mkfifo(model / "config.json")

    refused(tmp_path, harm, "is not a file")


# ---------------------------------------------------------------------------------------------------------------- runs

READERS = [("verify", "run"), ("show", "draws", "run"), ("materialize", "run", "--out", "m"),
           ("publish", "run", "--out", "p")]  # fmt: skip
RECORDS = [
    ("plan.json", "[1]"), ("plan.json", "{}"), ("plan.json", '{"base": 5, "base_sha256": "x"}'), ("plan.json", DEEP),
    ("plan.json", '{"base": "x", "base_sha256": 5}'), ("draws.json", '{"rounds": "x"}'), ("draws.json", DEEP),
    ("draws.json", '{"rounds": [1]}'), ("draws.json", '{"rounds": [{}]}'), ("config.yaml", "[1]"), ("config.yaml", ""),
    ("config.yaml", "model: null"), ("config.yaml", "a: ["), ("config.yaml", "foo: 1"),
    ("config.yaml", "selection: {ratio: [1]}"), ("config.yaml", "data: {path: {a: 1}}"),
    ("config.yaml", '!!python/object/apply:os.mkdir ["ran"]'), ("rounds/01-order/frozen.json", '{"tensors": {"a": 5}}'),
    ("rounds/01-order/outcome.json", "[1]"), ("rounds/01-order/delta.safetensors", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), RECORDS)
def test_a_record_of_another_shape(name, text, hft_run, tmp_path):
    shutil.copytree(hft_run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    for words in READERS:
        ended = hft_in_fork(tmp_path, *words)
        assert "Traceback" not in ended.err, ended
        assert ended.status in (0, 1, 2), ended
        assert len(ended.err) < 1000, ended
        if ended.status == 2:
            assert ended.is_one_clear_line(), ended
        assert not (tmp_path / "ran").exists()
        for made in ("m", "p"):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
