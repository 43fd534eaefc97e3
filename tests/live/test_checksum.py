"""live/checksum.py: one bit of a frozen weight is noticed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.live import checksum
from hft_cli.live.checksum import frozen_checksum, weighted_sum_of_bits


def test_a_checksum_changes_with_one_bit_of_a_frozen_weight():
    model = torch.nn.Linear(2, 2).bfloat16()
    model.weight.requires_grad_(False)
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
    monkeypatch.setattr(checksum, "CHUNK", chunk)
    tensor = torch.randn(41, generator=torch.Generator().manual_seed(0)).bfloat16()
    content = tensor.view(torch.uint8).numpy().tobytes().ljust(88, b"\0")
    words = [int.from_bytes(content[start : start + 8], "little") for start in range(0, 88, 8)]
    expected = sum(word * (place * checksum.MULTIPLIER | 1) for place, word in enumerate(words)) % 2**64
    assert int(weighted_sum_of_bits(tensor)) % 2**64 == expected
    assert int(weighted_sum_of_bits(tensor[1:])) == int(weighted_sum_of_bits(tensor[1:].clone()))  # at an odd address
