"""Charts of measures."""

from __future__ import annotations

from hft_cli.report.figures.charts import Point, Series, curves, forest, frontiers, tradeoff


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


def swept(label: str, points: list[tuple[float, float]]) -> Series:
    return Series(label, label, {"path": tuple(Point(x, y) for x, y in points)})


def test_a_frontier_has_its_labels_and_is_the_best_so_far():
    (axes,) = frontiers([swept("FFT", [(20.0, 90.0), (40.0, 95.0), (80.0, 50.0)])], "Learned", "Retained").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Learned", "Retained")
    steps, dots = axes.lines
    assert list(steps.get_ydata()) == [95.0, 95.0, 50.0]  # the run at 40 learned at least 20
    assert list(dots.get_ydata()) == [90.0, 95.0, 50.0]


def test_a_tradeoff_has_each_measure_on_its_own_axis():
    panels = {"skill": (Point(1.5e-3, 60.0), Point(2e-3, 70.0)), "retained": (Point(1.5e-3, 90.0), Point(2e-3, 80.0))}
    left, middle, right = tradeoff([Series("HFT", "HFT", panels)], [1.5e-3, 2e-3], "Learned", "Retained").axes
    assert [axes.get_ylabel() for axes in (left, middle, right)] == ["Learned", "Retained", "Retained"]
    assert [axes.get_xlabel() for axes in (left, middle, right)] == ["Learning rate", "Learning rate", "Learned"]
    assert list(left.lines[0].get_ydata()) == [60.0, 70.0]
    assert list(middle.lines[0].get_ydata()) == [90.0, 80.0]
    assert right.lines[0].get_xydata().tolist() == [[60.0, 90.0], [70.0, 80.0]]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1.5e-3", "2e-3"]  # not two of 2e-3


def test_no_point_is_outside_of_the_axes():
    panels = {"skill": (Point(1e-3, -12.0),), "retained": (Point(1e-3, 118.0),)}
    left, middle, right = tradeoff([Series("HFT", "HFT", panels)], [1e-3], "Learned", "Retained").axes
    assert left.get_ylim()[0] < -12
    assert middle.get_ylim()[1] > 118
    assert right.get_xlim()[0] < -12
    assert right.get_ylim()[1] > 118


def test_curves_are_labelled_on_both_axes():
    points = (Point(0.3, 50.0), Point(0.5, 60.0))
    figure = curves([Series("HFT", "HFT", {"skill": points})], {"skill": "Learned (points)"}, "Ratio", {0.3: "0.3"})
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Ratio", "Learned (points)")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.3"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["HFT"]
