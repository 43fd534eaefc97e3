"""The benchmarks that hft knows: where lm-evaluation-harness has them, and which local files hold their rows.

A benchmark's prompts, stops and metrics are the harness's own, from its task files; only where the rows come from
differs. A new benchmark is a function that turns a file into rows of the hub's shape, and one row of `BENCHMARKS` at
the foot of this file. Standard library only.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
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

OURS = PACKAGE / "assets" / "harness_tasks"  # task files that the harness does not have


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is: `tasks` in folder `place` of the harness's, its rows in sub-folder `folder` of data_dir.

    In `tasks` and in the names of files, * is the part of a benchmark that has several: a subject, a language.
    """

    folder: str
    place: str | Path
    tasks: str
    files: Mapping[str, tuple[str, ...]]  # split -> names of which the first that is there is read
    scored: str  # the split whose items are scored
    rows: Callable[[Any, str], list[Row]]  # a file's content and the part -> rows of the hub's shape
    parts: tuple[str, ...] = ()  # where the files do not tell
    runs_code: bool = False
    spare: bool = False  # without a file of examples, take them from the end of the scored split


def settings(name: str, values: Mapping[str, Any] | None) -> BenchmarkConfig:
    """A suite's settings of the benchmark `name`, checked.

    Raises:
        UserError: for an unknown benchmark or key, or a value out of range.
    """
    where = f"suite.benchmarks.{name}"
    choose("benchmark in suite.benchmarks", name, BENCHMARKS)
    config: BenchmarkConfig = from_dict(BenchmarkConfig, dict(values or {}), where + ".")
    check_settings(config, where + ".")
    if config.samples > 1 and not config.temperature:
        raise UserError(
            f"{where}: {config.samples} samples at temperature 0 are all the same. Set {where}.temperature."
        )
    if any(not 1 <= k <= config.samples for k in config.pass_at):
        raise UserError(f"{where}.pass_at={list(config.pass_at)} needs k from 1 to {where}.samples={config.samples}.")
    if (config.samples > 1 or config.pass_at) and not BENCHMARKS[name].runs_code:
        raise UserError(f"{where}: samples and pass_at are for humaneval.")
    return config


def parts(name: str, data_dir: Path) -> tuple[str, ...]:
    """The parts of a benchmark whose scored rows are in `data_dir`; of a benchmark in one piece: ("",).

    Raises:
        UserError: if its folder or files are not there.
    """
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.folder
    if not folder.is_dir():
        there = sorted(path.name for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
        what = f"has no folder {benchmark.folder}" if data_dir.is_dir() else "is not a folder"
        raise UserError(
            f"suite.data_dir={data_dir} {what}, which {name} needs (it has: {', '.join(there) or 'no folders'}). Put "
            f"{_wanted(benchmark)} there, or leave {name} out (suite.only=[…])."
        )
    patterns = benchmark.files[benchmark.scored]
    if not any("*" in pattern for pattern in patterns):
        found = benchmark.parts or ("",)
        if _file(folder, patterns, "") is not None:
            return found
    for pattern in patterns:
        names = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
        before, _, after = pattern.partition("*")
        if names:
            return tuple(name.removeprefix(before).removesuffix(after) for name in names)
    raise UserError(f"{folder} has no {_wanted(benchmark)}, which {name} needs.")


def _wanted(benchmark: Benchmark) -> str:
    return " or ".join(benchmark.files[benchmark.scored])


def _file(folder: Path, patterns: tuple[str, ...], part: str) -> Path | None:
    names = (pattern.replace("*", part) for pattern in patterns)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def data_hash(name: str, data_dir: Path) -> str:
    """SHA-256 over the files of a benchmark, names and contents."""
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.folder
    files = {
        path
        for part in parts(name, data_dir)
        for patterns in benchmark.files.values()
        if (path := _file(folder, patterns, part)) is not None
    }
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def splits(name: str, part: str, data_dir: Path, examples: int) -> dict[str, list[Row]]:
    """Split -> rows of a part of a benchmark, in the shape of the hub's data set; a split without a file is left out.

    Where `examples` are to be drawn and no file holds as many, the last rows become them and are not scored. Empty if
    there are no more rows than that.

    Raises:
        UserError: for a file that does not have the shape.
    """
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.folder
    found: dict[str, list[Row]] = {}
    for split, patterns in benchmark.files.items():
        path = _file(folder, patterns, part)
        if path is None:
            continue
        try:
            found[split] = benchmark.rows(_content(path), part)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not have the shape of {name}: {type(error).__name__}: {error}") from None
    scored = found.get(benchmark.scored, [])
    if benchmark.spare and len(found.get("train", ())) < examples:
        found["train"], found[benchmark.scored] = scored[-examples:], scored[:-examples]
    return found if found.get(benchmark.scored) else {}


def _content(path: Path) -> Any:
    """What a file holds: JSON, a list of JSON lines, or a list of CSV's records."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        return list(csv.reader(io.StringIO(text, newline="")))
    if kind == "jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)


def _as_they_are(content: Any, part: str) -> list[Row]:
    return [dict(row) for row in content]


def _only(*keys: str) -> Callable[[Any, str], list[Row]]:
    return lambda content, part: [{key: row[key] for key in keys} for row in content]


def _mmlu(content: Any, part: str) -> list[Row]:
    """Records of question, four choices and the answer's letter (hendrycks/test)."""
    return [
        {"question": question, "subject": part, "choices": choices, "answer": "ABCD".index(answer)}
        for question, *choices, answer in content
    ]


def _truthfulqa(content: Any, part: str) -> list[Row]:
    """TruthfulQA.csv (sylinrl/TruthfulQA). MC1: the best answer, then the wrong ones; MC2: all right, then wrong."""
    names, *records = content
    rows = []
    for record in records:
        row = dict(zip(names, record, strict=True))
        right, wrong = (
            [answer.strip() for answer in row[key].split(";") if answer.strip()]
            for key in ("Correct Answers", "Incorrect Answers")
        )
        rows.append(
            {
                "question": row["Question"],
                "mc1_targets": {
                    "choices": [row["Best Answer"].strip(), *wrong],
                    "labels": [1] + [0] * len(wrong),
                },
                "mc2_targets": {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)},
            }
        )
    return rows


def _triviaqa(content: Any, part: str) -> list[Row]:
    """Rows in the hub's shape, or the release's own file (an object with Data)."""
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


def _bbh(content: Any, part: str) -> list[Row]:
    return [{"input": row["input"], "target": row["target"]} for row in content["examples"]]


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


def _tydiqa(content: Any, part: str) -> list[Row]:
    """One language's rows of the gold-passage task, in the hub's shape or the release's (SQuAD's)."""
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


_TRUTHFULQA = {"validation": ("TruthfulQA.csv",)}

BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        "mmlu", "mmlu/default", "mmlu_*", {"test": ("test/*_test.csv",), "dev": ("dev/*_dev.csv",)}, "test", _mmlu
    ),
    "gsm8k": Benchmark(
        "gsm8k",
        "gsm8k",
        "gsm8k_cot",
        {"test": ("test.jsonl",), "train": ("train.jsonl",)},
        "test",
        _only("question", "answer"),
    ),
    "bbh": Benchmark("bbh", "bbh/cot_fewshot", "bbh_cot_fewshot_*", {"test": ("bbh/*.json", "*.json")}, "test", _bbh),
    "tydiqa": Benchmark(
        "tydiqa",
        "tydiqa",
        "tydiqa_goldp_*",
        {
            "validation": ("tydiqa-goldp-v1.1-dev.json", "validation.jsonl", "goldp_from_tiny_dev.jsonl"),
            "train": ("tydiqa-goldp-v1.1-train.json", "train.jsonl"),
        },
        "validation",
        _tydiqa,
        parts=tuple(LANGUAGES),
        spare=True,
    ),
    "truthfulqa_mc1": Benchmark("truthfulqa", "truthfulqa", "truthfulqa_mc1", _TRUTHFULQA, "validation", _truthfulqa),
    "truthfulqa_mc2": Benchmark("truthfulqa", "truthfulqa", "truthfulqa_mc2", _TRUTHFULQA, "validation", _truthfulqa),
    "humaneval": Benchmark(
        "humaneval",
        "humaneval",
        "humaneval",
        {"test": ("HumanEval.jsonl.gz", "HumanEval.jsonl")},
        "test",
        _as_they_are,
        runs_code=True,
    ),
    "nq_open": Benchmark(
        "nq_open",
        "nq_open",
        "nq_open",
        {
            "validation": ("NQ-open.dev.jsonl", "validation.jsonl"),
            "train": ("NQ-open.train.jsonl", "train.jsonl", "NQ-open.efficientqa.dev.1.1.jsonl"),
        },
        "validation",
        _only("question", "answer"),
        spare=True,
    ),
    "triviaqa": Benchmark(
        "triviaqa",
        "triviaqa",
        "triviaqa",
        {
            "validation": ("unfiltered-web-dev.json", "validation.jsonl", "triviaqa_subset.jsonl"),
            "train": ("unfiltered-web-train.json", "train.jsonl"),
        },
        "validation",
        _triviaqa,
        spare=True,
    ),
    "hotpotqa": Benchmark(
        "hotpotqa",
        OURS,
        "hotpotqa_closed_book",
        {
            "validation": (
                "hotpot_dev_fullwiki_v1.json",
                "hotpot_dev_distractor_v1.json",
                "hotpot_dev_v1_simplified.json",
            ),
            "train": ("hotpot_train_v1.1.json", "train.json"),
        },
        "validation",
        _only("question", "answer"),
        spare=True,
    ),
}
