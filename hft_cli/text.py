"""Numbers with units, and tables, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def format_bytes(value: float) -> str:
    """Bytes with a unit, in powers of 1,024: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:,.1f} {unit}"


# Metrics that are no shares of 1: in the harness's and sacrebleu's units.
_NO_SHARE = re.compile(r"perplexity|bits_per_byte|bleu|chrf|\bter\b|likelihood|loss")


# Metrics of which less is better: losses, and errors of text.
_LOSS = re.compile(r"perplexity|bits_per_byte|loss|nll|brier|\b(wer|cer|ter)\b")


def is_loss(metric: str) -> bool:
    """Whether less of a metric is better."""
    return bool(_LOSS.search(metric))


def is_share(metric: str, value: float) -> bool:
    """Whether a score is a share of 1, and not perplexity, bits per byte, BLEU, …"""
    return not _NO_SHARE.search(metric) and -1 <= value <= 1


def format_score(metric: str, value: float) -> str:
    """A score: a share in percent, another metric in its own unit."""
    return f"{100 * value:.1f}" if is_share(metric, value) else f"{value:.4g}"


def plural(number: int, what: str, ending: str = "s") -> str:
    """A number with its noun: 1 GPU, 64 GPUs."""
    return f"{number:,} {what}{ending * (number != 1)}"


def first_of(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    ordered = list(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"{', '.join(ordered[:most])}{more}"


def format_count(elements: float) -> str:
    """A number of elements: 68.98B, 0.54M, 4,096."""
    for width, unit in ((1e9, "B"), (1e6, "M")):
        if elements >= width / 10:
            return f"{elements / width:,.2f}{unit}"
    return f"{elements:,.0f}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Integers as ranges: 0-3, 7, 9-11."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in columns of spaces."""
    lines = _aligned([heads, *rows])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in the source too."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [heads, *rows]]
    lines = _aligned(escaped, width=3)
    lines.insert(1, ["-" * len(cell) for cell in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX table for the package booktabs."""
    from tabulate import tabulate

    text: str = tabulate(rows, heads, tablefmt="latex_booktabs", disable_numparse=True)
    return text


def _aligned(rows: Sequence[Sequence[str]], width: int = 0) -> list[list[str]]:
    """The cells padded to the width of their column, at least `width`."""
    widths = [max(width, *map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(size) for cell, size in zip(row, widths, strict=True)] for row in rows]


def natural_order(text: str) -> list[tuple[int, str]]:
    """A sort key that puts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def mebibytes(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:,.0f} MiB"
