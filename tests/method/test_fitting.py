"""Which selections explain what moved."""

from __future__ import annotations

import pytest
from helpers import BASE
from hypothesis import given
from hypothesis import strategies as st
from model_types import tiny_config

from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.method.fitting import fits
from hft_cli.method.selection import draw

PARAMS = parameters_from_folder(BASE)
DEEP = parameters_from_config(tiny_config("llama"))


@given(
    st.sampled_from(["category", "layer", "model"]),
    st.integers(1, 19),
    st.integers(0, 99),
    st.integers(1, 4),
    st.sampled_from(["independent", "complementary"]),
)
def test_a_draw_fits_its_own_level_and_ratio(level, twentieths, seed, round, redraw):
    config = SelectionConfig(level=level, ratio=twentieths / 20, redraw=redraw)
    moved = set(draw(DEEP, config, round, seed).updated)
    found = {fit.level: fit.ratios for fit in fits(DEEP, moved)}
    in_layers = moved & {param.name for param in DEEP if param.layer is not None}
    if in_layers and "all" not in found:
        assert twentieths / 20 in found[level]


def test_everything_and_nothing():
    names = {param.name for param in PARAMS}
    assert [fit.level for fit in fits(PARAMS, names)] == ["all"]
    matrices = {name for name in names if "layernorm" not in name}
    assert [(fit.level, fit.unmoved) for fit in fits(PARAMS, matrices)] == [("all", 8)]
    assert fits(PARAMS, set()) == fits(PARAMS, {"lm_head.weight"}) == ()


def test_a_category_that_did_not_move_breaks_the_fit():
    moved = set(draw(PARAMS, SelectionConfig(), 1, 42).updated)
    assert [fit.level for fit in fits(PARAMS, moved)] == ["category", "model"]
    still = {name for name in moved if "layers.0.self_attn" in name}
    assert "category" not in [fit.level for fit in fits(PARAMS, moved - still)]


@pytest.mark.parametrize("level", ["layer", "category"])
def test_a_drawn_norm_that_kept_its_bits_does_not_hide_the_draw(level):
    config = tiny_config("llama")
    config.num_hidden_layers = 20
    params = parameters_from_config(config)
    moved = set(draw(params, SelectionConfig(level=level), 1, 3).updated)
    still = sorted(name for name in moved if "input_layernorm" in name)[:2]
    (fit,) = [fit for fit in fits(params, moved - {*still}) if fit.level == level]
    assert (fit.ratios[0], fit.unmoved) == (0.5, 2)
    matrix = next(name for name in sorted(moved) if "up_proj" in name)
    assert (level, 0.5) not in [(fit.level, fit.ratios[0]) for fit in fits(params, moved - {matrix})]


@pytest.mark.parametrize("level", ["layer", "category"])
def test_the_ratio_nearest_to_a_half_comes_first(level):
    moved = set(draw(DEEP, SelectionConfig(level=level), 1, 3).updated)
    assert next(fit.ratios[0] for fit in fits(DEEP, moved) if fit.level == level) == 0.5
