"""A tiny config for every type of causal language model that the installed transformers knows."""

# ruff: noqa: C408 - configs are tables of keyword arguments, which dict() writes without quotes

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

# Fields of config.json -> their values in a tiny model, where the type has such a field with a number.
SIZES = dict(
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "kv_channels", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "index_topk"), 8),
    **dict.fromkeys(("linear_head_dim", "mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("state_size", "time_step_rank", "mamba_dt_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_heads",), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("index_n_heads", "mamba_expand", "n_mamba_heads"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    mamba_d_ssm=64,
)  # fmt: skip

LATENT = dict(num_key_value_heads=4, head_dim=4)  # multi-head latent attention: all heads have keys of their own
ROPE = dict(rope_theta=10_000.0, rope_type="default")

# Fields that must fit each other, or that the type has no default for -> the model types with them.
FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa youtu minicpm3 kimi_linear", LATENT),
    ("bailing_hybrid dots3_note_text longcat_flash", LATENT),
    ("bailing_hybrid", dict(num_expert_group=1, topk_group=1)),
    ("bailing_hybrid kimi_linear", dict(layer_types=["linear_attention", "full_attention"] * 2)),
    ("bamba", dict(attn_layer_indices=[1, 3])),
    ("cohere_compass_text", dict(rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE))),
    ("deepseek_v2", dict(topk_group=None, n_group=None, num_experts_per_tok=2)),
    ("dots1", dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)),
    ("dots3_note_text", dict(per_layer_config={}, head_dim=8)),
    ("gemma3n_text gemma4_text", dict(hidden_size_per_layer_input=8)),
    ("gemma3n_text", dict(num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)),
    ("gemma3n_text", dict(layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[48] * 4)),
    ("gemma4_text", dict(global_head_dim=8)),
    ("gpt_neo", dict(attention_types=[[["global", "local"], 2]])),
    ("granitemoehybrid", dict(layer_types=["mamba", "attention"] * 2, shared_intermediate_size=16)),
    ("hunyuan_v1_dense hunyuan_v1_moe ministral", dict(head_dim=8)),
    ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)),
    ("lfm2 lfm2_moe", dict(layer_types=["conv", "full_attention"] * 2)),
    ("longcat_flash", dict(zero_expert_num=2)),
    ("mamba2", dict(num_heads=8)),
    ("nemotron", dict(num_key_value_heads=2)),
    ("qwen4_exp_text", dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8)),
    ("qwen4_exp_text", dict(indexer_compress_ratio=2, hc_lowrank=4)),
    ("xlstm", dict(hidden_size=128, embedding_dim=128, num_blocks=4, chunk_size=16)),
    ("zamba", dict(layers_block_type=["linear_attention", "hybrid"] * 2, attention_hidden_size=64)),
    ("zamba", dict(attention_head_dim=16)),
    ("zamba2", dict(layers_block_type=["mamba", "hybrid"] * 2)),
    ("zaya", dict(num_experts_per_tok=1)),
)


def tiny_config(model_type: str, vocabulary: int = 64) -> Any:
    """The default config of a model type, with four layers of 32 features."""
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class().to_dict()
    values = {key: size for key, size in SIZES.items() if isinstance(defaults.get(key), int)}
    values |= {key: vocabulary for key in defaults if key.startswith("vocab_size")}
    tokens = enumerate(("pad_token_id", "bos_token_id", "eos_token_id"))
    values |= {name: number for number, name in tokens if name in defaults}
    for model_types, fields in FIELDS:
        values |= fields if model_type in model_types.split() else {}
    return config_class(**values)
