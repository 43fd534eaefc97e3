"""A plan as text: what each table says."""

from __future__ import annotations

import re
from functools import cache

import pytest
from helpers import as_plan, composed

from hft_cli.plan.planner import Plan, plan
from hft_cli.plan.text import comparison_text, plan_text


@cache
def planned(*overrides: str, **values: float) -> Plan:
    config = as_plan(composed("+method=hft", *overrides))
    for key, value in values.items():
        setattr(config, key, value)
    return plan(config)


def table(text: str, title: str) -> list[list[str]]:
    """The cells of the table whose header begins with `title`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} "))
    rows = [line for line in lines[start:] if line.startswith("|") or not line]
    rows = rows[: rows.index("")] if "" in rows else rows
    return [re.split(r"\s*\|\s*", row.strip("| ")) for row in rows if not row.startswith("| -")]


def test_the_categories_are_those_of_the_draw():
    result = planned()
    body = table(plan_text(result), "category")[1:]
    assert [row[0] for row in body] == ["attention", "feed forward", "norm", "norm (final)", "embedding", "head"]
    assert [row[1:3] for row in body] == [["8", "8"], ["6", "6"], ["4", "4"], ["1", "0"], ["1", "0"], ["1", "0"]]
    assert [row[-1] for row in body][-3:] == ["100.0%"] * 3


def test_layers_with_the_same_numbers_share_a_line():
    body = table(plan_text(planned("selection=layer")), "layers")[1:]
    assert len(body) == 2
    assert {row[1] for row in body} == {"4 of 4", "0 of 4"}
    layers = [number for row in body for number in re.findall(r"\d+", row[0])]
    assert sorted(layers) == ["0", "1", "2", "3"]


def test_the_memory_table_adds_up():
    body = table(plan_text(planned()), "part")
    assert body[0] == ["part", "this draw", "worst draw", "FFT"]
    assert [row[0] for row in body[1:]] == [
        "weights", "gradients", "optimizer state", "activations", "buffers", "total",
    ]  # fmt: skip


def test_full_fine_tuning_has_one_column():
    assert table(plan_text(planned("selection=all")), "part")[0] == ["part", "hft"]


@pytest.mark.parametrize(("gpu_memory", "cell"), [(None, r"[\d.]+ \w+"), (80.0, r".*, fits"), (1e-6, r".*, too much")])
def test_each_engine_has_its_memory_and_whether_it_fits(gpu_memory, cell):
    values = {} if gpu_memory is None else {"gpu_memory": gpu_memory}
    body = table(plan_text(planned("train.batch_size=32", **values)), "engine")[1:]
    assert [row[0] for row in body] == ["single (1 GPU)", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert all(re.fullmatch(cell, row[1]) for row in body)


def test_what_is_unknown_is_asked_for():
    text = plan_text(planned("data=tulu_v2"))
    assert "steps ?: the data are not on this machine. Give rows=N or train.max_steps=N." in text
    assert "Give the peak rate of a GPU: tflops=N." in text
    assert "give gpu_memory=N (GiB) to see what fits" in text


def test_offload_and_lora_are_explained():
    offload = planned("engine=zero3_offload", "engine.num_processes=2", "train.batch_size=32")
    assert re.search(r"Host memory: \S+ \w+ for each rank, \S+ \w+ for all 2\.", plan_text(offload))
    lora = as_plan(composed("+method=lora"))
    assert re.search(r"LoRA trains adapters with [\d.,]+\w? elements\.", plan_text(plan(lora)))


def test_a_comparison_has_one_line_for_each_plan():
    plans = [(f"seed={seed}", planned(f"selection.seed={seed}", gpu_memory=80.0)) for seed in (1, 2)]
    body = table(comparison_text(plans), "plan")
    assert [row[0] for row in body[1:]] == ["seed=1", "seed=2"]
    assert body[0][-5:] == ["80 GiB", "FLOPs / FFT", "network", "disk", "hours"]
    assert {row[-5] for row in body[1:]} == {"fits"}
