"""The text part of a model for images or sound (`model.part=text`): its config, and the names of its tensors.

The part is a causal language model of its own, such as Gemma3ForCausalLM in Gemma 3. Only it is built, loaded, drawn
from and trained. The other tensors of the files stay as they are, byte for byte.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError, first_line

_LANGUAGE = r"^(?:model\.)?(?:language_model|text_model)\."

# Names in files -> names in the text model, as regular expressions, in this order.
KEY_MAPPING = {rf"{_LANGUAGE}lm_head\.": "lm_head.", rf"{_LANGUAGE}(?:model\.)?": "model."}


def text_name(tensor: str) -> str | None:
    """The name of a file tensor in the text model; None if it is no part of it."""
    for pattern, start in KEY_MAPPING.items():
        if re.match(pattern, tensor):
            return re.sub(pattern, start, tensor)
    return tensor if tensor.startswith("lm_head.") else None


def text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name in the text model -> file tensor, of all that belong to it."""
    return {name: tensor for tensor in tensors if (name := text_name(tensor)) is not None}


def text_fields(config: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """The fields of the text model in a config.json.

    Raises:
        UserError: if it has none.
    """
    fields = config.get("text_config")
    if not isinstance(fields, dict) or not fields:
        raise UserError(f"model.part=text: {where} has no text_config in its config.json. Leave model.part out.")
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**tied, **fields}


def text_config(folder: str | Path) -> Any:
    """The transformers config of the text model in a folder.

    Raises:
        UserError: if transformers has no causal language model for it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a faulty config fails in many ways
        raise UserError(f"transformers cannot read the config.json of {folder}: {first_line(error)}") from error
    config = copy.deepcopy(whole.get_text_config())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config is whole or type(config) is type(whole):
        raise UserError(
            f"model.part=text: the text model of {folder}, {config.model_type}, is no causal language model of "
            "transformers by itself."
        )
    config.tie_word_embeddings = whole.tie_word_embeddings
    return config


def load_options(folder: str | Path, part: str | None) -> dict[str, Any]:
    """Options of `AutoModelForCausalLM.from_pretrained` for `model.part`."""
    return {} if part is None else {"config": text_config(folder), "key_mapping": KEY_MAPPING}
