"""Charts of measures."""

from __future__ import annotations

from hft_cli.report.figures.charts import Point, Series, curves, forest


def test_axes_end_where_the_measure_ends():
    """The interval of two runs can leave the scale by far."""
    points = (Point(0.0, 50.0, -900.0, 1000.0, (40.0, 60.0)), Point(1.0, 60.0))
    series = Series("HFT", "HFT", {"skill": points, "bwt": points})
    axes = curves([series], {"skill": "Skill learned (%)", "bwt": "BWT (points)"}, "Ratio").axes
    assert [entry.get_ylim() for entry in axes] == [(-3, 103), (-103, 103)]
    (row,) = forest(["HFT"], ["HFT"], {"Skill learned (%)": [points[0]]}).axes
    assert row.get_xlim() == (-3, 103)


def test_a_forest_with_losses_has_a_line_at_zero():
    gains, losses = forest(["a", "b"], ["a", "b"], {"x": [Point(0, 1.0), None], "y": [None, Point(0, -1.0)]}).axes
    assert len(gains.lines) == 1
    assert [list(line.get_xdata()) for line in losses.lines] == [[-1.0], [0, 0]]


def test_each_run_of_several_is_a_dot():
    series = Series("HFT", "HFT", {"skill": (Point(0.5, 50.0, 40.0, 60.0, (45.0, 55.0)),)})
    mean, interval, dots = curves([series], {"skill": "Skill learned (%)"}, "Ratio").axes[0].lines
    assert list(mean.get_ydata()) == [50.0]
    assert list(interval.get_ydata()) == [40.0, 60.0]
    assert list(dots.get_ydata()) == [45.0, 55.0]
