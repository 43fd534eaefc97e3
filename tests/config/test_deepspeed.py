"""The DeepSpeed settings of a run, and a user's own JSON over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import composed

from hft_cli.config.deepspeed import FREE, SIZES, SWITCHES, deepspeed_settings
from hft_cli.config.validate import check
from hft_cli.errors import UserError

ZERO2 = ("+method=hft", "engine=zero2", "engine.num_processes=2", "train.batch_size=8", "train.micro_batch_size=2")


def settings(tmp_path: Path, own: Any, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(own if isinstance(own, str) else json.dumps(own))
    return deepspeed_settings(composed(*ZERO2, f"engine.deepspeed={file}", *overrides))


@pytest.mark.parametrize(
    ("engine", "stage", "optimizer", "parameters"),
    [
        ("zero1", 1, False, False),
        ("zero2", 2, False, False),
        ("zero2_offload", 2, True, False),
        ("zero3", 3, False, False),
        ("zero3_offload", 3, True, True),
    ],
)
def test_an_engine_is_its_stage_and_its_offload(engine, stage, optimizer, parameters):
    config = composed("+method=hft", f"engine={engine}")
    check(config)
    merged = deepspeed_settings(config)
    zero = merged["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (optimizer, parameters)
    assert merged["bf16"] == {"enabled": "auto"}
    assert ("zero_force_ds_cpu_optimizer" in merged) == optimizer  # else DeepSpeed refuses torch's AdamW


def test_one_process_has_no_settings():
    assert deepspeed_settings(composed("+method=hft")) == {}


def test_harmless_settings_are_accepted_and_ours_stay(tmp_path):
    own = {
        **dict.fromkeys(FREE, 1),
        "zero_optimization": {
            **dict.fromkeys(SIZES, 1),
            **dict.fromkeys(SWITCHES, False),
            "offload_optimizer": {"device": "none"},
        },
    }
    merged = settings(tmp_path, own)
    assert {key: merged[key] for key in FREE} == dict.fromkeys(FREE, 1)
    assert merged["zero_optimization"]["stage"] == 2
    assert all(merged["zero_optimization"][key] == 1 for key in SIZES)
    assert all(merged["zero_optimization"][key] is False for key in SWITCHES)
    assert merged["bf16"] == {"enabled": "auto"}


def test_settings_that_agree_with_the_run_are_accepted(tmp_path):
    same = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }  # fmt: skip
    auto = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto"}}
    for own in (same, auto):
        merged = settings(tmp_path, own)
        assert merged["zero_optimization"]["stage"] == 2
        assert merged["train_batch_size"] in (8, "auto")


def test_memory_need_not_be_pinned(tmp_path):
    own = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    merged = settings(tmp_path, own, "engine=zero3_offload")["zero_optimization"]
    assert merged["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert merged["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_an_empty_block_changes_nothing(tmp_path):
    assert settings(tmp_path, {"zero_optimization": {}})["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_batch_size": 16}, r"train_batch_size=16, but in this run it is 8, set by train.batch_size"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage=3, but in this run it is 2, set by engine"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=true, but in this run it is false, set by model.dtype"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled=true, but in this run it is false"),
        ({"fp16": {"loss_scale": 0}}, r"has fp16, which is not accepted: set model.dtype"),
        ({"optimizer": {"type": "AdamW"}}, r"has optimizer, which is not accepted: AdamW is set by train"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            r'="bf16", but in this run it is "fp32", set by hft, which adds',
        ),
        ({"scheduler": {"type": "WarmupLR"}}, r"has scheduler, which is not accepted"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, r"so frozen weights would change"),
        ({"zero_optimization": {"round_robin_gradients": True}}, r"returns weights under each other's names"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            r'device="cpu", but in this run it is "none"',
        ),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/x"}}}, r"Of offload only device=cpu"),
        ({"zero_optimization": {"reduce_bucket": 5}}, r"Did you mean 'zero_optimization.reduce_bucket_size'"),
        ({"wall_clock": True}, r"Unknown key of engine.deepspeed=.*Did you mean 'wall_clock_breakdown'"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, r'="5e8"\. It must be a number of elements'),
        ({"zero_optimization": {"sub_group_size": None}}, r"=null\. It must be a number of elements"),
        ({"zero_optimization": {"overlap_comm": 1}}, r"=1\. It must be true or false"),
        ({"zero_optimization": 3}, r"zero_optimization=3, which is not a block"),
        ("[1]", r"does not hold a JSON object"),
        ("{", r"is not JSON"),
    ],
)
def test_settings_that_contradict_or_may_harm_are_refused(own, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        settings(tmp_path, own)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none.json: No such file"):
        deepspeed_settings(composed(*ZERO2, f"engine.deepspeed={tmp_path / 'none.json'}"))


def test_gradients_are_added_in_float32_also_with_a_json(tmp_path):
    for own in ({}, {"data_types": {"grad_accum_dtype": "fp32"}}, {"data_types": {"grad_accum_dtype": "auto"}}):
        file = tmp_path / "own.json"
        file.write_text(json.dumps(own))
        merged = deepspeed_settings(composed("+method=hft", "engine=zero2", f"engine.deepspeed={file}"))
        assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
