"""Defaults that depend on other choices: the embedded data and recipe are for the embedded model only."""

from __future__ import annotations

import pytest
from helpers import composed

POCKET = (150, 16, 5e-4)  # train.max_steps, batch_size, learning_rate
TULU2 = (None, 128, 2e-5)


@pytest.mark.parametrize(
    ("overrides", "data", "suite", "recipe"),
    [
        (("+method=hft",), "pocket_capitals", "pocket", POCKET),
        (("+method=hft_dpo",), "pocket_preferences", "pocket", POCKET),
        (("+method=hft", "data=pocket_order"), "pocket_order", "pocket", (300, 16, 5e-4)),
        (("+method=hft", "data=tulu_v2"), "tulu_v2", "none", TULU2),
        (("+method=hft", "data.path=F"), "local", "none", TULU2),
        (("+method=hft", "model=llama2_70b"), "none", "none", TULU2),
        (("+method=dpo", "model.path=F"), "none", "none", TULU2),
        (("+method=hft", "model=llama2_7b", "data=pocket_order"), "pocket_order", "pocket", TULU2),
        (("+method=hft", "model=llama2_7b", "data=trace", "data.path=F"), "trace", "none", (None, 128, 1e-5)),
        (("+method=hft", "model.path=pocket:model"), "pocket_capitals", "pocket", POCKET),
        (("+method=hft", "model.path=F", "data.path=F", "recipe=pocket"), "local", "none", POCKET),
        (("+method=half_reset",), "none", "none", TULU2),
        (("+method=hft", "suite=none", "recipe=tulu2"), "pocket_capitals", "none", TULU2),
    ],
)
def test_data_suite_and_recipe_follow_the_model_and_the_data(overrides, data, suite, recipe):
    config = composed(*overrides)
    assert (config.data.name, config.suite.name) == (data, suite)
    assert (config.train.max_steps, config.train.batch_size, config.train.learning_rate) == recipe


@pytest.mark.parametrize(("ranks", "size"), [(1, 4), (32, 4), (64, 2), (128, 1), (256, 4), (48, 4)])
def test_a_micro_batch_divides_what_a_rank_has_of_the_batch(ranks, size):
    config = composed("+method=hft", "data=tulu_v2", "engine=zero3", f"engine.num_processes={ranks}")
    assert config.train.micro_batch_size == size


def test_a_typed_micro_batch_stays_as_it_is():
    assert composed("+method=hft", "data=tulu_v2", "train.micro_batch_size=3").train.micro_batch_size == 3
