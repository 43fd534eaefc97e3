"""Suites scored by hft eval and by hft train: benchmarks from local files, kept results, ranks, mistakes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from benchmark_files import write
from helpers import environment, hft

from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.config.schema import EvalConfig, ModelConfig, RunConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.errors import UserError
from hft_cli.evaluation import scorer, suite
from hft_cli.evaluation.benchmarks import parts, settings, splits
from hft_cli.evaluation.scorer import ScoredModel, score, scores_of
from hft_cli.evaluation.suite import read_suite
from hft_cli.launch import work
from hft_cli.launch.jobs import WORKERS, kind_of, write_job
from hft_cli.launch.worker import WorkerRun
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir
from hft_cli.runner.evaluation import run_eval
from hft_cli.runner.training import run

pytestmark = pytest.mark.xdist_group("eval")  # on one worker: they share what was scored


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


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_suite_is_scored_from_files_with_errors_versions_and_items(scored):
    folder = scored[0] / "eval"
    one = json.loads((folder / "quick.json").read_text())["models"]["model"]
    scores, details = one["eval"]["quick"], one["details"]
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


def test_each_item_has_its_score_under_the_name_of_the_benchmark_s_metric(scored):
    folder = scored[0] / "eval"
    one = json.loads((folder / "quick.json").read_text())["models"]["model"]
    for name, scores in one["eval"]["quick"].items():
        metric, mean = next(iter(scores.items()))
        values = [item[metric] for item in lines(folder / one["details"][name]["items"])]
        assert sum(values) / len(values) == pytest.approx(mean)


def test_what_is_kept_is_not_scored_again_and_other_results_stay(scored, data_dir):
    out, said = scored
    files = {path: path.stat().st_mtime_ns for path in (out / "eval" / "model" / "quick").iterdir()}
    results = json.loads((out / "eval" / "quick.json").read_text())
    one_of_them = ("suite.only=[nq_open]", "suite.batch_size=3")
    again = hft(*ONE_RANK, *one_of_them, f"suite.data_dir={data_dir}", f"output_dir={out}")
    assert again.status == 0, again.err
    assert "Scoring" not in again.err
    assert again.out == said
    assert json.loads((out / "eval" / "quick.json").read_text()) == results
    assert {path: path.stat().st_mtime_ns for path in (out / "eval" / "model" / "quick").iterdir()} == files


def test_two_ranks_score_what_one_does(scored, data_dir, tmp_path):
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
        numbers = [{key: value for key, value in item.items() if isinstance(value, float)} for item in alone]
        assert all(numbers)
        assert [{key: item[key] for key in own} for own, item in zip(numbers, shared, strict=True)] == [
            pytest.approx(own, abs=1e-5) for own in numbers
        ]
    log = (tmp_path / "eval" / "model" / "worker.log").read_text()
    assert "Running generate_until requests: 100%|██████████| 1/1" in log  # half of the two


def test_the_requests_of_a_model_are_shared_out_and_put_together_in_order(monkeypatch):
    import torch

    from hft_cli.evaluation.harness_worker import _shared

    heard = {}

    def gather(gathered: list, own: list) -> None:
        gathered[:] = [heard[0], own] if own == heard[1] else [own, heard[1]]

    def answer(requests: list[int]) -> list[int]:
        return [10 * request for request in requests]

    heard = {rank: answer([1, 2, 3][rank::2]) for rank in (0, 1)}
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert [_shared(answer, rank, 2)([1, 2, 3]) for rank in (0, 1)] == [[10, 20, 30]] * 2


# ----------------------------------------------------------------------------------------------------- runs, in process


@pytest.fixture
def here(monkeypatch, tmp_path_factory) -> list[str]:
    """Scoring workers run in this process, which saves their start; training workers do not. Returns what was run."""
    started = []

    def in_this_process(run: WorkerRun, poll=None) -> None:
        kind = kind_of(run.job)
        file = run.folder.folder / WORKERS[kind].file
        started.append(f"{run.folder.folder.name}/{file.stem}")
        write_job(run.job, file)
        assert work.main([kind, str(file)]) == 0, run.folder.mistake.read_text()

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # other tests' scores are in CACHE
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(scorer, "run_worker", in_this_process)
    return started


def config(out: Path, data_dir: Path, **more) -> RunConfig:
    """A run of a few steps whose suite has a benchmark, a probe and a set of rows."""
    run = RunConfig(output_dir=str(out), **more)
    run.model = ModelConfig(name="pocket", path="pocket:model")
    run.data.name, run.data.path = "order", "pocket:skills/order/train.jsonl"
    run.method.name, run.engine.name = "hft", "single"
    run.train.batch_size = run.train.micro_batch_size = 4
    run.train.max_steps, run.train.max_length = 2, 64
    run.suite = SuiteConfig(
        name="mixed",
        data_dir=str(data_dir),
        limit=2,
        benchmarks={"nq_open": {"shots": 2, "max_new_tokens": 8, "metric": "exact_match,remove_whitespace"}},
        probe={"facts": {"facts": "pocket:facts.jsonl"}},
        tasks={"facts": "pocket:facts.jsonl"},
    )
    return run


def test_a_run_scores_benchmarks_and_probes_before_and_after_and_its_start_once_for_all_runs(here, data_dir, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    ran = run(config(tmp_path / "a", data_dir), [])
    assert here == [f"{when}/{job}" for when in ("before", "after") for job in ("job", "harness", "probe")]
    scores = json.loads(ran.results.read_text())["eval"]
    for when in ("before", "after"):
        assert scores[when].keys() == {"mixed"}
        own = {name: next(iter(values)) for name, values in scores[when]["mixed"].items()}
        assert own == {
            "facts": "exact_match", "nq_open": "exact_match,remove_whitespace", "facts_ranking": "accuracy",
        }  # fmt: skip
        for name, metric in own.items():
            items = lines(ran.folder / "eval" / when / "mixed" / f"{name}.jsonl")
            assert len(items) == scores[when]["mixed"][name]["items"]
            assert len({item["row"] for item in items}) == len(items)
            assert all(0 <= item[metric] <= 1 for item in items)
    assert scores["before"]["mixed"]["facts"]["exact_match"] > 0.98
    assert scores["before"]["mixed"]["facts_ranking"]["accuracy"] > 0.8

    # Cut off before its end and continued, it scores nothing twice.
    here.clear()
    ran.done.unlink()
    run(config(tmp_path / "a", data_dir), [])
    assert here == []

    # What another run, or hft eval, starts from is known, whatever the seed of training is.
    other = config(tmp_path / "b", data_dir, seed=7)
    base = model_folder(resolve_path("pocket:model"))
    started, suite = ScoredModel(base, other.model, weights_hash(base), shared=True), read_suite(other.suite)
    assert scores_of(score(suite, started, RoundDir(tmp_path / "b"), seed=7)) == scores["before"]
    asked = EvalConfig(run=str(ran.folder), models=["before"], output_dir="", suite=other.suite)
    asked.model, asked.engine = other.model, other.engine
    file = run_eval(asked)
    assert json.loads(file.read_text())["models"]["before"]["eval"] == scores["before"]
    assert here == []


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


@pytest.mark.parametrize("command", [("train", "+method=hft"), ("eval",)])
def test_any_setting_of_a_benchmark_can_be_typed_without_a_plus(command):
    done = hft(*command, "suite=knowledge", "suite.benchmarks.nq_open.limit=3", "--cfg", "job")
    assert done.status == 0, done.err
    assert yaml.safe_load(done.out)["suite"]["benchmarks"]["nq_open"]["limit"] == 3


def test_training_refuses_what_eval_would_before_anything_is_written(tmp_path, data_dir):
    for change, said in (
        ({"data_dir": "/nowhere"}, "suite.data_dir=/nowhere is not a folder"),
        ({"benchmarks": {"humaneval": {}}}, "suite.allow_code=true"),
        ({"chat": "maybe"}, "Unknown suite.chat 'maybe'"),
        ({"only": ["nq_opn"]}, "Did you mean 'nq_open'?"),
    ):
        asked = config(tmp_path / "run", data_dir)
        asked.suite = replace(asked.suite, **change)
        with pytest.raises(UserError, match=re.escape(said)):
            run(asked, [])
        assert list(tmp_path.iterdir()) == []
    unsaved = config(tmp_path / "run", data_dir)
    unsaved.method.name, unsaved.method.save_model, unsaved.model.base = "half_reset", False, "pocket:model"
    with pytest.raises(UserError, match=r"method\.save_model=false leaves no model"):
        run(unsaved, [])


def test_a_start_whose_weights_changed_is_not_scored_as_a_run_s_start(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config(tmp_path, tmp_path))))
    (tmp_path / "plan.json").write_text('{"base": "/nowhere", "base_sha256": "0"}')
    (tmp_path / "DONE").touch()
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    asked = EvalConfig(run=str(tmp_path), output_dir="", models=["before"], suite=suite)
    asked.model, asked.engine.name = ModelConfig(name="m", path="m"), "single"
    with pytest.raises(UserError, match="does not exist any more"):
        run_eval(asked)


def test_without_the_harness_the_mistake_says_what_to_install(monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hft-cli\[eval\]'"):
        read_suite(SuiteConfig(name="knowledge", benchmarks={"nq_open": {}}))


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
