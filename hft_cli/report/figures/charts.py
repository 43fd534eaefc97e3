"""Charts of measures: points with intervals, paths and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hft_cli.report.figures.style import FONT_SIZE, WIDTH, Style, add_legend, axes_grid, styles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR_STYLES = (("#0072B2", ""), ("#E69F00", "///"), ("#DDDDDD", "..."))  # colour and hatch of the parts of a bar
NARROW = 4.6  # inches


@dataclass(frozen=True)
class Point:
    """A mean at `x` with its interval, if it has one, and the values behind it."""

    x: float
    mean: float
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Line:
    """The points (x, y) of one run."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Series:
    """The points of one method in each panel, joined by a line if `joined`. Series of one `style` look the same."""

    label: str
    style: str
    panels: Mapping[str, tuple[Point, ...]]
    joined: bool = True


def curves(
    series: Sequence[Series], panels: Mapping[str, str], xlabel: str, ticks: Mapping[float, str] | None = None
) -> Figure:
    """Panels (key -> axis label) side by side with means and intervals over x; each run is a small dot."""
    figure, grid = _panels(len(panels), 2.5)
    styles = styles_of([entry.style for entry in series])
    for axes, (key, label) in zip(grid, panels.items(), strict=True):
        for entry in series:
            _draw_series(axes, entry, sorted(entry.panels.get(key, ()), key=lambda point: point.x), styles[entry.style])
        axes.set(xlabel=xlabel, ylabel=label)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        axes.margins(x=0.08, y=0.12)
        low, high = axes.get_ylim()
        axes.set_ylim(*_clipped(low, high, label))
    add_legend(figure, grid)
    return figure


def frontiers(series: Sequence[Series], xlabel: str, ylabel: str) -> Figure:
    """The attained frontier of each series as thin steps, and its points ("path") as dots."""
    figure, (axes,) = axes_grid(1, 1, 1, (NARROW, 3.2))
    styles = styles_of([entry.style for entry in series])
    for entry in series:
        colour, marker, line = styles[entry.style]
        points = entry.panels["path"]
        xs = sorted({point.x for point in points})
        ys = [max(point.mean for point in points if point.x >= x) for x in xs]
        axes.step(xs, ys, where="pre", color=colour, linestyle=line, linewidth=0.8, alpha=0.8)
        axes.plot([point.x for point in points], [point.mean for point in points], color=colour, marker=marker,
                  markersize=4, linestyle="none", alpha=0.8, label=entry.label)  # fmt: skip
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(0.06)
    add_legend(figure, [axes])
    return figure


def lines(panels: Mapping[str, Sequence[Line]], xlabel: str, ylabel: str) -> Figure:
    """Thin lines in panels (title -> lines), on one logarithmic scale. Lines of one label look the same."""
    figure, grid = _panels(len(panels), 2.1)
    styles = styles_of([line.label for entries in panels.values() for line in entries])
    values = [y for entries in panels.values() for line in entries for _, y in line.points]
    for axes, (title, entries) in zip(grid, panels.items(), strict=True):
        for line in entries:
            colour, _, dashes = styles[line.label]
            axes.plot(*zip(*line.points, strict=True), color=colour, linestyle=dashes, linewidth=0.8, alpha=0.8,
                      label=line.label)  # fmt: skip
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, fontsize=FONT_SIZE)
        if min(values) > 0:
            axes.set(yscale="log", ylim=(0.8 * min(values), 1.25 * max(values)))
    add_legend(figure, grid)
    return figure


def tradeoff(series: Sequence[Series], rates: Sequence[float], skill: str, retained: str) -> Figure:
    """Skill and retention over the learning rate, and retention over skill, where up and right is better.

    Each series has the panels "skill" and "retained", point by point the same runs. `skill` and `retained` are labels.
    """
    figure, grid = _panels(3, 2.6)
    styles = styles_of([entry.style for entry in series])
    for entry in series:
        for axes, key in zip(grid, ("skill", "retained"), strict=False):
            _draw_series(axes, entry, [point for point in entry.panels[key] if point.x > 0], styles[entry.style])
        pairs = zip(entry.panels["skill"], entry.panels["retained"], strict=True)
        _draw_means(grid[2], entry, [Point(x.mean, y.mean) for x, y in pairs], styles[entry.style])
    for axes, ylabel in zip(grid, (skill, retained, retained), strict=True):
        axes.set(ylabel=ylabel, ylim=_scale(axes.get_ylim()))
    for axes in grid[:2]:
        axes.set(xlabel="Learning rate")
        if rates:
            axes.set_xscale("log")
            axes.set_xticks(rates, [_rate(rate) for rate in rates], rotation=0)
            axes.minorticks_off()
            axes.margins(x=0.1)
    grid[2].set(xlabel=skill, xlim=_scale(grid[2].get_xlim()))
    add_legend(figure, grid)
    return figure


def forest(labels: Sequence[str], styles: Sequence[str], panels: Mapping[str, Sequence[Point | None]]) -> Figure:
    """A row for each label and a panel for each measure (axis label -> points): mean, interval, and a stroke a run.

    The points' x is not used.
    """
    figure, grid = axes_grid(1, len(panels), len(panels), (WIDTH, 0.75 + 0.2 * len(labels)), sharey=True)
    style_of = styles_of(styles)
    for axes, (label, points) in zip(grid, panels.items(), strict=True):
        for y, (point, style) in enumerate(zip(points, styles, strict=True)):
            if point is not None:
                _draw_forest_row(axes, y, point, style_of[style])
        axes.set(xlabel=label)
        low, high = axes.get_xlim()
        axes.set_xlim(*_clipped(low, high, label))
        axes.grid(axis="y", visible=False)
        if any(point is not None and min(point.mean, point.low or 0) < 0 for point in points):
            axes.axvline(0, color="#555555", linewidth=0.8, zorder=0)
    grid[0].set_yticks(range(len(labels)), labels)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def stacked_bars(labels: Sequence[str], shares: Sequence[Sequence[float]], parts: Sequence[str], xlabel: str) -> Figure:
    """A bar for each label, split into its shares of 1, with their percentages where they fit."""
    figure, (axes,) = axes_grid(1, 1, 1, (WIDTH, 0.95 + 0.24 * len(labels)))
    starts = [0.0] * len(labels)
    for i, part in enumerate(parts):
        widths = [100 * share[i] for share in shares]
        colour, hatch = BAR_STYLES[i]
        axes.barh(range(len(labels)), widths, left=starts, color=colour, hatch=hatch, edgecolor="white", height=0.7,
                  label=part)  # fmt: skip
        for y, (start, width) in enumerate(zip(starts, widths, strict=True)):
            if width >= 6:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                axes.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=FONT_SIZE - 1,
                          bbox=box)  # fmt: skip
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel=xlabel, xlim=(0, 100), ylim=(len(labels) - 0.5, -0.5))
    axes.grid(visible=False)
    add_legend(figure, [axes])
    return figure


def _rate(rate: float) -> str:
    """A learning rate with the digits that it has: 1.5e-3."""
    digits, _, exponent = f"{rate:.3e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side, `height` inches each row."""
    across = min(count, 3) if count != 4 else 2
    down = math.ceil(count / across)
    return axes_grid(down, across, count, (WIDTH if count > 1 else NARROW, down * height))


def _scale(ends: tuple[float, float]) -> tuple[float, float]:
    """The ends of an axis from 0 to 100, and further where there are points: a model may retain more than all."""
    return min(ends[0], -3), max(ends[1], 103)


def _clipped(low: float, high: float, label: str) -> tuple[float, float]:
    """The ends of an axis within what its measure can be. The interval of two runs can leave that by far."""
    return max(low, -3 if "(%" in label else -103), min(high, 203 if "of before" in label else 103)


def _draw_series(axes: Axes, series: Series, points: Sequence[Point], style: Style) -> None:
    """Means with their intervals, and each run as a small dot."""
    if not points:
        return
    colour = style[0]
    _draw_means(axes, series, points, style)
    for point in points:
        if point.low is not None and point.high is not None:
            axes.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1, marker="_", markersize=4)
        if len(point.values) > 1:
            axes.plot([point.x] * len(point.values), point.values, color=colour, marker=".", markersize=3,
                      linestyle="none", alpha=0.6)  # fmt: skip


def _draw_means(axes: Axes, series: Series, points: Sequence[Point], style: Style) -> None:
    colour, marker, line = style
    axes.plot(
        [point.x for point in points], [point.mean for point in points], color=colour, marker=marker, markersize=5,
        linewidth=1.3, linestyle=line if series.joined else "none", label=series.label,
    )  # fmt: skip


def _draw_forest_row(axes: Axes, y: int, point: Point, style: Style) -> None:
    colour, marker, _ = style
    if point.low is not None and point.high is not None:
        axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1.4)
    if len(point.values) > 1:
        axes.plot(point.values, [y] * len(point.values), color=colour, marker="|", markersize=5, linestyle="none",
                  alpha=0.7)  # fmt: skip
    axes.plot([point.mean], [y], color=colour, marker=marker, markersize=5)
