"""Hand-made rows of benchmarks, in the shapes of the published files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

GSM8K = [
    {
        "question": f"Ann has {n} pens and buys {n}. How many has she?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(2, 10)
]
MMLU = [
    ("Which is a bone?", "femur", "liver", "skin, hair", 'the "lung"', "A"),
    ("How many hearts?\n", "0", "1", "2", "3", "B"),
]
TRUTHFULQA = [
    {
        "Type": "Adversarial",
        "Category": "Plants",
        "Question": "What grows from a pebble?",
        "Best Answer": "Nothing grows from a pebble",
        "Correct Answers": "Nothing grows from a pebble; Pebbles do not grow",
        "Incorrect Answers": "A tree; A mountain, in time",
        "Source": "nowhere",
    }
]
NQ_OPEN = [{"question": f"what is number {n}", "answer": [f"the {n}", str(n)]} for n in range(8)]
TRIVIAQA = [
    {"question": f"Which letter is number {n}", "answer": {"value": c, "aliases": [c, c.lower()]}}
    for n, c in enumerate("ABCDEFGH")
]
HOTPOTQA = [
    {"question": f"In which state is city {n}?", "answer": f"State {n}, D.C.", "type": "bridge"} for n in range(8)
]
BBH = [{"input": "not ( True ) and ( True ) is", "target": "False"}, {"input": "True or False is", "target": "True"}]
TYDIQA = [
    {
        "id": f"finnish-{n}",
        "title": "Kaupunki",
        "context": f"Kaupungissa on {n} taloa.",
        "question": "Montako taloa?",
        "answers": {"text": [f"{n} taloa"], "answer_start": [14]},
    }
    for n in range(4)
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def twice(x):\n",
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
]


def write(root: Path) -> Path:
    """Write the rows below `root` in the layout of suite.data_dir, and return `root`."""

    def lines(place: str, rows: list[dict]) -> None:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("gsm8k/test.jsonl", GSM8K[:2])
    lines("gsm8k/train.jsonl", GSM8K[2:])
    lines("nq_open/NQ-open.dev.jsonl", NQ_OPEN[:2])
    lines("nq_open/NQ-open.train.jsonl", NQ_OPEN[2:])
    lines("triviaqa/validation.jsonl", TRIVIAQA[:2])
    lines("triviaqa/train.jsonl", TRIVIAQA[2:])
    lines("tydiqa/validation.jsonl", TYDIQA[:2])
    lines("tydiqa/train.jsonl", TYDIQA[2:])
    for place, value in (
        ("hotpotqa/hotpot_dev_v1_simplified.json", HOTPOTQA),
        ("bbh/bbh/boolean_expressions.json", {"canary": "", "examples": BBH}),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(json.dumps(value))
    for split in ("test", "dev"):
        (root / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        with (root / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(MMLU)
    (root / "truthfulqa").mkdir()
    with (root / "truthfulqa" / "TruthfulQA.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(TRUTHFULQA[0]))
        writer.writeheader()
        writer.writerows(TRUTHFULQA)
    (root / "humaneval").mkdir()
    with gzip.open(root / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in HUMANEVAL)
    return root
