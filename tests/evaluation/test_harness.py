"""Benchmarks from local files are what the harness would have from the hub: prompts, targets and scores."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmark_files import BBH, GSM8K, HUMANEVAL, MMLU, NQ_OPEN, TRIVIAQA, TYDIQA, write

from hft_cli.config.schema import ModelConfig
from hft_cli.errors import UserError
from hft_cli.evaluation.benchmarks import BENCHMARKS, settings

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


# What the hub's data sets hold: benchmark -> the harness's task and the splits, written by hand from the hub's shapes.
_MMLU_ROWS = [
    {"question": question, "subject": "anatomy", "choices": choices, "answer": "ABCD".index(answer)}
    for question, *choices, answer in MMLU
]
_TRUTHFULQA_ROWS = [
    {
        "question": "What grows from a pebble?",
        "mc1_targets": {
            "choices": ["Nothing grows from a pebble", "A tree", "A mountain, in time"],
            "labels": [1, 0, 0],
        },
        "mc2_targets": {
            "choices": ["Nothing grows from a pebble", "Pebbles do not grow", "A tree", "A mountain, in time"],
            "labels": [1, 1, 0, 0],
        },
    }
]
ON_THE_HUB = {
    "mmlu": ("mmlu_anatomy", {"test": _MMLU_ROWS, "dev": _MMLU_ROWS}, {"shots": 2}),
    "gsm8k": ("gsm8k_cot", {"test": GSM8K[:2], "train": GSM8K[2:]}, {"shots": 8}),
    "gsm8k drawn": ("gsm8k", {"test": GSM8K[:2], "train": GSM8K[2:]}, {"shots": 3, "task": "gsm8k"}),
    "truthfulqa_mc1": ("truthfulqa_mc1", {"validation": _TRUTHFULQA_ROWS}, {}),
    "truthfulqa_mc2": ("truthfulqa_mc2", {"validation": _TRUTHFULQA_ROWS}, {}),
    "nq_open": ("nq_open", {"validation": NQ_OPEN[:2], "train": NQ_OPEN[2:]}, {"shots": 5}),
    "triviaqa": ("triviaqa", {"validation": TRIVIAQA[:2], "train": TRIVIAQA[2:]}, {"shots": 5}),
    "bbh": ("bbh_cot_fewshot_boolean_expressions", {"test": BBH}, {"shots": 3}),
    "tydiqa": ("tydiqa_goldp_fi", {"validation": TYDIQA[:2], "train": TYDIQA[2:]}, {"shots": 1}),
    "humaneval": ("humaneval", {"test": HUMANEVAL}, {}),
}
ANSWERS = ("so the answer is False.", "The answer is 4. #### 4", "the 0", "A", "0 taloa", "    return x + x\n", "h")


@pytest.fixture(autouse=True)
def _no_list_of_packages(monkeypatch):
    """The harness asks pip for one at each evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def canned():
    """A language model that likes some texts more than others for no reason, and is right at times."""
    from lm_eval.api.model import LM

    class Canned(LM):
        def loglikelihood(self, requests):
            def luck(text: str) -> float:
                return -int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 2**22

            return [(luck(request.args[0][-50:] + request.args[1]), False) for request in requests]

        def generate_until(self, requests):
            return [ANSWERS[number % len(ANSWERS)] for number, _ in enumerate(requests)]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    return Canned()


def evaluated(tasks, shots: int | None):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=canned(),
        tasks=list(tasks),
        num_fewshot=shots,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        task_manager=TaskManager(include_defaults=False),
    )


@pytest.mark.parametrize("case", ON_THE_HUB)
def test_local_files_give_the_prompts_targets_and_scores_of_the_harness_own_task(case, data_dir, monkeypatch):
    import datasets
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager

    from hft_cli.evaluation.harness_tasks import _own_code_runner, build_tasks, harness_tasks
    from hft_cli.launch.jobs import HarnessJob, HarnessTask

    name, (task, rows, asked) = case.split()[0], ON_THE_HUB[case]
    config = settings(name, asked)
    todo = HarnessTask(name, asdict(config), None, False, "")
    ours, _ = build_tasks(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))
    assert list(ours) == [task]
    local = evaluated(ours.values(), None)

    def hub(path, name=None, **options):
        return datasets.DatasetDict({split: datasets.Dataset.from_list(own) for split, own in rows.items()})

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", hub)
    manager = TaskManager(include_path=harness_tasks() / BENCHMARKS[name].place, include_defaults=False)
    with _own_code_runner() if name == "humaneval" else nullcontext():  # the stock task fetches it from the hub
        stock = evaluated(manager.load([task])["tasks"].values(), config.shots)

    assert local["versions"] == stock["versions"]
    assert local["results"] == stock["results"]
    assert len(local["samples"][task]) == len(stock["samples"][task]) > 0
    for own, theirs in zip(local["samples"][task], stock["samples"][task], strict=True):
        for key in ("arguments", "target", "resps", "filtered_resps", "filter", "metrics", *own["metrics"]):
            assert own[key] == theirs[key]


def test_what_the_canned_model_says_is_sometimes_right_so_that_the_comparison_means_something(data_dir):
    from hft_cli.evaluation.harness_tasks import build_tasks
    from hft_cli.evaluation.harness_worker import _measured
    from hft_cli.launch.jobs import HarnessJob, HarnessTask

    found = {}
    for name in ("bbh", "humaneval", "hotpotqa"):
        config = settings(name, {"shots": 0} if name == "hotpotqa" else {})
        todo = HarnessTask(name, asdict(config), None, False, "")
        tasks, _ = build_tasks(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))
        found[name] = _measured(evaluated(tasks.values(), None)["samples"], config)["scores"]
    assert found["bbh"]["exact_match,get-answer"] == 0.5
    assert found["bbh"]["exact_match,get-answer_stderr"] == pytest.approx(0.5)
    assert found["humaneval"]["pass@1,create_test"] == 0.0
    assert found["hotpotqa"]["items"] == 8


def test_hotpotqa_is_asked_closed_book_and_scored_without_case_articles_and_punctuation(data_dir):
    from hft_cli.evaluation.harness_tasks import build_tasks
    from hft_cli.launch.jobs import HarnessJob, HarnessTask

    todo = HarnessTask("hotpotqa", asdict(settings("hotpotqa", {"shots": 2})), None, False, "")
    (task,) = build_tasks(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))[0].values()
    task.set_fewshot_seed(1234)
    assert len(task.eval_docs) == 5  # the last three are there to be examples
    prompt = task.fewshot_context(task.eval_docs[0], 2)
    assert prompt.count("Question: ") == 3
    assert prompt.endswith("Question: In which state is city 0?\nAnswer:")
    assert "State 0" not in prompt
    for answer, right in (("the state 0 D.C", 1.0), ("State 1, D.C.", 0.0)):
        assert task.process_results(task.eval_docs[0], [answer])["exact_match"] == right


def test_a_metric_that_the_task_does_not_have_is_refused_before_anything_is_scored(data_dir):
    from hft_cli.evaluation.harness_tasks import build_tasks
    from hft_cli.launch.jobs import HarnessJob, HarnessTask

    todo = HarnessTask("gsm8k", asdict(settings("gsm8k", {"metric": "exact_match,flexible"})), None, False, "")
    with pytest.raises(UserError, match=r"Did you mean 'exact_match,flexible-extract'\?"):
        build_tasks(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))


def test_figures_of_a_task_that_goes_by_the_harness_name_keep_each_filter_s_error_beside_it():
    from hft_cli.evaluation.harness_worker import _as_reported

    figures = {
        "name": "t", "alias": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1,
        "exact_match,strict": 0.2, "exact_match_stderr,strict": 0.3, "bleu_stderr,none": "N/A",
    }  # fmt: skip
    measured = _as_reported({"results": {"t": figures}, "n-samples": {"t": {"effective": 4}}}, {"t": None})
    assert list(measured["scores"].items()) == [
        ("acc", 0.5), ("acc_stderr", 0.1), ("exact_match,strict", 0.2), ("exact_match,strict_stderr", 0.3),
        ("items", 4),
    ]  # fmt: skip
