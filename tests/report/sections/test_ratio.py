"""Section: ratio."""

from __future__ import annotations

import numpy as np
import pytest
from report_runs import figure, sections_of, table, write_run


def test_the_curve_ends_in_full_fine_tuning(tmp_path):
    for ratio in (0.25, 0.5, 0.75):
        for seed in (1, 2):
            write_run(tmp_path / f"{ratio}{seed}", ratio=ratio, seed=seed, skill=ratio + 0.01 * seed)
    write_run(tmp_path / "fft", "fft", skill=0.99)
    write_run(tmp_path / "other", "fft", skill=0.11, rate=9e-3)  # differs in the rate too
    sections = sections_of(tmp_path)
    records = table(sections, "ratio").records
    assert [(record["ratio"], record["runs"]) for record in records] == [(0.25, 2), (0.5, 2), (0.75, 2), (1.0, 1)]
    assert [record["skill"] for record in records] == pytest.approx([0.265, 0.515, 0.765, 0.99])
    line = next(line for line in figure(sections, "ratio").axes[0].lines if line.get_label() == "HFT category")
    assert line.get_xydata() == pytest.approx(np.array([[0.25, 26.5], [0.5, 51.5], [0.75, 76.5], [1, 99]]))


def test_each_level_has_a_curve_of_its_own(tmp_path):
    for level in ("category", "layer"):
        for ratio in (0.3, 0.6):
            write_run(tmp_path / f"{level}{ratio}", level=level, ratio=ratio)
    axes = figure(sections_of(tmp_path), "ratio").axes[0]
    labels = {line.get_label() for line in axes.lines if not line.get_label().startswith("_")}
    assert labels == {"HFT category", "HFT layer"}
