"""Whether two config.json give weights the same meaning: what differs, and whether it changes what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.model_config import read_model_config
from hft_cli.errors import UserError, cut_off
from hft_cli.files import flatten

# Fields that change nothing of what given weights compute for given tokens.
WITHOUT_EFFECT = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "use_cache", "tokenizer_class", "model_max_length", "initializer_range", "pretraining_tp", "id2label", "label2id",
    "problem_type", "task_specific_params", "finetuning_task", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "chunk_size_feed_forward", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "_commit_hash", "attn_implementation",
    "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embd_dropout",
    "attn_dropout", "dropout", "residual_dropout", "classifier_dropout", "router_aux_loss_coef", "aux_loss_alpha",
    "max_length", "min_length", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "use_mambapy",
    "vocab_size", "max_position_embeddings",  # the shapes of the weights say the same, where they matter
}  # fmt: skip


def require_same_function(tuned: Path, base: Path, part: str | None = None) -> list[str]:
    """Compare the config.json in two folders. Returns the fields that differ without an effect.

    Raises:
        UserError: if a field differs that changes what the weights compute.
    """
    files = [folder / "config.json" for folder in (tuned, base)]
    ours, theirs = (read_model_config(file, part) for file in files)
    if _differences(ours, theirs):
        ours_whole, theirs_whole = _with_defaults(tuned), _with_defaults(base)
        if ours_whole is not None and theirs_whole is not None:
            ours, theirs = ours_whole, theirs_whole
        ours, theirs = flatten(ours), flatten(theirs)
    different = _differences(ours, theirs)
    with_effect = [key for key in different if not _is_without_effect(key)]
    if with_effect:
        values = (cut_off(f"{ours.get(key)}, in the base {theirs.get(key)}", 80) for key in with_effect[:3])
        shown = ", ".join(f"{key} ({value})" for key, value in zip(with_effect, values, strict=False))
        more = f" and {len(with_effect) - 3} more" if len(with_effect) > 3 else ""
        raise UserError(
            f"{tuned} cannot be set back to {base}: their config.json differ in {shown}{more}, with which the same "
            "weights compute something else. Give the model that it was tuned from (model.base=…)."
        )
    return different


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _is_without_effect(key: str) -> bool:
    return not WITHOUT_EFFECT.isdisjoint(key.split("."))


def _with_defaults(folder: Path) -> dict[str, Any] | None:
    """The fields as transformers reads them, with its defaults; None if it does not know the model."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_json_string(use_diff=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError):
        return None
    known: dict[str, Any] = json.loads(text)
    return known
