"""training/weights.py and training/procedures.py: what is trained is what was drawn, and one bit is noticed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import composed

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError
from hft_cli.training.procedures import PROCEDURES, procedure_of
from hft_cli.training.weights import file_value, freeze


def test_gradients_are_asked_of_the_updated_parameters_only():
    model = freeze(torch.nn.Linear(2, 2), ["bias"], ["weight"])
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {"weight": False, "bias": True}


def test_names_that_are_not_the_models_are_refused():
    with pytest.raises(UserError, match=r"other parameters than the draw was made for: bias, norm \(2 differ\)"):
        freeze(torch.nn.Linear(2, 2), ["weight"], ["norm"])


def test_experts_in_more_than_bfloat16_are_not_rounded_silently():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    param = Param(name, (4, 8, 2), stored=("experts.0.w1", "experts.1.w1"), kind="ffn", layer=0)
    files = {"experts.0.w1": StoredTensor(Path("model.safetensors"), "F32", (8, 2), 0, 64)}
    with pytest.raises(UserError, match=r"gate_up_proj is stored in parts and as F32, .* set model\.dtype=float32"):
        file_value(param, files)


@pytest.mark.parametrize(
    ("method", "strategy", "stage", "expected"),
    [("fft", "seqft", "sft", "sft"), ("fft", "replay", "sft", "sft"), ("dpo", "seqft", "dpo", "dpo"),
     ("fft", "gem", "sft", "gem"), ("lora", "seqft", "sft", "lora"), ("lora", "replay", "sft", "lora")],
)  # fmt: skip
def test_a_strategy_has_its_own_procedure_or_that_of_the_stage(method, strategy, stage, expected, tmp_path):
    config = composed(f"+method={method}", f"output_dir={tmp_path}", f"continual={strategy}")
    job = SimpleNamespace(config=config, phase=SimpleNamespace(stage=stage))
    assert procedure_of(job) is PROCEDURES[expected]
