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
    kind = config.get("model_type")
    if kind not in KNOWN_SHAPES or any(config.get(key) is None for key in (*_SIZES, *KNOWN_SHAPES[kind])):
        return None
    hidden, inner, layers, heads, vocabulary = (config[key] for key in _SIZES)
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    matrices = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden)}
    matrices |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}
    biased = list(matrices) if config.get("attention_bias") else []
    if kind == "qwen2":
        biased = list(matrices)[:3]
    norms = {"post_attention_layernorm": hidden}
    norms["post_feedforward_layernorm" if kind == "olmo2" else "input_layernorm"] = hidden
    if kind in ("qwen3", "olmo2"):  # over each head, and over all heads
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
        norms |= {"self_attn.q_norm": queries, "self_attn.k_norm": keys} if kind == "olmo2" else {}
    layer: Shapes = {}
    if kind == "mixtral":
        experts = config["num_local_experts"]
        matrices["mlp.gate"] = (experts, hidden)
        layer["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        layer["mlp.experts.down_proj"] = (experts, hidden, inner)
    else:
        names = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        matrices |= dict(zip(names, [(inner, hidden), (inner, hidden), (hidden, inner)], strict=True))
        biased += names if config.get("mlp_bias") else []
    layer |= {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {f"{name}.bias": matrices[name][:1] for name in biased}
    layer |= {f"{name}.weight": (width,) for name, width in norms.items()}
    shapes: Shapes = {f"model.layers.{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes
