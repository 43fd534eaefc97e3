"""The benchmarks that hft can read from local files: their tasks in lm-evaluation-harness, and the shapes of the files.

Prompts, stop sequences and metrics of a benchmark are those of the harness's task files. To add a benchmark, add one
row to `BENCHMARKS` at the foot of this file, and an entry to conf/suite/*.yaml. If its files do not have the shape of
the data set on the hub, also write one function that converts them. Importing this module needs the standard library
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_cli.config.settings import check_settings
from hft_cli.config.suites import BenchmarkConfig
from hft_cli.errors import UserError, choose
from hft_cli.files import from_dict
from hft_cli.paths import PACKAGE

Row = dict[str, Any]

RowReader = Callable[[Any, str], list[Row]]
"""(content of a file, part) -> rows in the shape of the data set on the hub."""

OWN_TASKS = PACKAGE / "assets" / "harness_tasks"  # task files that the harness does not have

LANGUAGES = {
    "ar": "arabic",
    "bn": "bengali",
    "en": "english",
    "fi": "finnish",
    "id": "indonesian",
    "ko": "korean",
    "ru": "russian",
    "sw": "swahili",
    "te": "telugu",
}


@dataclass(frozen=True)
class Benchmark:
    """The tasks and the local files of a benchmark.

    In `tasks` and in the patterns of `files`, * stands for a part of the benchmark (a subject, a language).

    Attributes:
        tasks: the names of its tasks in lm-evaluation-harness.
        folder: the folder of its rows, below suite.data_dir.
        files: split -> file patterns, of which the first that exists is read. The first split is the scored one.
        read_rows: converts the content of a file.
        task_folder: the folder of the task files, below the harness's folder of tasks, or absolute; None if it has the
            name `folder`.
        parts: the parts, if the names of the files do not contain them.
        runs_code: the metric runs programs that the model writes.
        takes_examples_from_scored: without enough training rows, few-shot examples are the last rows of the scored
            split.
    """

    tasks: str
    folder: str
    files: Mapping[str, tuple[str, ...]]
    read_rows: RowReader
    task_folder: str | Path | None = None
    parts: tuple[str, ...] = ()
    runs_code: bool = False
    takes_examples_from_scored: bool = False

    @property
    def scored_split(self) -> str:
        """The split whose items are scored."""
        return next(iter(self.files))


def benchmark_settings(name: str, values: Mapping[str, Any] | None) -> BenchmarkConfig:
    """Check a suite's settings of the benchmark `name`.

    Raises:
        UserError: for an unknown benchmark or key, or a value out of range.
    """
    key = f"suite.benchmarks.{name}"
    choose("benchmark in suite.benchmarks", name, BENCHMARKS)
    config: BenchmarkConfig = from_dict(BenchmarkConfig, dict(values or {}), f"{key}.")
    check_settings(config, f"{key}.")
    if config.samples > 1 and not config.temperature:
        raise UserError(f"{key}: {config.samples} samples at temperature 0 are all the same. Set {key}.temperature.")
    if any(not 1 <= k <= config.samples for k in config.pass_at):
        raise UserError(f"{key}.pass_at={list(config.pass_at)} needs k from 1 to {key}.samples={config.samples}.")
    if (config.samples > 1 or config.pass_at) and not BENCHMARKS[name].runs_code:
        runs_code = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.runs_code)
        raise UserError(f"{key}: samples and pass_at are for {runs_code}.")
    return config


def all_columns(content: Any, part: str) -> list[Row]:
    return [dict(row) for row in content]


def columns(*names: str) -> RowReader:
    """A reader that keeps these columns."""
    return lambda content, part: [{name: row[name] for name in names} for row in content]


def mmlu_rows(content: Any, part: str) -> list[Row]:
    """Records of a question, four choices and the letter of the answer (hendrycks/test)."""
    return [
        {"question": question, "subject": part, "choices": choices, "answer": "ABCD".index(answer)}
        for question, *choices, answer in content
    ]


def bbh_rows(content: Any, part: str) -> list[Row]:
    return [{"input": row["input"], "target": row["target"]} for row in content["examples"]]


def truthfulqa_rows(content: Any, part: str) -> list[Row]:
    """TruthfulQA.csv (sylinrl/TruthfulQA).

    MC1: the best answer, then the incorrect ones. MC2: all correct answers, then the incorrect ones.
    """
    names, *records = content
    rows = []
    for record in records:
        row = dict(zip(names, record, strict=True))
        correct, incorrect = (
            [answer.strip() for answer in row[column].split(";") if answer.strip()]
            for column in ("Correct Answers", "Incorrect Answers")
        )
        rows.append(
            {
                "question": row["Question"],
                "mc1_targets": _labelled([row["Best Answer"].strip()], incorrect),
                "mc2_targets": _labelled(correct, incorrect),
            }
        )
    return rows


def _labelled(correct: list[str], incorrect: list[str]) -> dict[str, list[Any]]:
    return {"choices": correct + incorrect, "labels": [1] * len(correct) + [0] * len(incorrect)}


def triviaqa_rows(content: Any, part: str) -> list[Row]:
    """Rows in the shape of the hub, or the file of the release (an object with Data)."""
    if isinstance(content, dict):
        content = [
            {
                "question": entry["Question"],
                "answer": {"value": entry["Answer"]["Value"], "aliases": entry["Answer"]["Aliases"]},
            }
            for entry in content["Data"]
        ]
    return [
        {
            "question": row["question"],
            "answer": {"value": row["answer"]["value"] or "", "aliases": row["answer"]["aliases"]},
        }
        for row in content
    ]


def tydiqa_rows(content: Any, part: str) -> list[Row]:
    """The rows of one language of the gold-passage task, in the shape of the hub or of the release (SQuAD's)."""
    if isinstance(content, dict):
        content = [
            {
                "id": question["id"],
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {
                    "text": [answer["text"] for answer in question["answers"]],
                    "answer_start": [answer["answer_start"] for answer in question["answers"]],
                },
            }
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    return [dict(row) for row in content if row["id"].startswith(f"{LANGUAGES[part]}-")]


def _truthfulqa(task: str) -> Benchmark:
    return Benchmark(
        tasks=task,
        folder="truthfulqa",
        files={"validation": ("TruthfulQA.csv",)},
        read_rows=truthfulqa_rows,
    )


BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        tasks="mmlu_*",
        folder="mmlu",
        task_folder="mmlu/default",
        files={"test": ("test/*_test.csv",), "dev": ("dev/*_dev.csv",)},
        read_rows=mmlu_rows,
    ),
    "gsm8k": Benchmark(
        tasks="gsm8k_cot",
        folder="gsm8k",
        files={"test": ("test.jsonl",), "train": ("train.jsonl",)},
        read_rows=columns("question", "answer"),
    ),
    "bbh": Benchmark(
        tasks="bbh_cot_fewshot_*",
        folder="bbh",
        task_folder="bbh/cot_fewshot",
        files={"test": ("bbh/*.json", "*.json")},
        read_rows=bbh_rows,
    ),
    "tydiqa": Benchmark(
        tasks="tydiqa_goldp_*",
        folder="tydiqa",
        files={
            "validation": ("tydiqa-goldp-v1.1-dev.json", "validation.jsonl", "goldp_from_tiny_dev.jsonl"),
            "train": ("tydiqa-goldp-v1.1-train.json", "train.jsonl"),
        },
        read_rows=tydiqa_rows,
        parts=tuple(LANGUAGES),
        takes_examples_from_scored=True,
    ),
    "truthfulqa_mc1": _truthfulqa("truthfulqa_mc1"),
    "truthfulqa_mc2": _truthfulqa("truthfulqa_mc2"),
    "humaneval": Benchmark(
        tasks="humaneval",
        folder="humaneval",
        files={"test": ("HumanEval.jsonl.gz", "HumanEval.jsonl")},
        read_rows=all_columns,
        runs_code=True,
    ),
    "nq_open": Benchmark(
        tasks="nq_open",
        folder="nq_open",
        files={
            "validation": ("NQ-open.dev.jsonl", "validation.jsonl"),
            "train": ("NQ-open.train.jsonl", "train.jsonl", "NQ-open.efficientqa.dev.1.1.jsonl"),
        },
        read_rows=columns("question", "answer"),
        takes_examples_from_scored=True,
    ),
    "triviaqa": Benchmark(
        tasks="triviaqa",
        folder="triviaqa",
        files={
            "validation": ("unfiltered-web-dev.json", "validation.jsonl", "triviaqa_subset.jsonl"),
            "train": ("unfiltered-web-train.json", "train.jsonl"),
        },
        read_rows=triviaqa_rows,
        takes_examples_from_scored=True,
    ),
    "hotpotqa": Benchmark(
        tasks="hotpotqa_closed_book",
        folder="hotpotqa",
        task_folder=OWN_TASKS,
        files={
            "validation": (
                "hotpot_dev_fullwiki_v1.json",
                "hotpot_dev_distractor_v1.json",
                "hotpot_dev_v1_simplified.json",
            ),
            "train": ("hotpot_train_v1.1.json", "train.json"),
        },
        read_rows=columns("question", "answer"),
        takes_examples_from_scored=True,
    ),
}
