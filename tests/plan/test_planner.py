"""`hft plan`: plans of every method, the worst draw, rows and steps, and mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import as_plan, command, composed, environment, hft

from hft_cli.config.schema import PlanConfig
from hft_cli.paths import resolve_path
from hft_cli.plan.memory import PARTS, Memory
from hft_cli.plan.planner import plan


def planned(**changes: Any) -> PlanConfig:
    """A plan's config over the embedded model."""
    return as_plan(composed("+method=hft", *(f"{key}={value}" for key, value in changes.items())))


@pytest.mark.parametrize("level", ["category", "layer", "model"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_no_draw_needs_more_than_the_worst(level, ratio):
    keys = {"selection": level, "selection.ratio": ratio}
    plans = [plan(planned(**keys, **{"selection.seed": seed})) for seed in range(6)]
    worst = plans[0]
    assert worst.rounds[0].worst.activations == worst.rounds[0].full.activations  # the inputs of all matrices
    for other in plans:
        first = other.rounds[0]
        assert all(getattr(worst.rounds[0].worst, part) >= getattr(first.memory, part) for part in PARTS)
        assert worst.worst_elements >= first.draw.updated_elements
        assert first.full.total >= first.worst.total


def test_rows_of_local_data_are_counted():
    (found,) = plan(planned(data="pocket_order", **{"train.max_steps": "null", "train.epochs": 3, "train.batch_size": 32,
                                                    "train.micro_batch_size": 4})).rounds  # fmt: skip
    assert found.rows == len(Path(resolve_path("pocket:skills/order/train.jsonl")).read_text().splitlines())
    assert found.steps == 3 * -(-found.rows // 32)


def test_steps_of_a_set_that_is_divided_are_those_of_the_whole():
    """The last batch of an epoch goes on with the rows of the next one: 10 rows, 2 epochs and batches of 4 are 5 steps."""
    keys = {"train.max_steps": "null", "train.epochs": 2, "train.batch_size": 4, "train.micro_batch_size": 4}
    config = replace(planned(data="tulu_v2", **keys, **{"data.rounds_per_set": 2}), rows=10)
    assert [found.steps for found in plan(config).rounds] == [2, 3]


def test_rows_of_other_data_are_given_or_unknown():
    config = planned(data="tulu_v2")
    assert plan(config).rounds[0].steps is None
    assert plan(replace(config, rows=1280)).rounds[0].steps == 20
    assert plan(replace(config, train=replace(config.train, max_steps=7))).rounds[0].steps == 7
    assert plan(replace(config, rows=1280, tflops=1.0)).rounds[0].hours > 0


@pytest.mark.parametrize("kind", ["half_reset", "sft_then_dpo", "trace"])
def test_other_methods_and_sequences_have_plans(kind):
    from hft_cli.plan.text import plan_text

    overrides = {
        "half_reset": ("+method=half_reset", "model.path=pocket:model", "model.base=pocket:model"),
        "sft_then_dpo": ("+method=hft", "data=pocket_sft_then_dpo", "method.stages=[sft,dpo]"),
        "trace": ("+method=hft", "data=trace", "data.path=/data/TRACE", "continual=gem", "model=mixtral_8x7b"),
    }[kind]
    made = plan(as_plan(composed(*overrides)))
    assert len(made.rounds) == {"half_reset": 1, "sft_then_dpo": 2, "trace": 8}[kind]
    assert "Disk:" in plan_text(made)
    if kind == "trace":
        assert made.heaviest is made.rounds[-1]  # GEM keeps gradients of all past tasks
        assert [fit.bytes for fit in made.fits if fit.engine == "zero3"] == [None, None]
    if kind == "half_reset":
        assert made.rounds[0].memory == Memory()


def test_slow_packing_is_said_with_the_fix():
    from hft_cli.plan.text import plan_text

    packed = plan(planned(**{"train.packing": "true", "train.max_length": 64}))
    assert "train.group_by_length=true avoids most padding" in plan_text(packed)
    joined = plan(planned(**{"train.padding_free": "true", "train.max_length": 64}))
    assert "train.padding_free=true without flash attention computes attention between all" in plan_text(joined)
    fast = plan(planned(**{"model.attention": "flash_attention_2", "model.dtype": "bfloat16", "train.packing": "true"}))
    assert "group_by_length" not in plan_text(fast) + plan_text(plan(planned()))


# The command

# ruff: noqa: E501
SEVENTY = (
    "plan", "+method=hft", "model=llama2_70b", "engine=zero3", "engine.num_processes=64", "data=tulu_v2",
    "train.micro_batch_size=2", "train.gradient_checkpointing=true", "gpu_memory=80", "tflops=312", "rows=326154",
)  # fmt: skip


def test_seventy_billion_parameters_are_planned_in_seconds(tmp_path):
    start = os.times()  # of children's processor, not the clock: other tests run beside this one
    ended = hft(*SEVENTY, cwd=tmp_path)
    end = os.times()
    assert end.children_user + end.children_system - start.children_user - start.children_system < 6
    assert (ended.status, ended.err) == (0, "")
    for said in (
        "68.98B parameters", "ZeRO-3 on 64 GPUs", "| 1     | tulu-v2-sft-mixture |", "| feed forward |", "master weights",
        "optimizer state", "worst draw", "| zero3 ", "fits", "too much", "backward, for weights", "Network:", "Hours", "Disk:",
    ):  # fmt: skip
        assert said in ended.out, said
    assert list(tmp_path.iterdir()) == []


def test_planning_does_not_import_torch():
    code = (
        "import sys, hft_cli.cli.main as c\nsys.argv=['hft', *sys.argv[1:]]\ntry: c.main()\nexcept SystemExit: pass\n"
    )
    code += "print(sorted({'torch', 'transformers', 'deepspeed', 'trl', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *SEVENTY], capture_output=True, text=True, env=environment())
    assert done.stdout.endswith("[]\n"), done.stdout[-300:] + done.stderr


def test_a_sweep_of_plans_is_one_table_and_writes_nothing(tmp_path):
    ended = hft("plan", "-m", "+method=hft", "engine=zero1,zero2,zero3", "engine.num_processes=2", "gpu_memory=1.5",
                "train.batch_size=32", "train.micro_batch_size=4", cwd=tmp_path)  # fmt: skip
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [re.split(r"\s*\|\s*", line)[1] for line in lines[2:5]] == [f"engine=zero{stage}" for stage in (1, 2, 3)]
    assert "1.5 GiB" in lines[0]
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "no method": ((), r"No method: .* For instance: hft plan \+method=hft"),
    "hub": (("+method=hft", "model.path=meta/none"), r"model\.path=meta/none is unknown .*model\.architecture=FILE"),
    "folder": (("+method=hft", "model.path=./nowhere"), r"model\.path=\./nowhere is unknown \(there is no such folder\)"),
    "architecture": (("+method=hft", "model=llama2_7b", "model.architecture=llama2_70"), r"Did you mean 'llama2_70b'\?"),
    "file": (("+method=hft", "model.architecture=x.json", "model.path=a/b"), r"Cannot read x\.json"),
    "batch": (("+method=hft", "model=llama2_7b", "engine=zero3", "engine.num_processes=64", "train.micro_batch_size=4"), r"Nearest that is: 256"),
    "share": (("+method=hft", "utilization=1.5"), r"utilization=1\.5 must be in \(0, 1\]"),
    "memory": (("+method=hft", "gpu_memory=0"), r"gpu_memory=0(\.0)? must be above 0"),
    "key": (("+method=hft", "gpu_memry=8"), r"Unknown key 'gpu_memry'\. Did you mean 'gpu_memory'\?"),
    "positions": (("+method=hft", "model=llama2_7b", "train.max_length=9999"), r"more than the 4096 positions of llama2_7b"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    arguments, said = MISTAKES[name]
    ended = hft("plan", *arguments, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert re.search(said, ended.err), ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_train_does_not_know_the_keys_of_a_plan():
    ended = hft("train", "+method=hft", "gpu_memory=80")
    assert ended.status == 2
    assert "Unknown key 'gpu_memory'" in ended.err


def test_the_command_is_in_the_help():
    listed = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    assert "hft plan" in listed
    keys = subprocess.run(command("plan", "--help"), capture_output=True, text=True, check=True).stdout
    assert "gpu_memory" in keys
