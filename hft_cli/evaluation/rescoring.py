"""The noise of scoring: by how much two scorings of one model differ."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from hft_cli.evaluation.score_files import read_items, read_scores, weights_of


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
    """Two files of scores of one model on one task, with their items beside them.

    A metric without scores of single items, such as a perplexity, counts as one item.
    """
    metric, score = next(iter(read_scores(again)[0].items()))
    first_score = read_scores(first)[0][metric]
    ones, others = (read_items(file.with_suffix(".jsonl"), metric) for file in (first, again))
    rows = [row for row in ones if row in others]
    values, again_values = ([items[row][0] for row in rows] for items in (ones, others))
    weights = weights_of([ones[row][1] for row in rows], [(values, first_score), (again_values, score)])
    if not rows:
        values, again_values = [first_score], [score]
    weights = weights or [1.0] * len(values)
    changes = [(weight, other - one) for weight, one, other in zip(weights, values, again_values, strict=True)]
    noise = 1.96 * sqrt(sum((weight * change) ** 2 for weight, change in changes)) / sum(weights)
    return Rescored(score, noise, sum(change != 0 for _, change in changes), len(changes))
