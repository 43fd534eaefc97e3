"""hft eval: benchmarks from local files scored by command, kept results, mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import hft
from eval_files import write

from hft_cli.benchmarks import parts, settings, splits
from hft_cli.schema import PACKAGE, EvalConfig, ModelConfig, RunConfig, SuiteConfig, UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------------------------ whole commands


ONE_RANK = (
    "eval", "suite=quick", "suite.only=[nq_open,hotpotqa,truthfulqa_mc2,mmlu,humaneval]", "suite.limit=2",
    "suite.allow_code=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(data_dir, tmp_path_factory) -> tuple[Path, str]:
    """Where some benchmarks were scored, and what the command printed."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    out = tmp_path_factory.mktemp("scored")
    done = hft(*ONE_RANK, f"suite.data_dir={data_dir}", f"output_dir={out}")
    assert done.status == 0, done.err
    return out, done.out


def test_a_suite_is_scored_from_files_with_errors_versions_and_items(scored):
    folder = scored[0] / "eval" / "quick"
    one = json.loads((folder / "results.json").read_text())["models"]["model"]
    scores, details = one["eval"]["quick"], one["details"]
    assert set(scores) == {"nq_open", "hotpotqa", "truthfulqa_mc2", "mmlu", "humaneval"}
    assert list(scores["mmlu"])[:2] == ["acc", "acc_stderr"]
    assert scores["nq_open"]["items"] == 2
    assert 0 < scores["truthfulqa_mc2"]["acc"] < 1
    assert len(details["mmlu"]["tasks_without_rows"]) == 56
    assert details["nq_open"]["versions"] == {"nq_open": 4.0}
    assert details["nq_open"]["limit"] == 2
    items = [json.loads(line) for line in (folder / "model" / details["nq_open"]["items"]).read_text().splitlines()]
    assert [item["item"] for item in items] == [0, 1]
    assert items[0]["target"] == ["the 0", "0"]
    assert "<|assistant|>" in items[0]["prompt"]  # through the embedded model's chat template


def test_what_is_kept_is_not_scored_again_and_other_results_stay(scored, data_dir):
    out, said = scored
    folder = out / "eval" / "quick"
    kept = {path: path.stat().st_mtime_ns for path in (folder / "model").glob("*.json*")}
    results = json.loads((folder / "results.json").read_text())
    for more in ((), ("suite.only=[nq_open]", "suite.batch_size=3")):
        again = hft(*ONE_RANK, *more, f"suite.data_dir={data_dir}", f"output_dir={out}")
        assert again.status == 0, again.err
        assert "Scoring" not in again.err
        assert again.out == said
        assert json.loads((folder / "results.json").read_text()) == results
    assert {path: path.stat().st_mtime_ns for path in (folder / "model").glob("*.json*")} == kept


def test_two_ranks_score_what_one_does(scored, data_dir, tmp_path):
    done = hft(
        *ONE_RANK, "suite.only=[nq_open,truthfulqa_mc2]", "engine.num_processes=2", f"suite.data_dir={data_dir}",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert done.status == 0, done.err
    files = sorted((tmp_path / "eval" / "quick" / "model").glob("*.jsonl"))
    assert len(files) == 2
    for file in files:
        one = scored[0] / "eval" / "quick" / "model" / file.name
        items = [[json.loads(line) for line in path.read_text().splitlines()] for path in (one, file)]
        assert len(items[0]) == len(items[1]) > 0
        for alone, shared in zip(*items, strict=True):
            assert (alone["prompt"], alone["item"]) == (shared["prompt"], shared["item"])
            assert alone["metrics"] == pytest.approx(shared["metrics"], abs=1e-5)


def test_a_run_is_scored_below_itself_before_and_after(tmp_path):
    config = RunConfig(output_dir=str(tmp_path), model=ModelConfig(name="pocket", path="pocket:model"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (tmp_path / "DONE").touch()
    shutil.copytree(PACKAGE / "pocket" / "model", tmp_path / "model")
    done = hft("eval", f"run={tmp_path}", "models=[before,after]")
    assert done.status == 0, done.err
    models = json.loads((tmp_path / "eval" / "pocket" / "results.json").read_text())["models"]
    assert [models[when]["eval"]["pocket"]["facts"]["exact_match"] for when in ("before", "after")] == [1.0, 1.0]
    assert models["after"]["path"] == str(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_a_mistake_is_one_line_that_says_how_to_mend_it(arguments, said, tmp_path):
    done = hft("eval", *arguments, cwd=tmp_path)
    assert done.status == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_training_refuses_a_suite_that_only_eval_scores(tmp_path):
    done = hft("train", "+method=hft", "suite=knowledge", cwd=tmp_path)
    assert done.status == 2
    assert "hft eval run=RUN suite=knowledge" in done.err


def test_without_the_harness_the_mistake_says_what_to_install(monkeypatch):
    from hft_cli import scoring

    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    config = EvalConfig(output_dir="x", suite=SuiteConfig(name="knowledge", benchmarks={"nq_open": {}}))
    config.engine.name, config.model.name, config.model.path = "single", "m", "pocket:model"
    with pytest.raises(UserError, match=r"pip install 'hft-cli\[eval\]'"):
        scoring._check(config)


def test_settings_of_a_benchmark_are_checked():
    for values, said in (
        ({"shotts": 3}, "Did you mean 'suite.benchmarks.nq_open.shots'"),
        ({"shots": -1}, "at least 0"),
        ({"samples": 3, "temperature": 1.0}, "are for humaneval"),
    ):
        with pytest.raises(UserError, match=said):
            settings("nq_open", values)
    with pytest.raises(UserError, match="Did you mean 'nq_open'"):
        settings("nq_opn", {})
    with pytest.raises(UserError, match="all the same"):
        settings("humaneval", {"samples": 3})


def test_files_are_looked_for_and_read_before_anything_runs(tmp_path, data_dir):
    with pytest.raises(UserError, match="has no folder nq_open"):
        parts("nq_open", tmp_path)
    (tmp_path / "nq_open").mkdir()
    with pytest.raises(UserError, match=r"NQ-open.dev.jsonl or validation.jsonl"):
        parts("nq_open", tmp_path)
    (tmp_path / "nq_open" / "validation.jsonl").write_text('{"question": "who"}\n')
    with pytest.raises(UserError, match="does not have the shape of nq_open"):
        splits("nq_open", "", tmp_path, 0)
    assert parts("mmlu", data_dir) == ("anatomy",)
    rows = splits("hotpotqa", "", data_dir, 3)
    assert [len(rows[split]) for split in ("validation", "train")] == [5, 3]
