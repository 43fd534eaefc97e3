"""hft eval: benchmarks from local files as the harness would have them from the hub, kept results, mistakes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import hft

from hft_cli.benchmarks import BENCHMARKS, parts, settings, splits
from hft_cli.schema import PACKAGE, EvalConfig, ModelConfig, RunConfig, SuiteConfig, UserError

GSM8K = [
    {
        "question": f"Ann has {n} pens and buys {n}. How many has she?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(2, 10)
]
MMLU = [
    ("Which is a bone?", "femur", "liver", "skin, hair", 'the "lung"', "A"),
    ("How many hearts?\n", "0", "1", "2", "3", "B"),
]
TRUTHFULQA = [
    {
        "Type": "Adversarial",
        "Category": "Plants",
        "Question": "What grows from a pebble?",
        "Best Answer": "Nothing grows from a pebble",
        "Correct Answers": "Nothing grows from a pebble; Pebbles do not grow",
        "Incorrect Answers": "A tree; A mountain, in time",
        "Source": "nowhere",
    }
]
NQ_OPEN = [{"question": f"what is number {n}", "answer": [f"the {n}", str(n)]} for n in range(8)]
TRIVIAQA = [
    {"question": f"Which letter is number {n}", "answer": {"value": c, "aliases": [c, c.lower()]}}
    for n, c in enumerate("ABCDEFGH")
]
HOTPOTQA = [
    {"question": f"In which state is city {n}?", "answer": f"State {n}, D.C.", "type": "bridge"} for n in range(8)
]
BBH = [{"input": "not ( True ) and ( True ) is", "target": "False"}, {"input": "True or False is", "target": "True"}]
TYDIQA = [
    {
        "id": f"finnish-{n}",
        "title": "Kaupunki",
        "context": f"Kaupungissa on {n} taloa.",
        "question": "Montako taloa?",
        "answers": {"text": [f"{n} taloa"], "answer_start": [14]},
    }
    for n in range(4)
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def twice(x):\n",
        "entry_point": "twice",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Hand-made rows in the files' shapes."""
    root = tmp_path_factory.mktemp("data")

    def lines(place: str, rows: list[dict]) -> None:
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("gsm8k/test.jsonl", GSM8K[:2])
    lines("gsm8k/train.jsonl", GSM8K[2:])
    lines("nq_open/NQ-open.dev.jsonl", NQ_OPEN[:2])
    lines("nq_open/NQ-open.train.jsonl", NQ_OPEN[2:])
    lines("triviaqa/validation.jsonl", TRIVIAQA[:2])
    lines("triviaqa/train.jsonl", TRIVIAQA[2:])
    lines("tydiqa/validation.jsonl", TYDIQA[:2])
    lines("tydiqa/train.jsonl", TYDIQA[2:])
    for place, value in (
        ("hotpotqa/hotpot_dev_v1_simplified.json", HOTPOTQA),
        ("bbh/bbh/boolean_expressions.json", {"canary": "", "examples": BBH}),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(json.dumps(value))
    for split in ("test", "dev"):
        (root / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        with (root / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(MMLU)
    (root / "truthfulqa").mkdir()
    with (root / "truthfulqa" / "TruthfulQA.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(TRUTHFULQA[0]))
        writer.writeheader()
        writer.writerows(TRUTHFULQA)
    (root / "humaneval").mkdir()
    with gzip.open(root / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in HUMANEVAL)
    return root


# --------------------------------------------------------------------------------- as the harness has it from the hub

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
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import datasets
    import lm_eval.api.task
    from lm_eval.tasks import TaskManager

    from hft_cli.harness import HarnessJob, Todo, _own_code_runner, _tasks, build

    name, (task, rows, asked) = case.split()[0], ON_THE_HUB[case]
    config = settings(name, asked)
    todo = Todo(name, asdict(config), None, False, "")
    ours, _ = build(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))
    assert list(ours) == [task]
    local = evaluated(ours.values(), None)

    def hub(path, name=None, **options):
        return datasets.DatasetDict({split: datasets.Dataset.from_list(own) for split, own in rows.items()})

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", hub)
    manager = TaskManager(include_path=_tasks() / BENCHMARKS[name].place, include_defaults=False)
    with _own_code_runner():  # the stock task fetches its runner from the hub
        stock = evaluated(manager.load([task])["tasks"].values(), config.shots)

    assert local["versions"] == stock["versions"]
    assert local["results"] == stock["results"]
    assert len(local["samples"][task]) == len(stock["samples"][task]) > 0
    for own, theirs in zip(local["samples"][task], stock["samples"][task], strict=True):
        for key in ("arguments", "target", "resps", "filtered_resps", "filter", "metrics", *own["metrics"]):
            assert own[key] == theirs[key]


def test_what_the_canned_model_says_is_sometimes_right_so_that_the_comparison_means_something(data_dir):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from hft_cli.harness import HarnessJob, Todo, _items, _measured, build

    found = {}
    for name in ("bbh", "humaneval", "hotpotqa"):
        config = settings(name, {"shots": 0} if name == "hotpotqa" else {})
        todo = Todo(name, asdict(config), None, False, "")
        tasks, _ = build(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))
        found[name] = _measured(list(_items(evaluated(tasks.values(), None)["samples"])), config)["scores"]
    assert found["bbh"]["exact_match,get-answer"] == 0.5
    assert found["bbh"]["exact_match,get-answer_stderr"] == pytest.approx(0.5)
    assert found["humaneval"]["pass@1,create_test"] == 0.0
    assert found["hotpotqa"]["items"] == 8


def test_hotpotqa_is_asked_closed_book_and_scored_without_case_articles_and_punctuation(data_dir):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from hft_cli.harness import HarnessJob, Todo, build

    todo = Todo("hotpotqa", asdict(settings("hotpotqa", {"shots": 2})), None, False, "")
    (task,) = build(todo, HarnessJob(ModelConfig(), "", (todo,), str(data_dir), 1, 42))[0].values()
    task.set_fewshot_seed(1234)
    assert len(task.eval_docs) == 5  # the last three are there to be examples
    prompt = task.fewshot_context(task.eval_docs[0], 2)
    assert prompt.count("Question: ") == 3
    assert prompt.endswith("Question: In which state is city 0?\nAnswer:")
    assert "State 0" not in prompt
    for answer, right in (("the state 0 D.C", 1.0), ("State 1, D.C.", 0.0)):
        assert task.process_results(task.eval_docs[0], [answer])["exact_match"] == right


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
