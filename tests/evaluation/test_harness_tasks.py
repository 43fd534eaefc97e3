"""Benchmarks from local files give the prompts, targets and scores that the harness gives with rows of the hub."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import BBH, GSM8K, HUMANEVAL, MMLU, NQ_OPEN, TRIVIAQA, TYDIQA, write

from hft_cli.errors import UserError
from hft_cli.evaluation.benchmarks import BENCHMARKS, benchmark_settings
from hft_cli.evaluation.compat import code_eval_replaced, harness_task_folder
from hft_cli.evaluation.harness_results import summarize
from hft_cli.evaluation.harness_tasks import Sources, build_tasks
from hft_cli.evaluation.sandbox import CodeEval
from hft_cli.launch.jobs import HarnessTask

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


# Benchmark -> the harness's task, the splits in the shape of the data set on the hub, and settings.
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
    """The harness would start pip for each evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def canned():
    """A language model with arbitrary but fixed likelihoods and answers, some of which are correct."""
    from lm_eval.api.model import LM

    class Canned(LM):
        def loglikelihood(self, requests):
            def likelihood(text: str) -> float:
                return -int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 2**22

            return [(likelihood(request.args[0][-50:] + request.args[1]), False) for request in requests]

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


def local_tasks(name: str, values: dict, data_dir: Path) -> dict[str, Any]:
    """The harness's tasks of a benchmark with these settings, from local files."""
    request = HarnessTask(name, asdict(benchmark_settings(name, values)), None, False, "")
    return build_tasks(request, Sources(data_dir)).tasks


@pytest.mark.parametrize("case", ON_THE_HUB)
def test_local_files_give_the_results_of_the_harness_own_task(case, data_dir, monkeypatch):
    import datasets
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager

    name, (task, rows, values) = case.split()[0], ON_THE_HUB[case]
    tasks = local_tasks(name, values, data_dir)
    assert list(tasks) == [task]
    local = evaluated(tasks.values(), None)

    def hub(path, name=None, **options):
        return datasets.DatasetDict({split: datasets.Dataset.from_list(own) for split, own in rows.items()})

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", hub)
    benchmark = BENCHMARKS[name]
    folder = harness_task_folder() / (benchmark.task_folder or benchmark.folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    with code_eval_replaced(CodeEval()):  # the stock task of HumanEval downloads it from the hub
        stock = evaluated(manager.load([task])["tasks"].values(), values.get("shots"))

    assert local["versions"] == stock["versions"]
    assert local["results"] == stock["results"]
    assert len(local["samples"][task]) == len(stock["samples"][task]) > 0
    for own, theirs in zip(local["samples"][task], stock["samples"][task], strict=True):
        for key in ("arguments", "target", "resps", "filtered_resps", "filter", "metrics", *own["metrics"]):
            assert own[key] == theirs[key]


def test_tasks_of_the_harness_that_run_programs_are_refused(monkeypatch):
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=harness_task_folder() / "mbpp", include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: manager)
    with pytest.raises(UserError, match="mbpp runs programs that the model writes, without limits"):
        build_tasks(HarnessTask("mbpp", None, None, False, ""), Sources())


def test_some_answers_of_the_canned_model_are_correct(data_dir):
    """Otherwise the comparison above would compare zeros only."""
    scores = {}
    for name in ("bbh", "humaneval", "hotpotqa"):
        values = {"shots": 0} if name == "hotpotqa" else {}
        samples = evaluated(local_tasks(name, values, data_dir).values(), None)["samples"]
        scores[name] = summarize(samples, benchmark_settings(name, values))["scores"]
    assert scores["bbh"]["exact_match,get-answer"] == 0.5
    assert scores["bbh"]["exact_match,get-answer_stderr"] == pytest.approx(0.5)
    assert scores["humaneval"]["pass@1,create_test"] == 0.0
    assert scores["hotpotqa"]["items"] == 8


def test_hotpotqa_is_closed_book_and_ignores_case_and_articles(data_dir):
    (task,) = local_tasks("hotpotqa", {"shots": 2}, data_dir).values()
    task.set_fewshot_seed(1234)
    assert len(task.eval_docs) == 5  # the last three rows are the few-shot examples
    prompt = task.fewshot_context(task.eval_docs[0], 2)
    assert prompt.count("Question: ") == 3
    assert prompt.endswith("Question: In which state is city 0?\nAnswer:")
    assert "State 0" not in prompt
    for answer, score in (("the state 0 D.C", 1.0), ("State 1, D.C.", 0.0)):
        assert task.process_results(task.eval_docs[0], [answer])["exact_match"] == score


def test_an_unknown_metric_is_refused_before_anything_is_scored(data_dir):
    with pytest.raises(UserError, match=r"Did you mean 'exact_match,flexible-extract'\?"):
        local_tasks("gsm8k", {"metric": "exact_match,flexible"}, data_dir)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mmlu", "mmlu_anatomy"),
        ("mmlu", "mmlu_anat*"),
        ("bbh", "bbh_cot_fewshot_boolean_expressions"),
        ("bbh", "*_bool*"),
    ],
)
def test_one_part_of_a_benchmark_has_its_local_rows(name, task, data_dir):
    tasks = local_tasks(name, {"task": task, "shots": 1}, data_dir)
    assert all(list(each.test_docs()) for each in tasks.values())


def test_a_part_without_a_file_is_named(data_dir):
    with pytest.raises(UserError, match=r"mmlu: the files .* have no rows of mmlu_virology\. They have: anatomy"):
        local_tasks("mmlu", {"task": "mmlu_virology"}, data_dir)


def test_too_few_rows_for_the_examples_are_a_mistake(data_dir):
    with pytest.raises(UserError, match=r"has fewer than the 8 examples that gsm8k draws from.*shots=0"):
        local_tasks("gsm8k", {"task": "gsm8k", "shots": 8}, data_dir)
    with pytest.raises(UserError, match=r"nq_open: .* too few rows .*shots=0"):
        local_tasks("nq_open", {"shots": 8}, data_dir)


def test_programs_of_the_model_are_run_by_the_given_function(data_dir):
    programs = []

    def run(program: str, test: str) -> str:
        programs.append(program)
        return "passed"

    for values in ({}, {"pass_at": [1]}):
        settings = asdict(benchmark_settings("humaneval", values))
        tasks = build_tasks(HarnessTask("humaneval", settings, None, False, ""), Sources(data_dir, run=run)).tasks
        programs.clear()
        assert evaluated(tasks.values(), None)["results"]["humaneval"]["pass@1,create_test"] == 1.0
        assert len(programs) == 1
        assert programs[0].startswith("def twice(x):")
