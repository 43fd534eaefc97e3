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


def settings(tmp_path: Path, given: Any, *overrides: str) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(given if isinstance(given, str) else json.dumps(given))
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
def test_an_engine_is_its_stage_and_what_it_offloads(engine, stage, optimizer, parameters):
    config = composed("+method=hft", f"engine={engine}")
    check(config)
    made = deepspeed_settings(config)
    zero = made["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (optimizer, parameters)
    assert made["bf16"] == {"enabled": "auto"}
    assert ("zero_force_ds_cpu_optimizer" in made) == optimizer  # else DeepSpeed refuses torch's AdamW


def test_one_process_has_no_settings():
    assert deepspeed_settings(composed("+method=hft")) == {}


def test_all_that_is_free_is_taken_and_ours_stays(tmp_path):
    given = {
        **dict.fromkeys(FREE, 1),
        "zero_optimization": {
            **dict.fromkeys(SIZES, 1),
            **dict.fromkeys(SWITCHES, False),
            "offload_optimizer": {"device": "none"},
        },
    }
    made = settings(tmp_path, given)
    assert {key: made[key] for key in FREE} == dict.fromkeys(FREE, 1)
    assert made["zero_optimization"]["stage"] == 2
    assert all(made["zero_optimization"][key] == 1 for key in SIZES)
    assert all(made["zero_optimization"][key] is False for key in SWITCHES)
    assert made["bf16"] == {"enabled": "auto"}


def test_what_says_the_same_as_the_run_is_taken_and_autos_are(tmp_path):
    same = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2},
    }  # fmt: skip
    auto = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto"}}
    for given in (same, auto):
        made = settings(tmp_path, given)
        assert made["zero_optimization"]["stage"] == 2
        assert made["train_batch_size"] in (8, "auto")


def test_memory_need_not_be_pinned(tmp_path):
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    made = settings(tmp_path, given, "engine=zero3_offload")["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert made["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_an_empty_block_says_nothing(tmp_path):
    assert settings(tmp_path, {"zero_optimization": {}})["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 16}, r"train_batch_size=16, but here it is 8, set by train.batch_size"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage=3, but here it is 2, set by engine"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=true, but here it is false, set by model.dtype"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled=true, but here it is false"),
        ({"fp16": {"loss_scale": 0}}, r"has fp16, which is not taken: set model.dtype"),
        ({"optimizer": {"type": "AdamW"}}, r"has optimizer, which is not taken: AdamW is set by train"),
        ({"scheduler": {"type": "WarmupLR"}}, r"has scheduler, which is not taken"),
        ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, r"would not keep their bits"),
        ({"zero_optimization": {"round_robin_gradients": True}}, r"gives back weights under each other's names"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r'device="cpu", but here it is "none"'),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/x"}}}, r"of offload only device=cpu"),
        ({"zero_optimization": {"reduce_bucket": 5}}, r"Did you mean 'zero_optimization.reduce_bucket_size'"),
        ({"wall_clock": True}, r"Unknown key of engine.deepspeed=.*Did you mean 'wall_clock_breakdown'"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, r'="5e8", which is to be a number of elements'),
        ({"zero_optimization": {"sub_group_size": None}}, r"=null, which is to be a number of elements"),
        ({"zero_optimization": {"overlap_comm": 1}}, r"=1, which is to be true or false"),
        ({"zero_optimization": 3}, r"zero_optimization=3, which is not a block"),
        ("[1]", r"does not hold a JSON object"),
        ("{", r"is not JSON"),
    ],
)
def test_what_contradicts_the_run_or_is_not_known_to_be_harmless_is_refused(given, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        settings(tmp_path, given)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        deepspeed_settings(composed(*ZERO2, f"engine.deepspeed={tmp_path / 'none.json'}"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engine=zero1", "engine.offload_optimizer=true"), r"is for ZeRO-2 and 3"),
        (("engine=zero2", "engine.offload_parameters=true"), r"is for ZeRO-3 with engine.offload_optimizer"),
        (("engine=single", "engine.deepspeed=x.json"), r"runs without it. Use engine=zero1"),
        (("engine=single", "engine.num_nodes=2"), r"engine=single is one process, but engine.num_nodes=2"),
        (("engine=zero2", "engine.num_nodes=2", "engine.node_rank=2"), r"is not one of engine.num_nodes=2"),
        (("engine=zero2", "engine.rendezvous=head"), r"is not HOST:PORT"),
        (("engine=zero2", "engine.device=tpu"), r"Unknown engine.device 'tpu'"),
        (("engine=zero2", "engine.num_nodes=3"), r"x engine.num_nodes=3. Nearest that is"),
        (("model.attention=flash_attention_2",), r"computes in bfloat16 only"),
        (("engine=zero2_offload", "continual=lora", "method.name=fft"), r"not tried with offload"),
    ],
)
def test_engines_that_cannot_be_are_refused(overrides, words):
    more = ("selection=all",) if "continual=lora" in overrides else ()
    with pytest.raises(UserError, match=words):
        check(composed("+method=hft", *overrides, *more))
