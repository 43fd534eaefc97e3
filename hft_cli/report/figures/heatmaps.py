"""Matrices as maps: scores of tasks after rounds, and layers by matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hft_cli.checkpoint.naming import category, layer_and_matrix, short_names
from hft_cli.report.figures.style import FONT_SIZE, WIDTH, axes_grid
from hft_cli.report.runs import Matrix
from hft_cli.text import natural_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CATEGORIES = ("attention", "mixer", "feed-forward", "norm", "other")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # the usual order within a category, by short names
MOST_NUMBERED_COLUMNS = 24  # a wider map has no numbers in its cells, which nobody could read


@dataclass(frozen=True)
class Heatmap:
    """A matrix with the names of its rows and columns. Cells of None are blank."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Matrix


def layer_map(title: str, values: Mapping[str, float]) -> Heatmap:
    """Values by parameter name as a map of layers by matrices. A bias belongs to its matrix and is not shown."""
    cells: dict[tuple[int, str], float] = {}
    for name, value in values.items():
        place = layer_and_matrix(name)
        if place is not None and (place not in cells or name.endswith("weight")):
            cells[place] = value
    layers = sorted({layer for layer, _ in cells})
    names = short_names(sorted({matrix for _, matrix in cells}, key=natural_order))

    def order(matrix: str) -> tuple[int, int]:
        short = names[matrix]
        return CATEGORIES.index(category(matrix)), MATRICES.index(short) if short in MATRICES else len(MATRICES)

    matrices = sorted(names, key=order)
    grid = tuple(tuple(cells.get((layer, matrix)) for matrix in matrices) for layer in layers)
    return Heatmap(title, tuple(map(str, layers)), tuple(names[matrix] for matrix in matrices), grid)


def heatmaps(maps: Sequence[Heatmap], label: str, form: str, low: float | None = None, high: float | None = None
             ) -> Figure:  # fmt: skip
    """Maps with their numbers in the cells, all on one colour scale.

    Args:
        label: the label of the colour scale.
        form: the format of a cell's number.
        low, high: the ends of the scale; None for the smallest and the largest cell.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    values = [value for entry in maps for row in entry.cells for value in row if value is not None]
    low, high = min(values, default=0) if low is None else low, max(values, default=1) if high is None else high
    scale = Normalize(low, high if high > low else low + 1)
    colours = {"cmap": colormaps["cividis"], "norm": scale}
    wide, tall = _largest(maps)
    across = min(len(maps), max(1, round(WIDTH / (0.9 + 0.36 * wide))), 3)
    down = math.ceil(len(maps) / across)
    width = WIDTH if across > 1 else min(WIDTH, 1.9 + 0.45 * wide)
    figure, grid = axes_grid(down, across, len(maps), (width, down * (1.1 + _row_height(tall, 0.2) * tall)))
    font_size = FONT_SIZE - (1 if wide <= 6 and across <= 2 else 2 if tall <= 20 else 3)
    for axes, entry in zip(grid, maps, strict=True):
        mesh = _draw_map(axes, entry, colours, font_size)
        for i, row in enumerate(entry.cells):
            for j, value in enumerate(row):
                if value is not None and wide <= MOST_NUMBERED_COLUMNS:
                    axes.text(j + 0.5, i + 0.5, format(value, form), ha="center", va="center", fontsize=font_size,
                              color="white" if scale(value) < 0.55 else "black")  # fmt: skip
    figure.colorbar(mesh, ax=figure.axes, label=label, shrink=0.8, pad=0.02, aspect=30)
    return figure


def draw_maps(maps: Sequence[Heatmap]) -> Figure:
    """Maps of layers by matrices: 1 was updated (dark, with a dot), 0 frozen (light)."""
    from matplotlib.colors import ListedColormap

    wide, tall = _largest(maps)
    across = min(len(maps), max(1, int(WIDTH / max(1.6, 0.5 + (0.19 if tall <= 16 else 0.13) * wide))), 4)
    down = math.ceil(len(maps) / across)
    size = (min(WIDTH, across * (0.7 + 0.24 * wide)), down * (1.25 + _row_height(tall, 0.15) * tall))
    colours = {"cmap": ListedColormap(["#E6E6E6", "#0072B2"]), "vmin": 0, "vmax": 1}
    figure, grid = axes_grid(down, across, len(maps), size, sharey=True)
    for axes, entry in zip(grid, maps, strict=True):
        _draw_map(axes, entry, colours, FONT_SIZE - 2)
        dots = [(j + 0.5, i + 0.5) for i, row in enumerate(entry.cells) for j, value in enumerate(row) if value]
        if dots:
            axes.plot(*zip(*dots, strict=True), linestyle="none", marker="o", color="white",
                      markersize=2.2 if tall <= 20 else 1.2)  # fmt: skip
    for axes in grid[::across]:
        axes.set_ylabel("Layer")
    return figure


def _largest(maps: Sequence[Heatmap]) -> tuple[int, int]:
    """The largest numbers of columns and rows."""
    return max(len(entry.columns) for entry in maps), max(len(entry.rows) for entry in maps)


def _row_height(rows: int, most: float) -> float:
    """Inches of a row: less in a map with many rows, so that it fits on a page."""
    return max(0.09, min(most, 3.4 / rows))


def _draw_map(axes: Axes, heatmap: Heatmap, colours: dict[str, Any], font_size: float) -> Any:
    """Cells, title and tick labels. Returns what a colour bar needs."""
    cells = [[float("nan") if value is None else value for value in row] for row in heatmap.cells]
    mesh = axes.pcolormesh(cells, **colours, edgecolors="white", linewidth=0.6)
    axes.grid(visible=False)
    axes.set_title(heatmap.title, fontsize=FONT_SIZE - 1)
    axes.set_xticks([j + 0.5 for j in range(len(heatmap.columns))], heatmap.columns, rotation=45, ha="right",
                    rotation_mode="anchor", fontsize=font_size)  # fmt: skip
    labelled = range(0, len(heatmap.rows), math.ceil(len(heatmap.rows) / 40))
    axes.set_yticks([i + 0.5 for i in labelled], [heatmap.rows[i] for i in labelled], fontsize=font_size)
    axes.set_ylim(len(heatmap.rows), 0)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh
