"""Half-Reset needs two models whose weights mean the same: their config.json say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hft_cli.checkpoint.same_function import require_same_function
from hft_cli.errors import UserError
from hft_cli.paths import resolve_path

CONFIG = json.loads((Path(resolve_path("pocket:model")) / "config.json").read_text())
BEFORE_5 = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}  # of transformers 4
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def folder(path: Path, config: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({**BEFORE_5, "rope_theta": 500000.0}, "rope_parameters.rope_theta"),
        ({**BEFORE_5, "rope_scaling": LLAMA_3}, "rope_parameters.factor"),
        ({**CONFIG, "num_attention_heads": 2, "num_key_value_heads": 2}, "num_attention_heads"),
        ({**CONFIG, "num_hidden_layers": 2 * CONFIG["num_hidden_layers"]}, "num_hidden_layers"),
        ({**CONFIG, "model_type": "mistral", "sliding_window": 8}, "model_type"),
        ({**CONFIG, "rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({**CONFIG, "hidden_act": "gelu"}, "hidden_act"),
        ({**CONFIG, "tie_word_embeddings": not CONFIG.get("tie_word_embeddings")}, "tie_word_embeddings"),
        ({**CONFIG, "model_type": "of nobody", "scale": 2}, "scale"),
        ({**CONFIG, "model_type": "of nobody", "top_k_experts": 2}, "top_k_experts"),
    ],
)
def test_a_base_of_another_function_is_refused(base, words, tmp_path):
    with pytest.raises(UserError, match=rf"their config.json differ in .*{words}.*in the base") as refused:
        require_same_function(folder(tmp_path / "tuned", CONFIG), folder(tmp_path / "base", base))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (CONFIG, []),
        (BEFORE_5, []),
        ({**BEFORE_5, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False}, []),
        ({**CONFIG, "use_cache": False, "torch_dtype": "float16", "_name_or_path": "a/b"}, ["use_cache"]),
        ({**CONFIG, "eos_token_id": 7, "attention_dropout": 0.1}, ["attention_dropout", "eos_token_id"]),
    ],
)
def test_other_fields_are_named_and_ignored(base, expected, tmp_path):
    found = require_same_function(folder(tmp_path / "tuned", CONFIG), folder(tmp_path / "base", base))
    assert set(expected) <= set(found) <= {*expected, "dtype", "_name_or_path"}
