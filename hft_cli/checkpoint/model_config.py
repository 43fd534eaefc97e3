"""A model's config.json and the other small files of its folder, checked for values that no model has. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import without_config
from hft_cli.checkpoint.text_part import text_fields
from hft_cli.errors import UserError, cut_off
from hft_cli.files import read_json

# Whole numbers of a config.json, by the names that the architectures of transformers give them -> the largest that is
# believed. Larger ones would take hours to plan, or all memory.
LAYERS, SIZES = 10_000, 1 << 31
NUMBERS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size",
         "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim", "vocab_size",
         "max_position_embeddings", "n_positions", "num_local_experts", "num_experts", "n_routed_experts",
         "num_experts_per_tok"),
        SIZES,
    ),
}  # fmt: skip

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # never null, where they are keys

MAY_BE_ZERO = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")

# Other fields that decide what is trained -> their types.
TYPES: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "architectures": (list,),
    "tie_word_embeddings": (bool,),
    "dtype": (str,),
    "torch_dtype": (str,),
    "rope_scaling": (dict,),
    "rope_parameters": (dict,),
    "quantization_config": (dict,),
    "text_config": (dict,),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (int, list)),
}

BOTH_DIRECTIONS = "It reads a text in both directions, so that predicting its next token has no meaning"
MORE_THAN_TEXT = "It is for more than text"

# Why a model is no causal language model that can be trained -> its types.
REFUSED = {
    BOTH_DIRECTIONS: (
        "albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
        "distilbert", "electra", "ernie", "megatron-bert", "modernbert", "mpnet", "reformer", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ),
    "It is the decoder of a model with an encoder": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen", "musicgen_melody",
        "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
    ),
    MORE_THAN_TEXT: (
        "emu3", "fuyu", "gemma4", "gemma4_unified", "git", "moshi", "phi4_multimodal",
    ),
    "It drafts tokens for another model": ("gemma4_assistant", "gemma4_unified_assistant"),
    "It has several stacks of layers, with inputs of their own": ("blt", "cpmant", "hrm_text"),
    "Its head does more to the logits than TRL knows": ("modernbert-decoder",),
}  # fmt: skip

# Of those, the types that read a text in one direction if is_decoder says so.
MAY_DECODE = REFUSED[BOTH_DIRECTIONS]

# Files of a folder that are JSON objects, and are read when a run is over.
OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def read_model_config(file: Path, part: str | None = None) -> dict[str, Any]:
    """The content of a config.json.

    Args:
        part: model.part; with "text" the model may be for more than text.

    Raises:
        UserError: if it cannot be read, a field has a value that no model has, or it is no causal language model's.
    """
    if file.name == "config.json" and not file.exists():
        raise UserError(without_config(file.parent))
    config = read_json(file)
    check_model_config(config, str(file))
    where = file.parent if file.name == "config.json" else file
    _require_language_model(text_fields(config, where) if part else config, where)
    return config


def _require_language_model(config: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for a model that does not predict the next token of a text from those before it."""
    kind = config.get("model_type")
    decodes = config.get("is_decoder") is True and kind in MAY_DECODE
    if not decodes and (reason := next((reason for reason, kinds in REFUSED.items() if kind in kinds), None)):
        fix = "Give a causal language model, such as Llama."
        if reason == MORE_THAN_TEXT and isinstance(config.get("text_config"), dict):
            fix = "Set model.part=text to train its text model alone."
        raise UserError(f"{where} is a {kind} model. {reason}. {fix}")
    if config.get("is_encoder_decoder") is True:
        raise UserError(
            f"{where} is a {kind} model with an encoder and a decoder. hft trains decoders only, such as Llama."
        )
    if other := next((key for key in ("vision_config", "audio_config") if isinstance(config.get(key), dict)), None):
        raise UserError(
            f"{where} is a {kind} model with more than text ({other} of its config.json). Set model.part=text to train "
            "its text model alone."
        )


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Check the fields of a config.json, and those of the text model in it, for type and size.

    Raises:
        UserError: for the first field that is wrong.
    """
    for key, value in config.items():
        if key in NUMBERS and not (value is None and key not in REQUIRED):
            low, high = 0 if key in MAY_BE_ZERO else 1, NUMBERS[key]
            # Some architectures give a number for each layer.
            for number in value if isinstance(value, list) and key not in REQUIRED else [value]:
                if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                    raise UserError(
                        f"{where} has {key}={cut_off(repr(value), 40)}. It must be a whole number from {low} to {high}."
                    )
        kinds = TYPES.get(key)
        if kinds and value is not None and (not isinstance(value, kinds) or (kinds[0] is int and value is True)):
            names = " or ".join(_NAMES[kind] for kind in kinds)
            raise UserError(f"{where} has {key}={cut_off(repr(value), 40)}. It must be {names}.")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(f"{where} has num_attention_heads={heads}, which num_key_value_heads={groups} does not divide.")
    if isinstance(config.get("text_config"), dict):
        check_model_config(config["text_config"], f"{where}, text_config,")


def check_companions(folder: Path) -> None:
    """Check that the small files beside the weights can be read: they are needed when a model is written.

    Raises:
        UserError: for the first that cannot.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json) beside the model, which transformers would add to it. "
            "Move the adapter to a folder of its own, or merge it into the model."
        )
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists() and index.exists() and "metadata" not in read_json(index):
        raise UserError(
            f'{index} has no "metadata", without which transformers does not read it: add "metadata": {{}}.'
        )
    for name in OBJECTS:
        if (folder / name).exists():
            check_model_config(read_json(folder / name), str(folder / name))


_NAMES = {str: "text", list: "a list", bool: "true or false", dict: "an object", int: "a whole number"}
