"""model.dtype=auto and engine=auto: what becomes of them on machines of all kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import as_plan, composed, hft

from hft_cli.config.schema import ModelConfig
from hft_cli.errors import UserError
from hft_cli.launch import environment
from hft_cli.plan.automatic import Machine, automatic, machine_of, with_dtype
from hft_cli.plan.planner import plan

GIB = 2.0**30
NONE = Machine(gpus=0, memory=None, bfloat16=False)
EIGHT = Machine(gpus=8, memory=80 * GIB, bfloat16=True)
LLAMA = ("+method=hft", "model=llama2_7b", "data=tulu_v2", "engine=auto", "train.max_length=2048")


def chosen(machine: Machine, *overrides: str):
    return automatic(composed(*LLAMA, *overrides), machine)


@pytest.mark.parametrize(
    ("lines", "has"), [([], False), (["8.0", "9.0"], True), (["8.0", "7.5"], False), (["[N/A]"], False)]
)
def test_bfloat16_needs_ampere_on_all_gpus(lines, has, monkeypatch):
    monkeypatch.setattr(environment, "_output_lines", lambda command: lines)
    assert environment.compute_in_bfloat16() is has


def test_dtype_auto_follows_the_gpus_and_others_stay():
    auto, fixed = ModelConfig(name="a", path="b", dtype="auto"), ModelConfig(name="a", path="b")
    assert [with_dtype(auto, machine).dtype for machine in (EIGHT, NONE)] == ["bfloat16", "float32"]
    assert with_dtype(fixed, EIGHT).dtype == "float32"


def test_a_machine_is_asked_only_if_something_is_automatic(monkeypatch):
    monkeypatch.setattr("hft_cli.plan.automatic.machine_of", lambda config: pytest.fail("asked"))
    config = composed("+method=hft")
    assert automatic(config) is config


def test_without_a_gpu_the_engine_is_a_single_process():
    engine = automatic(composed("+method=hft", "engine=auto"), NONE).engine
    assert (engine.name, engine.zero_stage, engine.num_processes) == ("single", None, 1)


def test_the_engine_is_the_fastest_that_fits():
    config = chosen(EIGHT)
    assert (config.engine.num_processes, config.train.gradient_checkpointing) == (8, False)
    fits = {(fit.engine, fit.checkpointing): fit for fit in plan(replace(as_plan(config), rows=8)).fits}
    own = fits.pop((config.engine.name, False))
    assert own.bytes <= 0.9 * EIGHT.memory
    assert all(
        "offload" in fit.engine or fit.seconds >= own.seconds
        for fit in fits.values()
        if fit.engine != "single" and fit.bytes <= 0.9 * 80 * GIB
    )


@pytest.mark.parametrize(
    ("gib", "engine", "checkpointing"),
    [(80, "zero2", False), (40, "zero2", True), (24, "zero3", True), (16, "zero3_offload", True)],
)
def test_smaller_gpus_take_engines_that_need_less(gib, engine, checkpointing):
    config = chosen(replace(EIGHT, memory=gib * GIB))
    assert (config.engine.name, config.train.gradient_checkpointing) == (engine, checkpointing)


def test_checkpointing_that_is_typed_stays():
    assert chosen(EIGHT, "train.gradient_checkpointing=true").train.gradient_checkpointing


def test_micro_batches_divide_what_a_rank_has():
    config = chosen(EIGHT, "train.batch_size=24", "train.micro_batch_size=4", "engine.num_processes=8")
    assert (config.train.micro_batch_size, config.accumulation) == (3, 1)


def test_ranks_without_gpus_are_refused():
    with pytest.raises(UserError, match=r"engine=auto: there is no GPU here for engine.num_processes=2. Leave it out"):
        automatic(composed("+method=hft", "engine=auto", "engine.num_processes=2"), NONE)


@pytest.mark.parametrize(
    ("machine", "overrides", "words"),
    [
        (
            replace(EIGHT, memory=2 * GIB),
            (),
            r"engine=auto: nothing fits 8 GPUs of 2.0 GiB: .* takes [\d.]+ GiB of each",
        ),
        (
            EIGHT,
            ("train.optimizer=adafactor",),
            r"engine=auto: no engine can do this on 8 GPUs. train.optimizer=adafactor is for engine=single",
        ),
        (
            replace(EIGHT, memory=None),
            (),
            r"engine=auto: the memory of the GPUs is not known here. Choose engine=zero1",
        ),
        (replace(EIGHT, gpus=6), (), r"train.batch_size=128 is not a multiple of the 6 GPUs. Set train.batch_size=126"),
    ],
)
def test_what_cannot_be_chosen_is_refused(machine, overrides, words):
    with pytest.raises(UserError, match=words):
        chosen(machine, *overrides)


def test_a_strategy_rules_engines_out():
    assert chosen(replace(EIGHT, memory=1000 * GIB), "+method=lora").engine.zero_stage in (1, 2)


def test_a_plan_can_be_for_other_gpus(monkeypatch):
    config = replace(as_plan(composed(*LLAMA)), gpu_memory=80.0)
    config = replace(config, engine=replace(config.engine, num_processes=8))
    assert machine_of(config) == EIGHT
    assert machine_of(composed(*LLAMA)).gpus == len(environment.gpus())


@pytest.mark.end_to_end
def test_the_choice_is_said_and_sealed(tmp_path):
    made = hft("plan", *LLAMA, "engine.num_processes=8", "gpu_memory=80", "rows=1000")
    assert "engine=auto: zero2 on 8 GPUs, " in made.err, made.err
    assert "ZeRO-2 on 8 GPUs, bfloat16" in made.out
