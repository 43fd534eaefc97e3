"""Figures: what is to be shown -> a matplotlib figure, and figures -> PNG and SVG, the same bytes for the same runs.

At most 6.9 inches wide, with letters of 8 points. Methods differ in colour (Okabe and Ito's, which
people who do not see colours well can tell apart), marker and line; maps are cividis with their numbers in the cells.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

matplotlib.use("Agg")

WIDTH = 6.9  # inches

LETTERS = 8  # points

STYLES = {
    "FFT": ("#D55E00", "o", "-"), "HFT": ("#0072B2", "s", "--"), "Half-Reset": ("#CC79A7", "D", ":"),
    "LoRA": ("#009E73", "^", "-."), "DPO": ("#E69F00", "v", "-"), "HFT-DPO": ("#56B4E9", "P", "--"),
}  # fmt: skip

SEQUENCES = {"replay": ("^", "-."), "gem": ("X", ":")}  # marker and line of a method with it

MORE = [
    (colour, marker, line)
    for line, markers in (("-.", "X<>*"), (":", "hpd8"), ("--", "v^Ps"))
    for colour, marker in zip(("#009E73", "#E69F00", "#56B4E9", "#000000"), markers, strict=True)
]

PARTS = (("#0072B2", ""), ("#E69F00", "///"), ("#DDDDDD", "..."))  # of a whole: colour and hatch

PLAIN = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine has it
    "font.size": LETTERS,
    "axes.titlesize": LETTERS,
    "axes.labelsize": LETTERS,
    "xtick.labelsize": LETTERS - 1,
    "ytick.labelsize": LETTERS - 1,
    "legend.fontsize": LETTERS - 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "hft",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Dot:
    """A mean at `x` with its interval, where there is one, and the values behind it."""

    x: float
    mean: float
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Dots of one method by panel, joined by a line if `joined`. `style` is what its look hangs on."""

    label: str
    style: str
    panels: Mapping[str, tuple[Dot, ...]]
    joined: bool = True


@dataclass(frozen=True)
class Map:
    """A matrix with the names of its rows and columns; None is left blank."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]


def rendered(figure: Figure) -> tuple[bytes, bytes]:
    """A figure as PNG (200 dots an inch) and SVG, without dates or versions in them. Closes it."""
    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(PLAIN):
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # all is in its place, and need not be found again
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    return png.getvalue(), svg.getvalue()


def looks(styles: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each: FFT, HFT and so on always their own, with replay or GEM their own colour."""
    found = {style: STYLES[style] for style in styles if style in STYLES}
    for style in styles:
        method, _, sequence = style.partition(" + ")
        if method in STYLES and sequence in SEQUENCES:
            found[style] = (STYLES[method][0], *SEQUENCES[sequence])
    used = {colour for colour, _, _ in found.values()}
    free = sorted(MORE, key=lambda look: look[0] in used)
    others = [style for style in dict.fromkeys(styles) if style not in found]
    return found | {style: free[i % len(free)] for i, style in enumerate(others)}


def _within(axes: Axes, label: str, side: str) -> None:
    """Cut an axis at what its measure can be: an interval of two runs may leave it by far."""
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    ends = (-3, 103) if "(%)" in label else (-103, 103)
    (axes.set_xlim if side == "x" else axes.set_ylim)(max(low, ends[0]), min(high, ends[1]))


def curves(
    series: Sequence[Series],
    panels: Sequence[tuple[str, str]],
    across: str,
    ticks: Mapping[float, str] | None = None,
    log: bool = False,
) -> Figure:
    """Panels (key, axis label) side by side, means with intervals over `across`, each run a small dot."""
    with matplotlib.rc_context(PLAIN):
        figure, grid = _panels(len(panels), 2.5)
        by = looks([one.style for one in series])
        for axes, (key, label) in zip(grid, panels, strict=False):
            for one in series:
                dots = sorted(one.panels.get(key, ()), key=lambda dot: dot.x)
                if dots:
                    _line(axes, dots, one, by[one.style])
            axes.set(xlabel=across, ylabel=label)
            if log:
                axes.set_xscale("log")
            if ticks:
                axes.set_xticks(list(ticks), list(ticks.values()))
                axes.minorticks_off()
            axes.margins(x=0.08, y=0.12)
            _within(axes, label, "y")
        _legend(figure, grid[: len(panels)])
    return figure


def _line(axes: Axes, dots: Sequence[Dot], one: Series, look: tuple[str, str, str]) -> None:
    colour, marker, line = look
    x, y = [dot.x for dot in dots], [dot.mean for dot in dots]
    axes.plot(
        x, y, color=colour, marker=marker, markersize=5, linewidth=1.3, label=one.label,
        linestyle=line if one.joined else "none",
    )  # fmt: skip
    for dot in dots:
        if dot.low is not None and dot.high is not None:
            axes.plot([dot.x, dot.x], [dot.low, dot.high], color=colour, linewidth=1, marker="_", markersize=4)
        if len(dot.values) > 1:
            axes.plot([dot.x] * len(dot.values), dot.values, color=colour, marker=".", markersize=3, linestyle="none",
                      alpha=0.6)  # fmt: skip


def paths(series: Sequence[Series], across: str, up: str, key: str = "path") -> Figure:
    """One panel of `up` against `across`; each series is a path through its points, in the order given."""
    with matplotlib.rc_context(PLAIN):
        figure, (axes,) = _panels(1, 3.2, width=4.6)
        by = looks([one.style for one in series])
        for one in series:
            colour, marker, line = by[one.style]
            dots = one.panels[key]
            axes.plot(
                [dot.x for dot in dots], [dot.mean for dot in dots], color=colour, marker=marker, markersize=5,
                linewidth=1.3, linestyle=line if one.joined else "none", label=one.label,
            )  # fmt: skip
        axes.set(xlabel=across, ylabel=up)
        axes.margins(0.06)
        _legend(figure, [axes])
    return figure


def tradeoff(series: Sequence[Series], rates: Sequence[float]) -> Figure:
    """Skill and retention against the learning rate, and against each other, where up and right is better."""
    skill, kept = "Skill learned (%)", "Retained (%)"
    with matplotlib.rc_context(PLAIN):
        figure, grid = _panels(3, 2.6)
        by = looks([one.style for one in series])
        for one in series:
            colour, marker, line = by[one.style]
            for axes, key in zip(grid, ("skill", "retained"), strict=False):
                dots = [dot for dot in one.panels[key] if dot.x > 0]
                if dots:
                    _line(axes, dots, one, by[one.style])
            axes = grid[2]
            x, y = ([dot.mean for dot in one.panels[key]] for key in ("skill", "retained"))
            style = line if one.joined else "none"
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.3, linestyle=style, label=one.label)
        for axes, up in zip(grid, (skill, kept, kept), strict=True):
            axes.set(ylabel=up, ylim=(-3, 103))
        for axes in grid[:2]:
            axes.set(xlabel="Learning rate")
            if rates:
                axes.set_xscale("log")
                axes.set_xticks(rates, [f"{rate:.0e}".replace("e-0", "e-") for rate in rates], rotation=0)
                axes.minorticks_off()
                axes.margins(x=0.1)
        grid[2].set(xlabel=skill, xlim=(-3, 103))
        _legend(figure, grid)
    return figure


def forest(labels: Sequence[str], styles: Sequence[str], panels: Sequence[tuple[str, Sequence[Dot | None]]]) -> Figure:
    """A line for each label, top down, and a panel for each measure: mean, interval, and each run a small dot.

    `styles` says whose colour and marker a line has. The dots' x is not used.
    """
    with matplotlib.rc_context(PLAIN):
        height = 0.75 + 0.2 * len(labels)
        figure: Figure
        figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, height), sharey=True, squeeze=False)
        by = looks(styles)
        for axes, (label, dots) in zip(grid[0], panels, strict=True):
            for at, (dot, style) in enumerate(zip(dots, styles, strict=True)):
                if dot is None:
                    continue
                colour, marker, _ = by[style]
                if dot.low is not None and dot.high is not None:
                    axes.plot([dot.low, dot.high], [at, at], color=colour, linewidth=1.4)
                if len(dot.values) > 1:
                    axes.plot(dot.values, [at] * len(dot.values), color=colour, marker="|", markersize=5,
                              linestyle="none", alpha=0.7)  # fmt: skip
                axes.plot([dot.mean], [at], color=colour, marker=marker, markersize=5)
            axes.set(xlabel=label)
            _within(axes, label, "x")
            axes.grid(axis="y", visible=False)
            if any(dot is not None and min(dot.mean, dot.low or 0) < 0 for dot in dots):
                axes.axvline(0, color="#555555", linewidth=0.8, zorder=0)
        grid[0][0].set_yticks(range(len(labels)), labels)
        grid[0][0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def maps(panels: Sequence[Map], label: str, form: str, low: float | None = None, high: float | None = None) -> Figure:
    """Matrices as maps with their numbers in the cells, all on one scale; empty cells are blank.

    `form` formats a cell. `low` and `high` are the scale's ends, else the smallest and largest cell.
    """
    values = [value for panel in panels for row in panel.cells for value in row if value is not None]
    low, high = min(values, default=0) if low is None else low, max(values, default=1) if high is None else high
    scale = Normalize(low, high if high > low else low + 1)
    colours = matplotlib.colormaps["cividis"]
    wide, tall = max(len(panel.columns) for panel in panels), max(len(panel.rows) for panel in panels)
    across = min(len(panels), max(1, round(WIDTH / (0.9 + 0.36 * wide))), 3)
    with matplotlib.rc_context(PLAIN | {"axes.grid": False}):
        down = math.ceil(len(panels) / across)
        figure: Figure
        figure, grid = plt.subplots(
            down, across, squeeze=False,
            figsize=(WIDTH if across > 1 else min(WIDTH, 1.9 + 0.45 * wide), down * (1.1 + _row(tall, 0.2) * tall)),
        )  # fmt: skip
        shown = list(grid.flat)
        small = LETTERS - 1 if wide <= 6 and across <= 2 else LETTERS - 2 if tall <= 20 else LETTERS - 3
        for axes, panel in zip(shown, panels, strict=False):
            cells = [[float("nan") if value is None else value for value in row] for row in panel.cells]
            mesh = axes.pcolormesh(cells, cmap=colours, norm=scale, edgecolors="white", linewidth=0.6)
            for i, row in enumerate(panel.cells):
                for j, value in enumerate(row):
                    if value is not None and wide <= 24:  # more would not be read
                        dark = scale(value) < 0.55
                        axes.text(j + 0.5, i + 0.5, format(value, form), ha="center", va="center", fontsize=small,
                                  color="white" if dark else "black")  # fmt: skip
            _frame(axes, panel, small)
        for axes in shown[len(panels) :]:
            axes.set_visible(False)
        figure.colorbar(mesh, ax=shown, label=label, shrink=0.8, pad=0.02, aspect=30)
    return figure


def signs(panels: Sequence[Map]) -> Figure:
    """Maps of what was updated (dark, with a dot) and frozen (light); a blank cell is a matrix that is not there."""
    wide, tall = max(len(panel.columns) for panel in panels), max(len(panel.rows) for panel in panels)
    across = min(len(panels), max(1, int(WIDTH / max(1.6, 0.5 + (0.19 if tall <= 16 else 0.13) * wide))), 4)
    down = math.ceil(len(panels) / across)
    colours = matplotlib.colors.ListedColormap(["#E6E6E6", "#0072B2"])
    with matplotlib.rc_context(PLAIN | {"axes.grid": False}):
        size = (min(WIDTH, across * (0.7 + 0.24 * wide)), down * (1.25 + _row(tall, 0.15) * tall))
        figure: Figure
        figure, grid = plt.subplots(down, across, figsize=size, squeeze=False, sharey=True)
        shown = list(grid.flat)
        for axes, panel in zip(shown, panels, strict=False):
            cells = [[float("nan") if value is None else value for value in row] for row in panel.cells]
            axes.pcolormesh(cells, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
            there = [(j + 0.5, i + 0.5) for i, row in enumerate(panel.cells) for j, v in enumerate(row) if v]
            if there:
                axes.plot(*zip(*there, strict=True), linestyle="none", marker="o", color="white",
                          markersize=2.2 if tall <= 20 else 1.2)  # fmt: skip
            _frame(axes, panel, LETTERS - 2)
            axes.set_ylabel("Layer" if axes in grid[:, 0] else "")
        for axes in shown[len(panels) :]:
            axes.set_visible(False)
    return figure


def _row(count: int, most: float) -> float:
    """Inches of a row in a map of so many: less in a high one, so that it stays on a page."""
    return max(0.09, min(most, 3.4 / count))


def _frame(axes: Axes, panel: Map, small: float) -> None:
    axes.set_title(panel.title, fontsize=LETTERS - 1)
    axes.set_xticks([j + 0.5 for j in range(len(panel.columns))], panel.columns, rotation=45, ha="right",
                    rotation_mode="anchor", fontsize=small)  # fmt: skip
    step = math.ceil(len(panel.rows) / 40)
    kept = range(0, len(panel.rows), step)
    axes.set_yticks([i + 0.5 for i in kept], [panel.rows[i] for i in kept], fontsize=small)
    axes.set_ylim(len(panel.rows), 0)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def parts(labels: Sequence[str], shares: Sequence[Sequence[float]], names: Sequence[str], across: str) -> Figure:
    """A bar for each label, split into its shares (of 1), each with its percentage where it fits."""
    with matplotlib.rc_context(PLAIN):
        figure: Figure
        figure, axes = plt.subplots(figsize=(WIDTH, 0.95 + 0.24 * len(labels)))
        starts = [0.0] * len(labels)
        for i, name in enumerate(names):
            widths = [100 * share[i] for share in shares]
            colour, hatch = PARTS[i]
            axes.barh(range(len(labels)), widths, left=starts, color=colour, hatch=hatch, edgecolor="white", height=0.7,
                      label=name)  # fmt: skip
            for at, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width >= 6:
                    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                    axes.text(start + width / 2, at, f"{width:.0f}", ha="center", va="center", fontsize=LETTERS - 1,
                              bbox=box)  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel=across, xlim=(0, 100), ylim=(len(labels) - 0.5, -0.5))
        axes.grid(visible=False)
        _legend(figure, [axes])
    return figure


def _panels(count: int, height: float, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    across = min(count, 3) if count != 4 else 2
    down = math.ceil(count / across)
    size = (width if count > 1 or width < WIDTH else 4.6, down * height)
    figure, grid = plt.subplots(down, across, figsize=size, squeeze=False)
    shown = list(grid.flat)
    for axes in shown[count:]:
        axes.set_visible(False)
    return figure, shown[:count]


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    longest = max((len(label) for label in found), default=0)
    columns = max(1, min(len(found), 100 // (longest + 8)))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, frameon=False)
