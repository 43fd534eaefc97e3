"""What config.json says of a model without its weights: shapes, positions, tied embeddings. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_MAX_LENGTH = 2048  # tokens of a row, if neither train.max_length nor the model sets a smaller number

# Model types whose files hold the module's own names under `model.`, and whose layers all have the same parameters. The
# value is the type's default of tie_word_embeddings, which config.json may leave out.
SAME_NAMES = {
    "llama": False, "mistral": False, "qwen2": False, "qwen3": False, "gemma": True, "gemma2": True,
    "gemma3_text": True, "olmo2": False, "olmo3": False, "phi3": False, "phi": False, "stablelm": False,
    "cohere": True, "cohere2": True, "granite": False, "smollm3": True, "starcoder2": True, "glm": False,
    "glm4": False, "nemotron": False,
}  # fmt: skip

# Model types whose shapes follow from the fields of config.json, and the fields that they need besides _SIZES, because
# the type's default does not fit all sizes. None of them ties its head unless the config says so.
KNOWN_SHAPES: dict[str, tuple[str, ...]] = {
    "llama": (), "olmo2": (), "mistral": ("num_key_value_heads",), "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"), "mixtral": ("num_key_value_heads", "num_local_experts"),
}  # fmt: skip
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

Shapes = dict[str, tuple[int, ...]]  # parameter name -> shape


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The number of positions (tokens) of a model; None if its config does not say."""
    text_config = config.get("text_config") or config
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if text_config.get(key):
            return int(text_config[key])
    return None


def shapes_from_fields(config: Mapping[str, Any]) -> Shapes | None:
    """The shapes of all parameters; None unless the model type and the fields are in KNOWN_SHAPES."""
    model_type = config.get("model_type")
    if model_type not in KNOWN_SHAPES or any(config.get(key) is None for key in (*_SIZES, *KNOWN_SHAPES[model_type])):
        return None
    hidden, _, layers, _, vocabulary = (config[key] for key in _SIZES)
    layer = _attention_shapes(config) | _norm_shapes(config) | _feed_forward_shapes(config)
    shapes = {f"model.layers.{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def _head_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The size of one head, of all query heads and of all key heads."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return size, heads * size, (config.get("num_key_value_heads") or heads) * size


def _attention_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, model_type = config["hidden_size"], config["model_type"]
    _, queries, keys = _head_sizes(config)
    matrices = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    shapes: Shapes = {f"self_attn.{name}_proj.weight": shape for name, shape in matrices.items()}
    if config.get("attention_bias") or model_type == "qwen2":
        biased = "qkv" if model_type == "qwen2" else "qkvo"
        shapes |= {f"self_attn.{name}_proj.bias": matrices[name][:1] for name in biased}
    return shapes


def _norm_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, model_type = config["hidden_size"], config["model_type"]
    head, queries, keys = _head_sizes(config)
    other = "post_feedforward_layernorm" if model_type == "olmo2" else "input_layernorm"
    shapes: Shapes = {"post_attention_layernorm.weight": (hidden,), f"{other}.weight": (hidden,)}
    if model_type == "qwen3":  # over each head
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if model_type == "olmo2":  # over all heads
        shapes |= {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}
    return shapes


def _feed_forward_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if config["model_type"] == "mixtral":
        experts = config["num_local_experts"]
        return {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
            "mlp.experts.down_proj": (experts, hidden, inner),
        }
    matrices = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: Shapes = {f"mlp.{name}.weight": shape for name, shape in matrices.items()}
    if config.get("mlp_bias"):
        shapes |= {f"mlp.{name}.bias": shape[:1] for name, shape in matrices.items()}
    return shapes
