"""Write the rows of the comparison on SmolLM2 (scripts/smollm2/compare.sh) from public data sets.

    python scripts/smollm2/rows.py BBH GSM8K DOLLY OUT

BBH is the folder bbh of suzgunmirac/BIG-Bench-Hard, GSM8K one with train.jsonl and test.jsonl of
openai/grade-school-math, DOLLY a file of chats (JSON lines with `messages`), of which short ones are replayed. OUT
gets:

    skill_train.jsonl  32 rows each of four tasks of BBH with short answers, and 24 of GSM8K
    skill_test.jsonl   40 other rows of each of the four tasks
    gsm8k_text.jsonl   20 questions and answers of GSM8K's test set, as text
    general.jsonl      chats to replay
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

QUESTIONS = {
    "boolean_expressions": "Is the expression True or False?",
    "hyperbaton": "Answer (A) or (B).",
    "object_counting": "Answer with a number.",
    "sports_understanding": "Is the sentence plausible? Answer yes or no.",
}


def write(file: Path, rows: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main(bbh: Path, gsm8k: Path, chats: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    train, test = [], []
    for task, question in QUESTIONS.items():
        examples = json.loads((bbh / f"{task}.json").read_text())["examples"]
        rows = [{"prompt": f"{each['input'].strip()}\n{question}", "completion": each["target"]} for each in examples]
        draw.shuffle(rows)
        train += rows[:32]
        test += rows[200:240]
    draw.shuffle(train)
    solved = read(gsm8k / "train.jsonl")
    draw.shuffle(solved)
    short = [row for row in solved if len(row["question"] + row["answer"]) < 400][:24]
    unseen = read(gsm8k / "test.jsonl")
    draw.shuffle(unseen)
    general = [row for row in read(chats) if sum(len(turn["content"]) for turn in row["messages"]) < 300]
    random.Random(0).shuffle(general)
    write(out / "skill_train.jsonl", [*train, *({"prompt": r["question"], "completion": r["answer"]} for r in short)])
    write(out / "skill_test.jsonl", test)
    write(out / "gsm8k_text.jsonl", [{"text": f"{row['question']}\n{row['answer']}"} for row in unseen[:20]])
    write(out / "general.jsonl", [{"messages": row["messages"]} for row in general[:200]])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
