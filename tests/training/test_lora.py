"""training/lora.py: what PEFT adapts is what was drawn."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
from helpers import BASE

from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.training import lora


def test_a_model_of_which_peft_adapts_other_matrices_is_refused(monkeypatch):
    from transformers import AutoModelForCausalLM

    make = peft.get_peft_model
    other = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    monkeypatch.setattr(peft, "get_peft_model", lambda model, config: make(model, other))
    job = SimpleNamespace(adapter=None, updated=("model.layers.0.mlp.up_proj.weight",), config=RunConfig())
    with pytest.raises(UserError, match=r"PEFT adapts other matrices than requested, such as model\.layers"):
        lora.adapt(AutoModelForCausalLM.from_pretrained(BASE), job)
