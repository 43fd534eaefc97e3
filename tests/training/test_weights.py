"""training/weights.py and training/procedures.py: what is trained is what was drawn, and one bit is noticed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import composed
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.tensors import StoredTensor
from hft_cli.errors import UserError
from hft_cli.training import weights
from hft_cli.training.procedures import PROCEDURES, procedure_of
from hft_cli.training.weights import file_value, freeze, frozen_checksum, weighted_sum_of_bits


def test_gradients_are_asked_of_the_updated_parameters_only():
    model = freeze(torch.nn.Linear(2, 2), ["bias"], ["weight"])
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {"weight": False, "bias": True}


def test_names_that_are_not_the_models_are_refused():
    with pytest.raises(UserError, match=r"other parameters than the draw was made for: bias, norm \(2 differ\)"):
        freeze(torch.nn.Linear(2, 2), ["weight"], ["norm"])


def test_a_checksum_changes_with_one_bit_of_a_frozen_weight():
    model = freeze(torch.nn.Linear(2, 2).bfloat16(), ["bias"], ["weight"])
    before = frozen_checksum(model)
    model.bias.data += 1
    assert frozen_checksum(model) == frozen_checksum(SimpleNamespace(module=model)) == before
    model.weight.data.view(torch.int16)[1, 1] ^= 1
    assert frozen_checksum(model) != before


@given(st.binary(max_size=200), st.data())
def test_the_sum_of_bits_changes_with_any_byte(content, data):
    tensor = torch.frombuffer(bytearray(content or b"0"), dtype=torch.uint8).clone()
    before = int(weighted_sum_of_bits(tensor))
    changed = tensor.clone()
    changed[data.draw(st.integers(0, len(tensor) - 1))] ^= data.draw(st.integers(1, 255))
    assert int(weighted_sum_of_bits(changed)) != before
    assert int(weighted_sum_of_bits(tensor)) == before


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_sum_of_bits_is_that_of_its_definition(chunk, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK", chunk)
    tensor = torch.randn(41, generator=torch.Generator().manual_seed(0)).bfloat16()
    content = tensor.view(torch.uint8).numpy().tobytes().ljust(88, b"\0")
    words = [int.from_bytes(content[start : start + 8], "little") for start in range(0, 88, 8)]
    expected = sum(word * (place * weights.MULTIPLIER | 1) for place, word in enumerate(words)) % 2**64
    assert int(weighted_sum_of_bits(tensor)) % 2**64 == expected
    assert int(weighted_sum_of_bits(tensor[1:])) == int(weighted_sum_of_bits(tensor[1:].clone()))  # at an odd address


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
