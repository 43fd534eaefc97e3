"""The examples in .github/CONTRIBUTING.md work: a copy of the package gets each as the document says, and runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import QUICK, Ended, environment

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
EXAMPLE = re.compile(
    r"```python\n# (?P<file>\S+\.py)\n(?P<function>.*?)\n# (?P<registry>[A-Z]+)\n(?P<row>.*?)```", re.DOTALL
)


def add(folder: Path, example: re.Match[str]) -> None:
    """The function goes above its registry, the row at the end of it."""
    file = folder / example["file"]
    before, head, rest = re.split(rf"^({example['registry']}\b.*= \{{\n)", file.read_text(), flags=re.MULTILINE)
    rows, end, after = re.split(r"^(\}\n)", rest, maxsplit=1, flags=re.MULTILINE)
    file.write_text(before + example["function"] + "\n\n\n" + head + rows + example["row"] + end + after)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the package with all examples of the guide in it."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("hft_cli", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for example in EXAMPLE.finditer(GUIDE):
        add(folder, example)
    return folder


@pytest.fixture(scope="module")
def help_text(extended) -> str:
    return python(extended, "-m", "hft_cli", "train", "--help").out


def python(folder: Path, *arguments: object) -> Ended:
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]])}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=folder, env=environment() | paths
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_the_guide_has_an_example_of_each_kind():
    registries = ["STRATEGIES", "READERS", "BENCHMARKS", "METRICS", "TRACKERS", "METHODS"]
    assert [example["registry"] for example in EXAMPLE.finditer(GUIDE)] == registries


def test_a_new_strategy_shape_and_tracker_run(extended, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"What is {n}?", "answer": str(n)}) + "\n" for n in range(16)))
    run = tmp_path / "run"
    ended = python(
        extended, "-m", "hft_cli", "train", *QUICK, "+method=hft", "selection.level=bottom", f"data.path={rows}",
        "data.format=faq", "tracking.name=csv", "train.max_steps=2", f"output_dir={run}",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    (entry,) = json.loads((run / "draws.json").read_text())["rounds"]
    assert {name.split(".")[2] for name in entry["updated"] if ".layers." in name} == {"0", "1"}
    lines = [line.split(",") for line in (run / "tracking.csv").read_text().splitlines()]
    assert [step for step, name, _ in lines if name == "train/loss"] == ["1", "2"]


def test_a_new_method_gives_its_phases(extended):
    ended = python(extended, "-m", "hft_cli", "plan", "+method=hft", "method.name=twice", "data=pocket_order")
    assert ended.status == 0, ended.err
    assert "order-1" in ended.out
    assert "order-2" in ended.out


def test_a_new_benchmark_is_read_with_its_settings(extended, tmp_path):
    question = {"stem": "What is 1 + 1?", "choices": [{"text": "2", "label": "A"}, {"text": "3", "label": "B"}]}
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/ARC-Easy-Test.jsonl").write_text(json.dumps({"id": 1, "question": question, "answerKey": "A"}))
    code = """\
import sys
from pathlib import Path
from hft_cli.config.schema import SuiteConfig
from hft_cli.evaluation.local_files import read_splits
from hft_cli.evaluation.metrics import METRICS
from hft_cli.evaluation.suite import read_suite

suite = read_suite(SuiteConfig(name="mine", data_dir=sys.argv[1], benchmarks={"arc_easy": {"shots": 3}}))
print(suite.benchmarks["arc_easy"].shots, len(suite.hashes["arc_easy"]))
print(read_splits("arc_easy", "", Path(sys.argv[1]), 0)["test"][0]["choices"], METRICS["length"]("", "ab", "cd"))
"""
    ended = python(extended, "-c", code, tmp_path)
    assert ended.out == "3 64\n{'text': ['2', '3'], 'label': ['A', 'B']} 1.0\n", ended.err


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("selection.level", "bottom"),
        ("data.format", "faq"),
        ("tracking.name", "csv"),
        ("data.metric", "length"),
    ],
)
def test_a_new_row_is_a_choice_and_in_the_help(extended, help_text, setting, name):
    ended = python(extended, "-m", "hft_cli", "train", *QUICK, "+method=hft", f"{setting}={name}x", "output_dir=run")
    assert ended.status == 2
    assert f"Did you mean '{name}'?" in ended.err
    entry = re.search(rf"^  {re.escape(setting)}=.*?\[one of (.*?)\]", help_text, re.DOTALL | re.MULTILINE)
    assert name in re.split(r"[,\s]+", entry[1])
