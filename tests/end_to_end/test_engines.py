"""`hft train` on DeepSpeed's ZeRO engines: real ranks, on the CPU."""

from __future__ import annotations

import json

import pytest
from helpers import (
    BASE,
    DECAYED,
    TWO_RANKS,
    changed,
    largest_difference,
    ledger,
    metrics,
    on_one_worker,
    train,
)

from hft_cli.config.deepspeed import FREE, SIZES, SWITCHES

ENGINES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.mark.parametrize("engine", [on_one_worker(engine) for engine in ENGINES])
def test_deepspeed_ranks_agree_with_one_process(begun, hft_run, engine):
    run, _ = begun(engine)
    assert ledger(run) == ledger(hft_run)
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])
    assert largest_difference(run, hft_run) < 1e-5
    norms, expected = ([line["grad_norm"] for line in metrics(folder)] for folder in (run, hft_run))
    assert norms == pytest.approx(expected, rel=1e-5)
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == int(engine[4])


OTHERWISE = {  # a value for each key that engine.deepspeed may set, other than DeepSpeed's default
    "allgather_bucket_size": 20_000, "allgather_partitions": False, "contiguous_gradients": False,
    "ignore_unused_parameters": False, "overlap_comm": True, "reduce_bucket_size": 30_000, "reduce_scatter": False,
    "stage3_max_live_parameters": 10_000,
    "stage3_max_reuse_distance": 1_000, "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 1_000, "sub_group_size": 50_000, "use_multi_rank_bucket_allreduce": False,
}  # fmt: skip


@pytest.mark.parametrize("engine", [on_one_worker("zero2"), on_one_worker("zero3")])
def test_what_a_deepspeed_json_may_set_changes_no_weight(begun, tmp_path, engine):
    assert OTHERWISE.keys() == {*SIZES, *SWITCHES}
    profilers = {"comms_logger": {"enabled": True}, "flops_profiler": {"enabled": engine == "zero2", "profile_step": 2}}
    slow = {"memory_breakdown": engine == "zero2"}  # it collects garbage dozens of times in a step
    rest = {"communication_data_type": "fp32", "dump_state": True, "steps_per_print": 1, **slow}
    settings = {**profilers, **rest, "wall_clock_breakdown": True}
    assert settings.keys() == set(FREE)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**settings, "zero_optimization": OTHERWISE}))
    whole, _ = begun(engine)
    run = train(tmp_path / "run", *DECAYED, f"engine={engine}", *TWO_RANKS, f"engine.deepspeed={own}")
    assert largest_difference(run, whole) < 1e-6
    sealed = [json.loads(path.read_text()) for path in (run / "deepspeed.json", run / "rounds/01-order/step.json")]
    assert sealed[1]["deepspeed"] == sealed[0]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_master_weights_start_from_the_files_not_their_bfloat16(tmp_path, engine):
    run = train(
        tmp_path / "run", "+method=hft", f"engine={engine}", *TWO_RANKS, "model.dtype=bfloat16",
        "train.learning_rate=1e-30",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set()


def test_zero3_in_bfloat16_with_checkpointing_keeps_the_frozen(tmp_path):
    run = train(
        tmp_path / "run", "+method=hft", "engine=zero3", *TWO_RANKS, "model.dtype=bfloat16",
        "train.gradient_checkpointing=true",
    )  # fmt: skip
    assert changed(BASE, run / "model") == set(ledger(run)[0]["updated"])
