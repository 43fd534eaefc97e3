"""Section: draws against data."""

from __future__ import annotations

import numpy as np
import pytest
from report_runs import NAMES, figure, section, sections_of, table, write_run

TITLE = "Draws against data"


def test_crossed_seeds_give_shares_of_the_variance(tmp_path):
    for draw in (1, 2, 3):
        for data in (1, 2):
            write_run(tmp_path / f"{draw}{data}", seed=data, draw_seed=draw, retained=0.5 + 0.1 * draw,
                      skill=0.5 + 0.1 * data)  # fmt: skip
    sections = sections_of(tmp_path)
    skill, retained = table(sections, "variance").records
    assert (skill["measure"], skill["grid"], retained["measure"]) == ("skill", "3 x 2", "retained")
    assert (skill["draw"], skill["data"], skill["rest"]) == pytest.approx((0, 1, 0))
    assert (retained["draw"], retained["data"], retained["rest"]) == pytest.approx((1, 0, 0))
    assert retained["sd"] == pytest.approx(0.1)
    assert 0 <= retained["draw_low"] <= 1 == pytest.approx(retained["draw_high"])
    (axes,) = figure(sections, "variance").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 100, 100, 0, 0, 0])


def test_runs_outside_the_full_grid_are_noted(tmp_path):
    for draw, data in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1)):
        write_run(tmp_path / f"{draw}{data}", seed=data, draw_seed=draw, retained=0.1 * draw)
    _, retained = table(sections_of(tmp_path), "variance").records
    assert (retained["grid"], retained["note"]) == ("2 x 2", "1 runs outside the full grid are left out")


def test_the_effect_of_updating_a_layer_is_recovered(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(14):
        updated = [name for name in NAMES if rng.random() < 0.5]
        lost = sum(".layers.1." in name for name in updated)
        write_run(tmp_path / str(seed), level="model", draw_seed=seed, updated=updated, retained=0.9 - 0.05 * lost)
    records = table(sections_of(tmp_path), "effects").records
    layers = {r["term"]: r for r in records if r["family"] == "layer" and r["measure"] == "retained"}
    assert layers["layer 1"]["effect"] == pytest.approx(-0.05)
    assert layers["layer 0"]["effect"] == pytest.approx(0)
    assert layers["layer 1"]["p"] < 0.01 < 0.2 < layers["layer 0"]["p"]
    assert {r["term"] for r in records if r["family"] == "category"} == {"attention", "feed-forward", "norm"}


def test_a_draw_counts_once_over_its_data_seeds(tmp_path):
    for draw in range(5):
        updated = [name for i, name in enumerate(NAMES) if i != draw]
        for data in (1, 2):
            write_run(tmp_path / f"{draw}{data}", level="model", draw_seed=draw, seed=data, updated=updated)
    text = section(sections_of(tmp_path), TITLE).text
    assert "HFT: effects by matrix need 7 different draws or more; there are 5." in text


def test_too_few_draws_for_effects_are_noted(tmp_path):
    for seed in range(5):
        write_run(tmp_path / str(seed), level="model", draw_seed=seed, updated=NAMES[seed : 2 * seed + 5])
    text = section(sections_of(tmp_path), TITLE).text
    assert "HFT: effects by category need 5 different draws or more; there are 5." not in text
    assert any("effects by matrix need" in line for line in text)
