"""Two scorings of one model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hft_cli.evaluation.rescoring import compare_scorings


def write(folder: Path, values: list[float], metric: str = "acc", **more: list[float]) -> Path:
    folder.mkdir(parents=True)
    file = folder / "t.json"
    rows = [{"row": n, metric: value} | {key: each[n] for key, each in more.items()} for n, value in enumerate(values)]
    file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(json.dumps({metric: sum(values) / len(values), "items": len(values)}))
    return file


def test_the_same_scores_have_no_noise(tmp_path):
    first, again = (write(tmp_path / name, [1, 0, 1, 1]) for name in "ab")
    compared = compare_scorings(first, again)
    assert (compared.score, compared.noise, compared.changed, compared.items) == (0.75, 0, 0, 4)


def test_flips_that_cancel_out_are_noise_all_the_same(tmp_path):
    first, again = write(tmp_path / "a", [1, 0] * 50), write(tmp_path / "b", [0, 1] * 2 + [1, 0] * 48)
    compared = compare_scorings(first, again)
    assert (compared.score, compared.changed) == (0.5, 4)
    assert compared.noise == pytest.approx(1.96 * 2 / 100)


def test_items_count_as_in_the_score(tmp_path):
    """The mean over tasks: the one item of a task counts as much as the three of the other."""
    first, again = (write(tmp_path / str(end), [1, 1, 1, end], task=["a", "a", "a", "b"]) for end in (1, 0))
    for file, mean in ((first, 1.0), (again, 0.5)):
        file.write_text(json.dumps({"acc": mean, "items": 4}))
    assert compare_scorings(first, again).noise == pytest.approx(1.96 / 2)


def test_items_are_paired_by_their_rows(tmp_path):
    first, again = write(tmp_path / "a", [1, 0, 0]), write(tmp_path / "b", [1, 0, 0])
    lines = again.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    again.with_suffix(".jsonl").write_text("".join(reversed(lines)))
    assert compare_scorings(first, again).changed == 0


def test_a_metric_of_the_whole_text_counts_as_one_item(tmp_path):
    """The harness keeps the parts of a perplexity in the place of an item's score."""
    first, again = (write(tmp_path / str(end), [end], "word_perplexity") for end in (12, 12.5))
    for file in (first, again):
        file.with_suffix(".jsonl").write_text('{"row": "wikitext/0", "word_perplexity": [-100.5, 40]}\n')
    compared = compare_scorings(first, again)
    assert (compared.score, compared.changed, compared.items) == (12.5, 1, 1)
    assert compared.noise == pytest.approx(1.96 * 0.5)


def test_the_noise_covers_a_third_scoring(tmp_path):
    """Answers that are right with some probability: a further difference lies within the noise of 19 in 20 cases."""
    draw = random.Random(0)
    within = 0
    for case in range(200):
        chances = [draw.choice((0.02, 0.5, 0.9, 1.0)) for _ in range(150)]
        scorings = [[float(draw.random() < chance) for chance in chances] for _ in range(4)]
        files = [write(tmp_path / f"{case}/{n}", values) for n, values in enumerate(scorings[:2])]
        noise = compare_scorings(*files).noise
        within += abs(sum(scorings[2]) - sum(scorings[3])) / 150 <= noise
    assert 0.9 <= within / 200 <= 0.99
