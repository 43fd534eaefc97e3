"""`hft eval` as a command: benchmarks from local files, finished scores, ranks, mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from benchmark_files import write
from helpers import hft

pytestmark = pytest.mark.xdist_group("eval")  # on one worker, because the tests share scores


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


ONE_RANK = (
    "eval", "suite=quick", "suite.only=[nq_open,hotpotqa,truthfulqa_mc2,mmlu,humaneval]", "suite.limit=2",
    f"suite.allow_code={'root' if os.getuid() == 0 else 'true'}",
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(data_dir, tmp_path_factory) -> tuple[Path, str]:
    """The folder in which some benchmarks were scored, and what the command printed."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    out = tmp_path_factory.mktemp("scored")
    done = hft(*ONE_RANK, f"suite.data_dir={data_dir}", f"output_dir={out}")
    assert done.status == 0, done.err
    return out, done.out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_suite_is_scored_from_local_files(scored):
    folder = scored[0] / "eval"
    record = json.loads((folder / "quick.json").read_text())["models"]["model"]
    scores, details = record["eval"]["quick"], record["details"]
    assert set(scores) == {"nq_open", "hotpotqa", "truthfulqa_mc2", "mmlu", "humaneval"}
    assert list(scores["mmlu"])[:2] == ["acc", "acc_stderr"]
    assert scores["nq_open"]["items"] == 2
    assert 0 < scores["truthfulqa_mc2"]["acc"] < 1
    assert len(details["mmlu"]["tasks_without_rows"]) == 56
    assert details["nq_open"]["versions"] == {"nq_open": 4.0}
    assert details["nq_open"]["limit"] == 2
    items = lines(folder / details["nq_open"]["items"])
    assert [item["row"] for item in items] == ["nq_open/0", "nq_open/1"]
    assert items[0]["target"] == ["the 0", "0"]
    assert "<|assistant|>" in items[0]["prompt"]  # through the embedded model's chat template


def test_a_score_is_the_mean_over_the_items_of_its_file(scored):
    folder = scored[0] / "eval"
    record = json.loads((folder / "quick.json").read_text())["models"]["model"]
    for name, scores in record["eval"]["quick"].items():
        metric, mean = next(iter(scores.items()))
        values = [item[metric] for item in lines(folder / record["details"][name]["items"])]
        assert sum(values) / len(values) == pytest.approx(mean)


def test_finished_benchmarks_are_skipped_and_other_results_stay(scored, data_dir):
    out, table = scored
    files = {path: path.stat().st_mtime_ns for path in (out / "eval" / "model" / "quick").iterdir()}
    results = json.loads((out / "eval" / "quick.json").read_text())
    selection = ("suite.only=[nq_open]", "suite.batch_size=3")
    again = hft(*ONE_RANK, *selection, f"suite.data_dir={data_dir}", f"output_dir={out}")
    assert again.status == 0, again.err
    assert "Scoring" not in again.err
    assert again.out == table
    assert json.loads((out / "eval" / "quick.json").read_text()) == results
    assert {path: path.stat().st_mtime_ns for path in (out / "eval" / "model" / "quick").iterdir()} == files


def test_two_ranks_give_the_scores_of_one(scored, data_dir, tmp_path):
    done = hft(
        *ONE_RANK, "suite.only=[nq_open,truthfulqa_mc2]", "engine=zero2", "engine.num_processes=2",
        f"suite.data_dir={data_dir}", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert done.status == 0, done.err
    files = sorted((tmp_path / "eval" / "model" / "quick").glob("*.jsonl"))
    assert len(files) == 2
    for file in files:
        alone, shared = lines(scored[0] / "eval" / "model" / "quick" / file.name), lines(file)
        assert [item["prompt"] for item in alone] == [item["prompt"] for item in shared]
        for item, other in zip(alone, shared, strict=True):
            numbers = {key: value for key, value in item.items() if isinstance(value, float)}
            assert numbers
            assert {key: other[key] for key in numbers} == pytest.approx(numbers, abs=1e-5)
    log = (tmp_path / "eval" / "model" / "worker.log").read_text()
    assert "Running generate_until requests: 100%|██████████| 1/1" in log  # half of the two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=knowlege"], "Unknown suite 'knowlege'. Did you mean 'knowledge'?"),
        (["suite=knowledge", "suite.data_dir=/nowhere"], "suite.data_dir=/nowhere is not a folder"),
        (["suite=quick"], "suite.allow_code=true"),
        (["suite=knowledge", "suite.only=[nq_opn]"], "Did you mean 'nq_open'?"),
        (["suite=pocket", "suite.limt=3"], "Did you mean 'suite.limit'?"),
        (["suite=pocket", "run=/nowhere"], "There is no run directory /nowhere."),
        (["suite=none"], "suite=none has nothing to score"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_fix(arguments, message, tmp_path):
    done = hft("eval", *arguments, cwd=tmp_path)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("train", "+method=hft"), ("eval",)])
def test_settings_of_a_benchmark_need_no_plus(command):
    done = hft(*command, "suite=knowledge", "suite.benchmarks.nq_open.limit=3", "--cfg", "job")
    assert done.status == 0, done.err
    assert yaml.safe_load(done.out)["suite"]["benchmarks"]["nq_open"]["limit"] == 3
