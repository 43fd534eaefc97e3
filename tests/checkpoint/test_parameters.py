"""The parameters of a folder or a config: their shapes, their file tensors, and files that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BASE, GUD, QKVO, TWO, bare, config_of, params_of, random_model, same_bits
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from hft_cli.checkpoint.architectures import SAME_NAMES
from hft_cli.checkpoint.conversion import meta_model, read_layout, to_stored
from hft_cli.checkpoint.folders import checkpoint_files, stored_tensors
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.checkpoint.tensors import read_header
from hft_cli.errors import UserError

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
PLAIN = [name for name, (model_type, *_) in ARCHITECTURES.items() if model_type in SAME_NAMES]


@every_architecture
def test_params_are_the_trainable_parameters_with_their_shapes(name: str) -> None:
    params = params_of(name)
    expected = {key: tuple(value.shape) for key, value in random_model(name).named_parameters()}
    assert {param.name: param.shape for param in params} == expected
    assert sum(param.elements for param in params) == sum(p.numel() for p in random_model(name).parameters())


def test_the_callers_config_is_left_as_it_is() -> None:
    config = config_of("llama")
    before = dict(vars(config))
    parameters_from_config(config)
    assert vars(config) == before


def test_layers_and_experts_are_listed_in_numeric_order(saved: Callable[[str], Path]) -> None:
    layers = [
        param.layer
        for param in parameters_from_config(AutoConfig.for_model("llama", **BASE | {"num_hidden_layers": 12}))
    ]
    inner = [layer for layer in layers if layer is not None]
    assert inner == sorted(inner)
    down = next(param for param in parameters_from_folder(saved("mixtral")) if param.name.endswith("down_proj"))
    assert [int(tensor.split(".")[-3]) for tensor in down.stored] == list(range(12))


@every_architecture
def test_folder_and_config_give_the_same_params(name: str, saved: Callable[[str], Path]) -> None:
    params = parameters_from_folder(saved(name))
    assert bare(params) == bare(params_of(name)) == bare(parameters_from_config(saved(name)))


@every_architecture
def test_every_file_tensor_belongs_to_exactly_one_parameter(name: str, saved: Callable[[str], Path]) -> None:
    stored = [tensor for param in parameters_from_folder(saved(name)) for tensor in param.stored]
    files = set(read_header(saved(name) / "model.safetensors"))
    assert len(stored) == len(set(stored))
    assert files - set(stored) == {key for key, _ in random_model(name).named_buffers() if key in files}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_give_the_same_params_as_one_file(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert parameters_from_folder(tmp_path) == parameters_from_folder(saved(name))
    files = checkpoint_files(tmp_path)
    for key, file in files.items():
        with safe_open(file, "pt") as opened:
            assert key in opened.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("llama", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
            ],
        ),
    ],
)
def test_constants_of_old_checkpoints_are_no_parameters(
    name: str, constants: list[str], edited: Callable[..., Path]
) -> None:
    folder = edited(name, lambda tensors: tensors | {key: torch.ones(4) for key in constants})
    params = parameters_from_folder(folder)
    assert bare(params) == bare(params_of(name))
    assert not {tensor for param in params for tensor in param.stored} & set(constants)


TIED = [("llama tied", "model.embed_tokens.weight"), ("falcon", "transformer.word_embeddings.weight")]


@pytest.mark.parametrize(("name", "embedding"), TIED)
def test_a_repeated_tied_head_belongs_to_the_embedding(name: str, embedding: str, edited: Callable[..., Path]) -> None:
    folder = edited(name, lambda tensors: tensors | {"lm_head.weight": tensors[embedding]})
    params = parameters_from_folder(folder)
    assert [param.stored for param in params if param.kind in ("embedding", "head")] == [(embedding, "lm_head.weight")]
    written = to_stored(random_model(name), {embedding: random_model(name).get_parameter(embedding)}, params)
    assert set(written) == {embedding, "lm_head.weight"}
    assert same_bits(*written.values())


@pytest.mark.parametrize(("name", "embedding"), TIED)
def test_a_tied_head_that_differs_from_the_embedding_is_refused(
    name: str, embedding: str, edited: Callable[..., Path]
) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        head = tensors[embedding].clone()
        head[-1, -1] += 1
        return tensors | {"lm_head.weight": head}

    with pytest.raises(UserError, match="tie_word_embeddings"):
        parameters_from_folder(edited(name, change))


def test_a_tied_embedding_stored_only_as_the_head_is_found(edited: Callable[..., Path]) -> None:
    folder = edited("llama tied", lambda tensors: {
        key.replace("model.embed_tokens", "lm_head"): value for key, value in tensors.items()
    })  # fmt: skip
    params = parameters_from_folder(folder)
    assert [param.stored for param in params if param.kind == "embedding"] == [("lm_head.weight",)]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same_bits(loaded.lm_head.weight, random_model("llama tied").lm_head.weight)


Q = {"llama": "model.layers.1.self_attn.q_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("fault", ["lost", "extra", "misshapen", "head lost", "layer lost"])
def test_files_that_do_not_fit_the_config_are_refused(name: str, fault: str, edited: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        key = Q[name]
        if fault == "lost":
            return {other: value for other, value in tensors.items() if other != key}
        if fault == "extra":
            return tensors | {key.replace(".weight", ".scale"): torch.ones(1)}
        if fault == "misshapen":
            return tensors | {key: tensors[key][1:]}
        if fault == "layer lost":
            return {other: value for other, value in tensors.items() if ".2." not in other}
        ends = {"llama": "lm_head.weight", "gpt2": "ln_f.weight"}[name]
        return {other: value for other, value in tensors.items() if not other.endswith(ends)}

    named = {
        "lost": Q[name], "extra": Q[name].replace("weight", "scale"), "misshapen": Q[name],
        "head lost": {"llama": "lm_head", "gpt2": "ln_f"}[name], "layer lost": ".2.",
    }  # fmt: skip
    with pytest.raises(UserError, match=named[fault]):
        parameters_from_folder(edited(name, spoil))


def test_file_tensors_that_hold_several_parameters_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("hrm_text", **BASE))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds several parameters"):
        read_layout(meta_model(tmp_path), stored_tensors(tmp_path), tmp_path)


def test_quantized_weights_are_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="quantized"):
        parameters_from_folder(edited("llama", quantization_config={"quant_method": "gptq"}))


def test_an_architecture_unknown_to_transformers_is_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="cannot build a causal language model"):
        parameters_from_folder(edited("llama", model_type="no_such_model"))


PROBE = """
import sys
from hft_cli.checkpoint.parameters import parameters_from_folder
print(*(param for folder in sys.argv[1:] for param in parameters_from_folder(folder)), sep="\\n")
heavy = {"torch", "numpy", "transformers", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


def test_known_types_are_read_without_importing_torch(
    saved: Callable[[str], Path], edited: Callable[..., Path]
) -> None:
    assert {ARCHITECTURES[name][0] for name in PLAIN} == set(SAME_NAMES)
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    folders = [*(saved(name) for name in PLAIN), edited("llama", lambda tensors: tensors | constant)]
    run = subprocess.run([sys.executable, "-c", PROBE, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(param) for folder in folders for param in parameters_from_folder(folder)]


def test_billions_of_parameters_are_read_by_their_header(tmp_path: Path) -> None:
    """The file is sparse: its header describes 24 GB, which are not read."""
    units = f"{QKVO} {GUD} {TWO}".split()
    names = [f"model.layers.{layer}.{unit}.weight" for layer in range(32) for unit in units]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    size = 4 * 4096 * 5120
    header = {
        name: {"dtype": "F32", "shape": [4096, 5120], "data_offsets": [number * size, (number + 1) * size]}
        for number, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + len(names) * size)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 32}))
    assert len(parameters_from_folder(tmp_path)) == 291
