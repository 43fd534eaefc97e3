"""Small random models of every supported architecture."""

# ruff: noqa: C408 - configs are tables of keyword arguments, which dict() writes without quotes

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_config

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


def bare(params: tuple[Param, ...]) -> list[Param]:
    return [replace(param, stored=()) for param in params]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


_FIELDS = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
# config.json of models whose shapes follow from its fields.
FAMILIES: dict[str, dict[str, Any]] = {
    name: _FIELDS | fields
    for name, fields in {
        "llama": {"model_type": "llama", "num_key_value_heads": 4},
        "llama with groups": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        "llama with a tied head": {"model_type": "llama", "tie_word_embeddings": True},
        "mistral": {"model_type": "mistral", "head_dim": 32},
        "qwen2": {"model_type": "qwen2"},
        "qwen3": {"model_type": "qwen3", "head_dim": 32},
        "olmo2": {"model_type": "olmo2"},
        "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    }.items()
}
