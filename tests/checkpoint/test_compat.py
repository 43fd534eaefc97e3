"""What we rely on in transformers although it is not documented. A failure names the function to look at."""

from __future__ import annotations

import inspect

import pytest
import torch
from architectures import config_of, random_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from hft_cli.checkpoint.compat import NameMapping, file_tensors


def test_the_functions_of_the_loader_have_their_parameters() -> None:
    assert list(inspect.signature(rename_source_key).parameters)[:5] == [
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ]  # fmt: skip
    assert list(inspect.signature(revert_weight_conversion).parameters)[:2] == ["model", "state_dict"]
    required = [
        name
        for name, parameter in inspect.signature(get_model_conversion_mapping).parameters.items()
        if parameter.default is parameter.empty
    ]
    assert required == ["model"]


def test_a_model_names_the_tensors_that_its_loader_ignores() -> None:
    assert PreTrainedModel._keys_to_ignore_on_load_unexpected is None
    mapping = NameMapping(random_model("gpt_neox"))
    assert mapping.is_ignored("gpt_neox.layers.1.attention.masked_bias")


def test_the_conversions_of_a_model_are_renamings_and_converters() -> None:
    entries = get_model_conversion_mapping(random_model("mixtral"))
    assert {type(entry) for entry in entries} == {WeightConverter, WeightRenaming}
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    assert all(entry.source_patterns and entry.target_patterns for entry in converters)


@pytest.mark.parametrize(
    ("name", "tensor", "target"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("gpt2", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_a_file_tensor_is_mapped_to_its_parameter(name: str, tensor: str, target: str) -> None:
    assert NameMapping(random_model(name)).target(tensor) == (target, False)


def test_tied_weights_and_constants_are_known() -> None:
    mapping = NameMapping(random_model("llama tied"))
    assert dict(mapping.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert mapping.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not mapping.is_ignored("model.layers.0.self_attn.q_proj.scale")


def test_one_parameter_is_converted_without_weights_of_the_model() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    experts = torch.randn(model.get_parameter(name).shape)
    written = file_tensors(model, {name: experts})
    assert list(written) == [f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight" for i in range(len(experts))]
    assert all(torch.equal(part, whole) for part, whole in zip(written.values(), experts, strict=True))
