"""live/compat.py: shapes, shards and optimizers are where it looks for them. Engines are in the tests of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hft_cli.live import compat


@pytest.mark.parametrize(("rank", "elements"), [(0, 3), (1, 2), (2, 0)])
def test_the_padding_of_a_shard_is_no_part_of_it(rank: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = torch.zeros(3), 5, None
    assert compat.local_part(parameter).shape == (elements,)


def test_a_partitioned_parameter_has_its_whole_shape():
    parameter: Any = torch.nn.Parameter(torch.empty(0))
    assert compat.whole_shape(parameter) == (0,)
    parameter.ds_shape = torch.Size([3, 4])
    assert compat.whole_shape(parameter) == (3, 4)
