"""The noise of scoring: by how much two scorings of one model differ."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from hft_cli.evaluation.score_files import read_items, read_scores


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
    ones, others = (read_items(file.with_suffix(".jsonl"), metric) for file in (first, again))
    pairs = [(ones[row], others[row]) for row in ones.keys() & others.keys()]
    pairs = pairs or [((read_scores(first)[0][metric], 1.0), (score, 1.0))]
    squares = sum((weight * (other - one)) ** 2 for (one, weight), (other, _) in pairs)
    noise = 1.96 * sqrt(squares) / sum(weight for (_, weight), _ in pairs)
    return Rescored(score, noise, sum(one != other for (one, _), (other, _) in pairs), len(pairs))
