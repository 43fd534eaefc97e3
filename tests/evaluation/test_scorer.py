"""Models scored on suites by hft train and hft eval, with the scoring workers in this process."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import write
from helpers import environment

from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.config.schema import EngineConfig, EvalConfig, ModelConfig, RunConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.errors import UserError
from hft_cli.evaluation import scorer
from hft_cli.evaluation.scorer import HeldOutSets, ScoredModel, score, scores_of
from hft_cli.evaluation.suite import read_suite
from hft_cli.launch import work
from hft_cli.launch.jobs import RowsTask, write_job
from hft_cli.launch.worker import WorkerRun
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir
from hft_cli.runner.evaluation import run_eval, table
from hft_cli.runner.training import run


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def here(monkeypatch, tmp_path_factory) -> list[str]:
    """Run scoring workers in this process, which is faster; the list of those that were run."""
    started = []

    def in_this_process(run: WorkerRun, poll=None) -> None:
        file = write_job(run.job, run.folder.folder)
        started.append(f"{run.folder.folder.name}/{file.stem}")
        assert work.main([type(run.job).__name__, str(file)]) == 0, run.folder.mistake.read_text()

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # without the scores of other tests
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(scorer, "run_worker", in_this_process)
    return started


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_a_run_scores_its_suite_before_and_after_and_shares_it(here, data_dir, tmp_path):
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

    # A continued run skips finished tasks.
    here.clear()
    ran.done.unlink()
    run(config(tmp_path / "a", data_dir), [])
    assert here == []

    # Another run and hft eval take the scores of the initial model from the cache, whatever the training seed is.
    other = config(tmp_path / "b", data_dir, seed=7)
    base = model_folder(resolve_path("pocket:model"))
    started, suite = ScoredModel(base, other.model, weights_hash(base), shared=True), read_suite(other.suite)
    assert scores_of(score(suite, started, RoundDir(tmp_path / "b"), HeldOutSets(seed=7))) == scores["before"]
    asked = EvalConfig(run=str(ran.folder), models=["before"], output_dir="", suite=other.suite)
    asked.model, asked.engine = other.model, other.engine
    file = run_eval(asked)
    assert json.loads(file.read_text())["models"]["before"]["eval"] == scores["before"]
    assert here == []


def test_a_model_that_is_scored_again_tells_the_noise(here, tmp_path):
    """Exact match repeats; one item of the first scores is changed by hand."""
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    asked = EvalConfig(output_dir=str(tmp_path), again=True, suite=suite)
    asked.model, asked.engine = ModelConfig(name="pocket", path="pocket:model"), EngineConfig(name="single")
    file = run_eval(asked)
    assert here == ["model/job", "model.again/job"]
    record = json.loads(file.read_text())["models"]["model"]
    score, items = (record["eval"]["pocket"]["facts"][key] for key in ("exact_match", "items"))
    assert record["again"] == {"facts": {"score": score, "noise": 0.0, "changed": 0, "items": items}}
    assert not (tmp_path / "eval" / "model.again").exists()
    assert f"facts scored again: {100 * score:.1f}; 0 of {items} items differ (noise ±0.0 points)" in table(file)

    first = tmp_path / "eval" / record["details"]["facts"]["items"]
    rows = lines(first)
    rows[0]["exact_match"] = 1 - rows[0]["exact_match"]
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = json.loads(run_eval(asked).read_text())["models"]["model"]["again"]["facts"]
    assert (again["changed"], again["noise"]) == (1, pytest.approx(1.96 / items))
    # Without `again`, the noise stays as long as the task is not scored in another way.
    once = replace(asked, again=False)
    assert json.loads(run_eval(once).read_text())["models"]["model"]["again"] == {"facts": again}
    once.model = replace(once.model, dtype="bfloat16")
    assert json.loads(run_eval(once).read_text())["models"]["model"]["again"] == {}


def test_the_identity_of_a_model_depends_on_weights_and_use(tmp_path):
    base = Path(resolve_path("pocket:model"))
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    template = copy / "chat_template.jinja"
    template.write_text("other")
    models = [
        ScoredModel(base, ModelConfig(name="a"), "hash"),
        ScoredModel(base, ModelConfig(name="a"), "other hash"),
        ScoredModel(base, ModelConfig(name="a", dtype="bfloat16"), "hash"),
        ScoredModel(base, ModelConfig(name="a", chat_template=str(template)), "hash"),
        ScoredModel(copy, ModelConfig(name="a"), "hash"),
    ]
    identities = [json.dumps(scorer.model_identity(model)) for model in models]
    assert len(set(identities)) == len(models)
    assert json.dumps(scorer.model_identity(ScoredModel(base, ModelConfig(name="b"), "hash"))) == identities[0]


def test_training_refuses_a_bad_suite_before_it_writes_anything(tmp_path, data_dir):
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


@pytest.mark.parametrize(("gpus", "ranks"), [([], None), ([80e9] * 8, 8)])
def test_sets_of_rows_are_shared_among_gpus(gpus, ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(scorer, "gpus", lambda: gpus)
    runs = []
    monkeypatch.setattr(scorer, "run_worker", lambda run, poll: runs.append(run))
    model = ScoredModel(model_folder(resolve_path("pocket:model")), ModelConfig(name="a"), "hash")
    tests = HeldOutSets({"a": RowsTask(resolve_path("pocket:skills/order/test.jsonl"))})
    score(read_suite(SuiteConfig()), model, RoundDir(tmp_path), tests, workers=scorer.WorkerOptions(8))
    assert [run.ranks for run in runs] == [ranks]
