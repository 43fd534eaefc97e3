"""Claims about `hft_cli.layout`, over small random models of every architecture it is meant for."""

# ruff: noqa: C408 - configs are tables of keyword arguments, which dict() writes without quotes

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hft_cli.checkpoint import naming
from hft_cli.checkpoint.architectures import SAME_NAMES
from hft_cli.checkpoint.conversion import to_stored
from hft_cli.checkpoint.folders import checkpoint_files
from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.checkpoint.tensors import read_header
from hft_cli.errors import UserError
from hft_cli.plan import costs

BASE = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT = dict(vocab_size=48, n_embd=16, n_layer=3, n_head=4, n_positions=32, n_inner=24, bos_token_id=1, eos_token_id=2)
OPT = dict(
    vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32
)
MOE = BASE | dict(num_experts=12, moe_intermediate_size=8, num_experts_per_tok=2)
WIDE = BASE | dict(head_dim=4)

# What each architecture must give in its last layer: the units of each kind, space-separated.
QKVO = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
GUD = "mlp.gate_proj mlp.up_proj mlp.down_proj"
TWO = "input_layernorm post_attention_layernorm"
FOUR = TWO + " pre_feedforward_layernorm post_feedforward_layernorm"
QK = " self_attn.q_norm self_attn.k_norm"
EXPERTS = "mlp.experts.gate_up_proj mlp.experts.down_proj"
H4 = "mlp.dense_h_to_4h mlp.dense_4h_to_h"

# name: (model_type, config, attention, feed_forward, norm, router)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, str, str, str]] = {
    "llama": ("llama", BASE, QKVO, GUD, TWO, ""),
    "llama tied": ("llama", BASE | dict(tie_word_embeddings=True), QKVO, GUD, TWO, ""),
    "llama with biases": ("llama", BASE | dict(attention_bias=True, mlp_bias=True), QKVO, GUD, TWO, ""),
    "mistral": ("mistral", BASE, QKVO, GUD, TWO, ""),
    "qwen2": ("qwen2", BASE, QKVO, GUD, TWO, ""),
    "qwen3": ("qwen3", WIDE, QKVO, GUD, TWO + QK, ""),
    "gemma": ("gemma", WIDE, QKVO, GUD, TWO, ""),
    "gemma2": ("gemma2", WIDE, QKVO, GUD, FOUR, ""),
    "gemma3": ("gemma3_text", WIDE, QKVO, GUD, FOUR + QK, ""),
    "olmo": ("olmo", BASE, QKVO, GUD, "", ""),
    "olmo2": ("olmo2", BASE, QKVO, GUD, "post_attention_layernorm post_feedforward_layernorm" + QK, ""),
    "olmo3": ("olmo3", BASE, QKVO, GUD, "post_attention_layernorm post_feedforward_layernorm" + QK, ""),
    "phi3": ("phi3", BASE, "self_attn.qkv_proj self_attn.o_proj", "mlp.gate_up_proj mlp.down_proj", TWO, ""),
    "phi": ("phi", BASE, QKVO.replace("o_proj", "dense"), "mlp.fc1 mlp.fc2", "input_layernorm", ""),
    "stablelm": ("stablelm", BASE, QKVO, GUD, TWO, ""),
    "stablelm with norms per head": (
        "stablelm", BASE | dict(qk_layernorm=True), QKVO, GUD,
        TWO + "".join(f" self_attn.q_layernorm.norms.{head}" for head in range(4))
        + "".join(f" self_attn.k_layernorm.norms.{head}" for head in range(2)), "",
    ),
    "cohere": ("cohere", BASE | dict(use_qk_norm=True), QKVO, GUD, "input_layernorm" + QK, ""),
    "cohere2": ("cohere2", BASE, QKVO, GUD, "input_layernorm", ""),
    "granite": ("granite", BASE, QKVO, GUD, TWO, ""),
    "smollm3": ("smollm3", BASE, QKVO, GUD, TWO, ""),
    "starcoder2": ("starcoder2", BASE, QKVO, "mlp.c_fc mlp.c_proj", TWO, ""),
    "glm": ("glm", WIDE, QKVO, "mlp.gate_up_proj mlp.down_proj", TWO, ""),
    "glm4": (
        "glm4", WIDE, QKVO, "mlp.gate_up_proj mlp.down_proj",
        TWO + " post_self_attn_layernorm post_mlp_layernorm", "",
    ),
    "nemotron": ("nemotron", BASE, QKVO, "mlp.up_proj mlp.down_proj", TWO, ""),
    "gpt2": ("gpt2", GPT, "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "ln_1 ln_2", ""),
    "gpt_bigcode": ("gpt_bigcode", GPT, "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "ln_1 ln_2", ""),
    "gptj": (
        "gptj", GPT | dict(rotary_dim=4), "attn.q_proj attn.k_proj attn.v_proj attn.out_proj",
        "mlp.fc_in mlp.fc_out", "ln_1", "",
    ),
    "gpt_neox": ("gpt_neox", BASE, "attention.query_key_value attention.dense", H4, TWO, ""),
    "bloom": (
        "bloom", dict(vocab_size=48, hidden_size=16, n_layer=3, n_head=4),
        "self_attention.query_key_value self_attention.dense", H4, TWO, "",
    ),
    "mpt": (
        "mpt", dict(vocab_size=48, d_model=16, n_layers=3, n_heads=4, max_seq_len=32, expansion_ratio=2),
        "attn.Wqkv attn.out_proj", "ffn.up_proj ffn.down_proj", "norm_1 norm_2", "",
    ),
    "opt": ("opt", OPT, QKVO.replace("o_proj", "out_proj"), "fc1 fc2", "self_attn_layer_norm final_layer_norm", ""),
    "opt with projected embeddings": (
        "opt", OPT | dict(word_embed_proj_dim=8, do_layer_norm_before=False), QKVO.replace("o_proj", "out_proj"),
        "fc1 fc2", "self_attn_layer_norm final_layer_norm", "",
    ),
    "falcon": (
        "falcon", dict(vocab_size=48, hidden_size=16, num_hidden_layers=3, num_attention_heads=4),
        "self_attention.query_key_value self_attention.dense", H4, "input_layernorm", "",
    ),
    "falcon, new decoder": (
        "falcon", dict(vocab_size=48, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_kv_heads=2,
                       new_decoder_architecture=True),
        "self_attention.query_key_value self_attention.dense", H4, "ln_attn ln_mlp", "",
    ),
    "mixtral": ("mixtral", BASE | dict(num_local_experts=12), QKVO, EXPERTS, TWO, "mlp.gate"),
    "qwen3_moe": (
        "qwen3_moe", MOE | dict(head_dim=4, decoder_sparse_step=1, mlp_only_layers=[0]), QKVO, EXPERTS, TWO + QK,
        "mlp.gate",
    ),
    "qwen2_moe": (
        "qwen2_moe", MOE | dict(shared_expert_intermediate_size=8), QKVO,
        EXPERTS + " mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj", TWO,
        "mlp.gate mlp.shared_expert_gate",
    ),
    "olmoe": ("olmoe", MOE, QKVO, EXPERTS, TWO + QK, "mlp.gate"),
    "deepseek_v3": (
        "deepseek_v3",
        BASE | dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8,
                    first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                    v_head_dim=4),
        "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj",
        EXPERTS + " mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj",
        TWO + " self_attn.q_a_layernorm self_attn.kv_a_layernorm", "mlp.gate",
    ),
    "granitemoe": (
        "granitemoe", BASE | dict(num_local_experts=3, num_experts_per_tok=2), QKVO,
        EXPERTS.replace("mlp", "block_sparse_moe"), TWO, "block_sparse_moe.router",
    ),
}  # fmt: skip

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
PLAIN = [name for name, (model_type, *_) in ARCHITECTURES.items() if model_type in SAME_NAMES]


def config_of(name: str) -> Any:
    model_type, values, *_ = ARCHITECTURES[name]
    return AutoConfig.for_model(model_type, **values)


@cache
def params_of(name: str) -> tuple[Param, ...]:
    return parameters_from_config(config_of(name))


@cache
def random_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():  # biases and norms start out constant, which would hide a mix-up
        for param in model.parameters():
            param.normal_()
    return model


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


def bare(params: tuple[Param, ...]) -> list[Param]:
    return [replace(param, stored=()) for param in params]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


# Kinds and layers


@every_architecture
def test_each_parameter_of_a_layer_gets_its_kind(name: str) -> None:
    params = params_of(name)
    last = [param for param in params if param.layer == 2]
    found = {
        kind: sorted({param.unit.split(".2.", 1)[1] for param in last if param.kind == kind}) for kind in naming.KINDS
    }
    attention, feed_forward, norm, router = (sorted(units.split()) for units in ARCHITECTURES[name][2:])
    assert found == {
        "attention": attention, "feed_forward": feed_forward, "norm": norm, "router": router,
        "embedding": [], "head": [],
    }  # fmt: skip


@every_architecture
def test_params_are_the_trainable_parameters_with_their_shapes(name: str) -> None:
    params = params_of(name)
    expected = {key: tuple(value.shape) for key, value in random_model(name).named_parameters()}
    assert {param.name: param.shape for param in params} == expected
    assert sum(param.elements for param in params) == sum(p.numel() for p in random_model(name).parameters())


@every_architecture
def test_what_can_be_trained_can_be_planned(name: str) -> None:
    """As every run's plan is made before it starts."""
    config = config_of(name).to_dict()
    params = params_of(name)
    shape = costs.shape(config.get("text_config") or config, params)
    everything = frozenset(p.name for p in params)
    for stage in (None, 1, 2, 3):
        setup = costs.Setup(stage, 2 if stage else 1, "bfloat16", rows=2, length=64)
        needed = costs.memory(params, everything, shape, setup)
        assert min(vars(needed).values()) >= 0
        assert needed.activations > 0
        assert costs.flops(params, everything, shape, setup, 8, 64).total > 0


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("llama", {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}),
        ("llama tied", {"model.embed_tokens": "embedding", "model.norm": "norm"}),
        ("phi", {"model.embed_tokens": "embedding", "model.final_layernorm": "norm", "lm_head": "head"}),
        ("gpt2", {"transformer.wte": "embedding", "transformer.wpe": "embedding", "transformer.ln_f": "norm"}),
        ("gpt_neox", {"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "lm_head": "head"}),
        (
            "opt",
            {
                "model.decoder.embed_tokens": "embedding",
                "model.decoder.embed_positions": "embedding",
                "model.decoder.final_layer_norm": "norm",
            },
        ),
        ("falcon", {"transformer.word_embeddings": "embedding", "transformer.ln_f": "norm"}),
    ],
)
def test_embeddings_head_and_final_norm_are_outside_the_layers(name: str, outside: dict[str, str]) -> None:
    assert {param.unit: param.kind for param in params_of(name) if param.layer is None} == outside


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


def test_a_bias_shares_the_unit_of_its_matrix_and_experts_are_their_own_unit() -> None:
    def unit(name: str) -> str:
        return Param(name, (1,), 0, "attention", (name,)).unit

    assert unit("model.layers.0.self_attn.q_proj.bias") == unit("model.layers.0.self_attn.q_proj.weight")
    assert unit("model.layers.0.mlp.experts.down_proj") == "model.layers.0.mlp.experts.down_proj"
    assert unit("model.layers.0.mlp.experts.down_proj_bias") == "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mamba.A_log",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.x.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_nothing_is_guessed(name: str) -> None:
    with pytest.raises(UserError, match="Cannot place parameter '" + name):
        naming.make_params({name: (4, 4)}, {name: (name,)}, {})


def test_an_unplaced_parameter_is_named_with_an_override_that_places_it() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=48, hidden_size=16, num_hidden_layers=3, state_size=4)
    with pytest.raises(UserError, match=r"'backbone\.layers\.0\.mixer\.A_log' \(and \d+ more\)") as error:
        parameters_from_config(config)
    override = str(error.value).split("'")[3]
    assert override == "model.kinds={mixer.A_log: KIND}"
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    assert parser.parse_override(override).value() == {"mixer.A_log": "KIND"}
    params = parameters_from_config(config, {"mixer": "attention"})
    assert {(param.kind, param.layer) for param in params if "mixer" in param.name} == {
        ("attention", 0), ("attention", 1), ("attention", 2)
    }  # fmt: skip


def test_a_vision_tower_is_refused() -> None:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = AutoConfig.for_model("gemma3", text_config=WIDE, vision_config=vision | dict(patch_size=14))
    with pytest.raises(UserError, match=r"vision_tower|multi_modal"):
        parameters_from_config(config)


def test_the_users_map_wins_over_the_patterns() -> None:
    name = "model.layers.7.self_attn.q_norm.weight"
    assert naming.classify(name, (4,)) == ("norm", 7)
    rules = naming.parse_rules({"q_norm": "attention", "norm": "head"})
    assert naming.classify(name, (4,), rules) == ("attention", 7)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"q_proj": "atention"}, "Did you mean 'attention'"),
        ({"q_proj(": "attention"}, "not a regular expression"),
        ({"q_proj": "attention", "qproj": "attention"}, "'qproj' matches no parameter"),
    ],
)
def test_a_mistake_in_the_users_map_is_refused(kinds: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameters_from_config(config_of("llama"), kinds)


# Folders


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


@every_architecture
def test_each_parameter_alone_goes_back_to_its_file_tensors_bit_for_bit(
    name: str, saved: Callable[[str], Path]
) -> None:
    files = load_file(saved(name) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(saved(name))
    params = parameters_from_folder(saved(name))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_of(name))
    for param in params:
        tensor = loaded.get_parameter(param.name)
        assert same_bits(tensor, random_model(name).get_parameter(param.name))  # the folder loads
        for model in (loaded, empty):
            written = to_stored(model, {param.name: tensor}, params)
            assert set(written) == set(param.stored)
            assert all(same_bits(written[key], files[key]) for key in written), param.name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_give_the_same_params_as_one_file(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert parameters_from_folder(tmp_path) == parameters_from_folder(saved(name))
    files = checkpoint_files(tmp_path)
    for key, file in files.items():
        with safe_open(file, "pt") as opened:
            assert key in opened.keys()  # noqa: SIM118


def test_names_without_the_prefix_and_old_masks_are_read_as_the_hub_has_them_for_gpt2(
    edited: Callable[..., Path],
) -> None:
    def as_on_the_hub(tensors: dict[str, Any]) -> dict[str, Any]:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
        return {key.removeprefix("transformer."): value for key, value in tensors.items()} | masks

    folder = edited("gpt2", as_on_the_hub)
    params = parameters_from_folder(folder)
    assert bare(params) == bare(parameters_from_config(config_of("gpt2")))
    assert all(param.stored == (param.name.removeprefix("transformer."),) for param in params)
    files = load_file(folder / "model.safetensors")
    for model in (AutoModelForCausalLM.from_pretrained(folder), random_model("gpt2")):
        written = to_stored(model, dict(model.named_parameters()), params)
        assert set(files) - set(written) == {f"h.{layer}.attn.bias" for layer in range(3)}
        assert all(same_bits(written[key], files[key]) for key in written)


def test_experts_without_the_prefix_are_cut_under_the_folders_own_names(edited: Callable[..., Path]) -> None:
    folder = edited("mixtral", lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    params = parameters_from_folder(folder)
    files = load_file(folder / "model.safetensors")
    written = to_stored(random_model("mixtral"), dict(random_model("mixtral").named_parameters()), params)
    assert set(written) == set(files)
    assert all(same_bits(written[key], files[key]) for key in files)


def test_experts_saved_merged_stay_merged(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    params = parameters_from_folder(tmp_path)
    assert all(param.stored == (param.name,) for param in params)
    files = load_file(tmp_path / "model.safetensors")
    for model in (random_model("mixtral"), AutoModelForCausalLM.from_pretrained(tmp_path)):
        written = to_stored(model, dict(model.named_parameters()), params)
        assert set(written) == set(files)
        assert all(same_bits(written[key], files[key]) for key in files)


def test_a_model_read_in_one_layout_is_not_written_in_another(saved: Callable[[str], Path], tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="Cannot write"):
        to_stored(merged, dict(merged.named_parameters()), parameters_from_folder(saved("mixtral")))


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
def test_a_tied_head_that_the_file_repeats_belongs_to_the_embedding(
    name: str, embedding: str, edited: Callable[..., Path]
) -> None:
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
        parameters_from_folder(tmp_path, {"": "attention"})


def test_quantized_weights_are_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="quantized"):
        parameters_from_folder(edited("llama", quantization_config={"quant_method": "gptq"}))


def test_an_architecture_unknown_to_transformers_is_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="cannot build a causal language model"):
        parameters_from_folder(edited("llama", model_type="no_such_model"))


# The fast path

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


@pytest.mark.parametrize("model_type", SAME_NAMES)
def test_known_types_have_the_default_tying_of_transformers(model_type: str) -> None:
    assert SAME_NAMES[model_type] == AutoConfig.for_model(model_type).tie_word_embeddings


def test_a_folder_of_seven_billion_parameters_takes_less_than_50_ms(tmp_path: Path) -> None:
    per_layer = [f"{unit}.weight" for unit in f"{QKVO} {GUD} {TWO}".split()]
    names = [f"model.layers.{layer}.{rest}" for layer in range(32) for rest in per_layer]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    save_file({name: torch.zeros(1, 1) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 32}))
    times = []
    for _ in range(10):
        start = time.process_time()  # not the clock: other tests run beside this one
        assert len(parameters_from_folder(tmp_path)) == 291
        times.append(time.process_time() - start)
    assert min(times) < 0.05


# Files


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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "no checkpoint folder"),
        ("no config", "no config.json"),
        ("no weights", "no model.safetensors"),
        ("only bin", r"only pytorch_model.bin. Convert .*save_pretrained"),
        ("lost shard", r"lacks model-00002-of-.*Fetch"),
        ("wrong index", "is not in model-00001-of"),
        ("broken index", "index.json is not JSON"),
    ],
)
def test_an_incomplete_folder_is_refused_with_the_fix(fault: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder, max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    if fault == "no folder":
        shutil.rmtree(folder)
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault in ("no weights", "only bin"):
        for file in folder.glob("model*"):
            file.unlink()
        if fault == "only bin":
            (folder / "pytorch_model.bin").touch()
    elif fault == "lost shard":
        next(folder.glob("model-00002-of-*")).unlink()
    elif fault == "wrong index":
        shards = json.loads(index.read_text())
        first = next(folder.glob("model-00001-of-*")).name
        index.write_text(json.dumps({"weight_map": dict.fromkeys(shards["weight_map"], first)}))
    else:
        index.write_text("{")
    with pytest.raises(UserError, match=message):
        parameters_from_folder(folder)
