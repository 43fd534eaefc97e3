"""half_finetune on models that are sharded over ranks, which this file starts as its own program: FSDP2 and ZeRO-3."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE, torchrun

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.method.selection import draw

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def step_of_fsdp(model: Any) -> Any:
    """The function that trains one step with an optimizer of torch."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)

    def step() -> None:
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()

    return step


def step_of_zero(model: Any) -> Any:
    """The function that trains one step with an engine of DeepSpeed."""
    import deepspeed

    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)

    def step() -> None:
        engine.backward(engine(IDS, labels=IDS).loss)
        engine.step()

    return step


def trained(model: Any, step_of: Any) -> dict[str, Any]:
    """What moved in one step."""
    from hft_cli import half_finetune
    from hft_cli.live.checksum import frozen_checksum
    from hft_cli.live.compat import whole_value

    drawn = half_finetune(model)
    step = step_of(model)
    parameters = dict(model.named_parameters())
    before, frozen = {name: whole_value(value).clone() for name, value in parameters.items()}, frozen_checksum(model)
    step()
    moved = [name for name, value in parameters.items() if not torch.equal(whole_value(value), before[name])]
    return {"sha256": drawn.sha256, "moved": moved, "frozen": frozen_checksum(model) == frozen}


def rank(out: Path) -> None:
    """Train one step of the embedded model under FSDP2 and under ZeRO-3, and write down what moved."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from hft_cli.launch.compat import exit_rank
    from hft_cli.launch.ranks import join_ranks

    join_ranks()
    model = AutoModelForCausalLM.from_pretrained(BASE)
    for layer in model.model.layers:
        fully_shard(layer)
    seen = {"fsdp2": trained(fully_shard(model), step_of_fsdp)}
    alive = HfDeepSpeedConfig(ZERO3)  # transformers then loads models in shards
    seen["zero3"] = trained(AutoModelForCausalLM.from_pretrained(BASE), step_of_zero)
    assert alive.is_zero3()
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(seen))
    exit_rank()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sharded") / "seen.json"
    torchrun(2, __file__, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_sharded_model_trains_the_drawn_half(engine: str, seen: dict[str, Any]) -> None:
    expected = draw(parameters_from_folder(BASE), SelectionConfig(), 1, 42)
    assert seen[engine]["sha256"] == expected.sha256
    assert seen[engine]["frozen"]
    assert set(seen[engine]["moved"]) == set(expected.updated)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
