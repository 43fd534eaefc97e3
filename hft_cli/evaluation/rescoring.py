"""The noise of scoring: by how much two scorings of one model differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from hft_cli.evaluation.score_files import read_scores


@dataclass(frozen=True)
class Rescored:
    """A task that was scored twice.

    Attributes:
        score: of the second time, by the task's main metric.
        noise: half the width of the 95% interval of the difference between two scores of one model: 1.96 times the root
            of the sum of the items' squared differences, over their number. 0 if all items have the same score again.
        changed: number of items whose score is another.
        items: number of items.
    """

    score: float
    noise: float
    changed: int
    items: int


def compare_scorings(first: Path, again: Path) -> Rescored:
    """Two files of scores of one model on one task, with their items beside them."""
    scores, _ = read_scores(again)
    metric, score = next(iter(scores.items()))
    pairs = list(zip(_items(first), _items(again), strict=True))
    weights = [float(item.get("bytes", 1)) for item, _ in pairs]  # of a text; of other items 1
    differences = [float(other[metric]) - float(one[metric]) for one, other in pairs]
    squares = sum((weight * difference) ** 2 for weight, difference in zip(weights, differences, strict=True))
    noise = 1.96 * sqrt(squares) / sum(weights) if weights else 0.0
    return Rescored(score, noise, sum(difference != 0 for difference in differences), len(pairs))


def _items(file: Path) -> list[dict[str, Any]]:
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda item: str(item.get("row")))
