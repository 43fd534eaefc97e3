"""The look of the figures, and their files. The same runs give the same bytes on every machine.

Figures are at most 6.9 inches wide, with letters of 8 points. Methods differ in colour, marker and line. The colours
are by Okabe and Ito, and people with colour blindness can tell them apart. matplotlib is imported inside the functions,
so that commands that draw nothing start fast.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = tuple[str, str, str]  # colour, marker, line
WIDTH = 6.9  # inches
FONT_SIZE = 8  # points
SETTINGS = Path(__file__).parent / "hft.mplstyle"

METHOD_STYLES: dict[str, Style] = {
    "FFT": ("#D55E00", "o", "-"), "HFT": ("#0072B2", "s", "--"), "Half-Reset": ("#CC79A7", "D", ":"),
    "Interpolation": ("#999999", "h", ":"), "LoRA": ("#009E73", "^", "-."), "DPO": ("#E69F00", "v", "-"),
    "HFT-DPO": ("#56B4E9", "P", "--"), "FFT + L2-SP": ("#7B3294", ">", "-."), "FFT + KL": ("#A6761D", "<", ":"),
    "FFT + MoFO": ("#666666", "*", "-."), "FFT + WiSE-FT": ("#E69F00", "d", "--"),
    "FFT + mixed replay": ("#CC79A7", "v", "-."),
}  # fmt: skip

# Marker and line of a method that is combined with a measure against forgetting.
SEQUENCE_STYLES = {"replay": ("^", "-."), "mixed replay": ("v", "-."), "gem": ("X", ":")}

OTHER_STYLES: list[Style] = [
    (colour, marker, line)
    for line, markers in (("-.", "X<>*"), (":", "hpd8"), ("--", "v^Ps"))
    for colour, marker in zip(("#009E73", "#E69F00", "#56B4E9", "#000000"), markers, strict=True)
]


def axes_grid(
    down: int, across: int, count: int, size: tuple[float, float], sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches with the first `count` axes of a grid, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name: that of its method (also with replay or GEM), or an unused one."""
    styles = {name: METHOD_STYLES[name] for name in names if name in METHOD_STYLES}
    for name in names:
        method, _, sequence = name.partition(" + ")
        if name not in styles and method in METHOD_STYLES and sequence in SEQUENCE_STYLES:
            styles[name] = (METHOD_STYLES[method][0], *SEQUENCE_STYLES[sequence])
    used = {colour for colour, _, _ in styles.values()}
    free = sorted(OTHER_STYLES, key=lambda style: style[0] in used)
    others = [name for name in dict.fromkeys(names) if name not in styles]
    return styles | {name: free[i % len(free)] for i, name in enumerate(others)}


def add_legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """One legend for all panels, above them."""
    entries: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    longest = max((len(label) for label in entries), default=0)
    columns = max(1, min(len(entries), 100 // (longest + 8)))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False)


def render(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """A figure as PNG (200 dots an inch) and SVG, without dates and versions. The user's own settings do not apply."""
    import matplotlib

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(fname=SETTINGS):
        figure = draw()
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # the layout is done
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return png.getvalue(), svg.getvalue()
