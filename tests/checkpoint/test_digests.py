"""checkpoint/digests.py rounds as torch does."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hft_cli.checkpoint.digests import tensor_sha256
from hft_cli.checkpoint.tensors import read_header
from hft_cli.errors import UserError

PAIRS = [("F32", "BF16"), ("F64", "BF16"), ("F64", "F32"), ("F16", "BF16"), ("F16", "F32"), ("BF16", "BF16")]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
finite = st.floats(allow_nan=False, allow_infinity=False)
EDGES = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.3961e38, 1e-40, 2.0**-133, -1.00390625]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(finite, max_size=30))
def test_it_is_the_hash_of_what_torch_rounds_to(source, target, numbers, tmp_path_factory):
    file = tmp_path_factory.mktemp("digests") / "model.safetensors"
    value = torch.tensor([*EDGES, *numbers], dtype=torch.float64).to(DTYPES[source])
    save_file({"a": value}, file)
    expected = value.to(DTYPES[target]).view(torch.uint8).numpy().tobytes()
    assert tensor_sha256(read_header(file)["a"], target) == hashlib.sha256(expected).hexdigest()


def test_whole_numbers_are_not_rounded(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1, 2])}, file)
    with pytest.raises(UserError, match="A tensor of I64 cannot be compared with BF16 in memory"):
        tensor_sha256(read_header(file)["a"], "BF16")
