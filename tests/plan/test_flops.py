"""Operations of a step: by property, and against Kaplan et al."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from architectures import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from workloads import PARAMS, SHAPES, families, few, fft, selections, setups, train

from hft_cli.config.schema import SelectionConfig
from hft_cli.method.selection import draw
from hft_cli.plan.flops import flops, hours
from hft_cli.plan.workload import Setup


@few
@given(families, setups)
def test_hft_at_ratio_1_costs_what_fft_does(family, setup):
    everything = draw(PARAMS[family], SelectionConfig(ratio=1.0), 1, 7).updated
    assert flops(train(family, everything, setup), 8, 32) == flops(fft(family, setup), 8, 32)


@few
@given(families, setups, selections, st.integers(0, 10**6))
def test_training_less_never_costs_more(family, setup, selection, seed):
    updated = draw(PARAMS[family], selection, 1, seed).updated
    less, more = flops(train(family, updated, setup), 8, 32), flops(fft(family, setup), 8, 32)
    assert less.total <= more.total
    assert less.forward == more.forward


@few
@given(families, setups)
def test_the_parts_make_the_total(family, setup):
    operations = flops(fft(family, setup), 8, 32)
    assert sum(asdict(operations).values()) == operations.total


def test_fft_takes_6_operations_a_parameter_and_token():
    """Kaplan et al.'s 6 N, for a model of layers and a head only, and rows too short for attention to count."""
    matrices = sum(p.elements for p in PARAMS["llama"] if len(p.shape) == 2 and p.kind != "embedding")
    operations = flops(fft("llama", Setup(2, 2, "bfloat16", 1, 1)), 128, 1)
    assert operations.total == pytest.approx(6 * matrices * 128, rel=0.02)


@few
@given(families, st.integers(0, 10**6), st.integers(1, 9))
def test_a_frozen_matrix_saves_the_gradient_of_its_weight_only(family, seed, rows):
    setup, shape = Setup(2, 2, "bfloat16", 1, 8), SHAPES[family]
    updated = draw(PARAMS[family], SelectionConfig(), 1, seed).updated
    half, full = (flops(work, rows, 8) for work in (train(family, updated, setup), fft(family, setup)))
    saved = sum(
        2 * rows * 8 * p.elements * (shape.experts_used / shape.experts if len(p.shape) == 3 else 1)
        for p in PARAMS[family]
        if p.name not in updated and len(p.shape) > 1
    )
    assert full.total - half.total == pytest.approx(saved)
    assert (half.forward, half.inputs) == (full.forward, full.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_no_backward_pass_below_the_lowest_parameter(family):
    setup, layers = Setup(None, 1, "float32", 1, 8, checkpointing=True), SHAPES[family].layers
    names = [[p.name for p in PARAMS[family] if p.layer == layer] for layer in range(layers)]
    operations = [flops(train(family, layer, setup), 1, 8) for layer in names]
    inputs = [each.inputs for each in operations]
    assert inputs == sorted(set(inputs), reverse=True)
    assert len(inputs) == layers
    assert flops(train("llama", ["lm_head.weight"], setup), 1, 8).inputs == 0
    assert operations[-1].recompute == pytest.approx(operations[0].recompute / layers)


def test_hours_are_operations_over_the_rate_that_is_reached():
    assert hours(3600e12 * 2 * 100 * 0.5, ranks=2, tflops=100, utilization=0.5) == pytest.approx(1)
