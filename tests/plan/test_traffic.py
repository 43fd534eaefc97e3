"""Bytes over the network and on the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workloads import enlarge, fft, train

from hft_cli.plan.traffic import checkpoint_bytes, network
from hft_cli.plan.workload import Setup


def test_zero_3_sends_three_times_the_bytes_of_the_model():
    """Less the rank's own share, for full fine-tuning in one micro-batch (ZeRO, section 7.2.2)."""
    work = enlarge(fft("llama", Setup(3, 4, "bfloat16", 1, 8)))
    work = replace(work, params=tuple(p for p in work.params if p.kind != "embedding"))
    assert network(work).total == pytest.approx(3 * 2 * work.total_elements * 3 / 4)


def test_zero_2_reduces_gradients_after_each_micro_batch():
    once, thrice = (network(fft("llama", Setup(2, 4, "bfloat16", 1, 8, accumulation=n))) for n in (1, 3))
    assert thrice.gradients == 3 * once.gradients
    assert thrice.weights == once.weights


def test_a_single_process_sends_nothing():
    assert network(fft("llama", Setup(None, 1, "bfloat16", 1, 8))).total == 0


def test_a_checkpoint_of_one_process_has_weights_and_moments():
    work = train("llama", ["lm_head.weight"], Setup(None, 1, "float32", 1, 8))
    assert checkpoint_bytes(work) == 12 * 300 * 64
