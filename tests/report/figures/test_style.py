"""The look of the figures."""

from __future__ import annotations

from functools import partial

import matplotlib

from hft_cli.report.figures.charts import stacked_bars
from hft_cli.report.figures.style import METHOD_STYLES, OTHER_STYLES, render, styles_of


def test_a_method_looks_the_same_in_every_figure():
    assert styles_of(["HFT", "x", "FFT"])["HFT"] == styles_of(["HFT"])["HFT"] == METHOD_STYLES["HFT"]


def test_replay_keeps_the_colour_of_its_method():
    style = styles_of(["HFT + replay"])["HFT + replay"]
    assert style[0] == METHOD_STYLES["HFT"][0]
    assert style != METHOD_STYLES["HFT"]


def test_other_names_have_styles_of_their_own():
    names = ["FFT", *(f"setting {i}" for i in range(len(OTHER_STYLES)))]
    assert len(set(styles_of(names).values())) == len(names)
    assert len(styles_of([*names, "one more"])) == len(names) + 1


def test_the_users_settings_do_not_apply():
    draw = partial(stacked_bars, ["a"], [[0.4, 0.6]], ["x", "y"], "Share (%)")
    images = render(draw)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.facecolor": "blue"}):
        assert render(draw) == images
