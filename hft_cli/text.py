"""Text for people: tables, numbers with units."""

from __future__ import annotations

import re
from collections.abc import Sequence


def format_bytes(value: float) -> str:
    """Bytes for people, in powers of 1,024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:,.1f} {unit}"


def plural(number: int, what: str, ending: str = "s") -> str:
    """1 GPU, 64 GPUs."""
    return f"{number:,} {what}{ending * (number != 1)}"


def format_count(elements: float) -> str:
    """Elements for people: 68.98B, 0.54M, 4,096."""
    for width, unit in ((1e9, "B"), (1e6, "M")):
        if elements >= width / 10:
            return f"{elements / width:,.2f}{unit}"
    return f"{elements:,.0f}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-3, 7, 9-11."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as text too."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in [heads, *body]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def natural_order(text: str) -> list[tuple[int, str]]:
    """Sort key that puts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *rows]
    )


def percent_text(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
