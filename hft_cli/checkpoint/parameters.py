"""Every parameter of a causal language model: its shape, its layer, its kind, and the file tensors that hold it.

Importing this module imports only the standard library. A folder whose files already hold the module's own names is
read from the safetensors headers alone; any other is read with a weightless model and transformers' own name mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.conversion import Layout, converted, meta_model, shapes_of
from hft_cli.checkpoint.folders import stored_tensors
from hft_cli.checkpoint.naming import BUFFERS, PLAIN, Param, match, parameter_order, placing_rules, unplaced
from hft_cli.checkpoint.tensors import StoredTensor, same_bytes
from hft_cli.errors import UserError
from hft_cli.files import read_json

MOST_TOKENS = 2048  # of a row, unless train.max_length says more


def max_positions(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model reads, from its config; None if that does not say."""
    own = config.get("text_config") or config
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if own.get(key):
            return int(own[key])
    return None


def _params(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Iterable[str]], kinds: Mapping[str, str]
) -> tuple[Param, ...]:
    rules = placing_rules(kinds)
    placed = {name: match(name, shapes[name], rules) for name in sorted(shapes, key=parameter_order)}
    if missing := [name for name, found in placed.items() if found is None]:
        raise unplaced(missing)
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in shapes):
            raise UserError(f"model.kinds: '{pattern.pattern}' matches no parameter of this model. Remove it.")
    return tuple(
        Param(name, shapes[name], found[1], found[0], tuple(stored[name]))
        for name, found in placed.items()
        if found is not None
    )


def parameters_from_config(config_or_path: Any, kinds: Mapping[str, str] = {}) -> tuple[Param, ...]:
    """The parameters of the model that a config describes, in natural name order; `stored` is (name,) for each.

    Takes a transformers config, a folder with a config.json, or such a file. Builds the model without weights.

    Raises:
        UserError: transformers cannot build the model, or a parameter cannot be placed.
    """
    shapes = shapes_of(meta_model(config_or_path))
    return _params(shapes, {name: (name,) for name in shapes}, kinds)


def parameters_from_fields(config: Mapping[str, Any], kinds: Mapping[str, str] = {}) -> tuple[Param, ...] | None:
    """What `from_config` gives, from the fields of config.json alone and without torch; None unless the model type is
    in FIELDS and all the fields that its shapes hang on are there.

    Raises:
        UserError: `kinds` holds a bad expression or an unknown kind.
    """
    family = config.get("model_type")
    if family not in FIELDS or any(config.get(key) is None for key in (*_SIZES, *FIELDS[family])):
        return None
    hidden, inner, layers, heads, vocabulary = (config[key] for key in _SIZES)
    width = config.get("head_dim") or hidden // heads
    queries, keys = heads * width, (config.get("num_key_value_heads") or heads) * width
    inside: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight" if family == "olmo2" else "input_layernorm.weight": (hidden,),
    }
    if config.get("attention_bias") or family == "qwen2":
        biased = "qkv" if family == "qwen2" else "qkvo"
        inside |= {f"self_attn.{x}_proj.bias": inside[f"self_attn.{x}_proj.weight"][:1] for x in biased}
    if family in ("qwen3", "olmo2"):  # over each head, and over all of them
        inside["self_attn.q_norm.weight"] = (width if family == "qwen3" else queries,)
        inside["self_attn.k_norm.weight"] = (width if family == "qwen3" else keys,)
    if family == "mixtral":
        experts = config["num_local_experts"]
        inside["mlp.gate.weight"] = (experts, hidden)
        inside["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        inside["mlp.experts.down_proj"] = (experts, hidden, inner)
    else:
        matrices = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        inside |= {f"mlp.{name}.weight": shape for name, shape in matrices.items()}
        if config.get("mlp_bias"):
            inside |= {f"mlp.{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in inside.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return _params(shapes, {name: (name,) for name in shapes}, kinds)


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

# Model types whose shapes `from_fields` knows (none ties its head unless its config says so), and what else it needs of
# their configs, because the type's default is not one for all sizes.
FIELDS: dict[str, tuple[str, ...]] = {
    "llama": (), "olmo2": (), "mistral": ("num_key_value_heads",), "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"), "mixtral": ("num_key_value_heads", "num_local_experts"),
}  # fmt: skip


def parameters_from_folder(path: str | Path, kinds: Mapping[str, str] = {}) -> tuple[Param, ...]:
    """The parameters of the checkpoint in a folder, in natural name order, each with the file tensors that hold it.

    File tensors in no Param's `stored` are buffers: constants that the module holds itself or ignores on load.
    A model type in PLAIN whose names fit is read without importing torch.

    Raises:
        UserError: the folder or a file is broken, the weights are quantized, the files do not fit the model, a tied
            head differs from the embedding, or a parameter cannot be placed.
    """
    folder = Path(path)
    tensors = stored_tensors(folder)
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{folder} holds quantized weights, which cannot be trained. Use the unquantized checkpoint.")
    plain = _plain(config, tensors)
    shapes, stored, twins = plain if plain is not None else converted(meta_model(folder), tensors, folder)
    for first, second in twins:
        if not same_bytes(tensors[first], tensors[second]):
            raise UserError(
                f"{folder}: the config ties '{second}' to '{first}', but the files hold different values. "
                "Set tie_word_embeddings to false in its config.json to keep both."
            )
    return _params(shapes, stored, kinds)


def _plain(config: Mapping[str, Any], infos: Mapping[str, StoredTensor]) -> Layout | None:
    """The layout read from names alone; None unless the type is in PLAIN and its names leave no doubt."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.get("model_type") not in PLAIN:
        return None
    shapes = {name: info.shape for name, info in infos.items() if not re.search(BUFFERS[0], name)}
    layers: dict[int, set[tuple[str, tuple[int, ...]]]] = {}
    outside = set()
    for name, shape in shapes.items():
        placed = match(name, shape)
        if placed is None or not name.startswith(("model.", "lm_head.")):
            return None
        if placed[1] is None:
            outside.add(placed[0])
        else:
            layers.setdefault(placed[1], set()).add((name.split(".", 3)[3], shape))
    alike = len({frozenset(layer) for layer in layers.values()}) == 1
    if not alike or sorted(layers) != list(range(config.get("num_hidden_layers", 0))):
        return None
    tied = config.get("tie_word_embeddings", PLAIN[config["model_type"]])
    if embedding not in shapes or "norm" not in outside or (not tied and head not in shapes):
        return None
    stored = {name: [name] for name in shapes}
    if not tied or head not in shapes:
        return shapes, stored, []
    del shapes[head], stored[head]
    stored[embedding].append(head)
    return shapes, stored, [(embedding, head)]
