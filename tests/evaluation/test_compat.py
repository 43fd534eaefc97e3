"""What the package relies on in lm-evaluation-harness and transformers, beyond their documentation."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import environment

from hft_cli.evaluation import compat
from hft_cli.launch.ranks import Ranks
from hft_cli.paths import resolve_path

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

MODEL = resolve_path("pocket:model")


def manager_of(folder: str):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=compat.harness_task_folder() / folder, include_defaults=False)


def test_the_settings_of_a_task_file_are_in_the_index():
    settings = compat.task_file_settings(manager_of("gsm8k"), "gsm8k")
    assert settings["num_fewshot"] == 5
    assert settings["fewshot_split"] == "train"
    assert "generation_kwargs" in settings
    humaneval = compat.task_file_settings(manager_of("humaneval"), "humaneval")
    assert humaneval["metric_list"][0]["k"] == [1]


def test_the_sampler_draws_one_more_without_a_few_shot_split():
    from lm_eval.api.samplers import ContextSampler
    from lm_eval.api.task import ConfigurableTask

    nq_open = compat.task_file_settings(manager_of("nq_open"), "nq_open")
    assert compat.required_examples(nq_open, 5) == 6
    assert "n + 1" in inspect.getsource(ContextSampler.sample)
    assert "eval_doc=doc" in inspect.getsource(ConfigurableTask.fewshot_context)
    gsm8k = compat.task_file_settings(manager_of("gsm8k"), "gsm8k")
    assert compat.required_examples(gsm8k, 5) == 5
    assert compat.required_examples(gsm8k, 0) == 0
    bbh = compat.task_file_settings(manager_of("bbh/cot_fewshot"), "bbh_cot_fewshot_boolean_expressions")
    assert compat.required_examples(bbh, 3) == 0


def test_a_task_takes_its_rows_from_custom_dataset():
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
    spec = compat.with_rows({"task": "gsm8k_cot"}, {"test": rows, "train": rows})
    (task,) = compat.load_tasks(manager_of("gsm8k"), "gsm8k", [spec]).values()
    assert task.config.num_fewshot == 8  # of the task file
    assert [doc["question"] for doc in task.eval_docs] == ["0?", "1?", "2?"]


def test_humaneval_loads_code_eval_when_it_is_imported():
    """In a process of its own, because the harness keeps the imported task file."""
    code = """
from lm_eval.tasks import TaskManager
from hft_cli.evaluation import compat
from hft_cli.evaluation.sandbox import CodeEval
import evaluate, sys
original, programs = evaluate.load, []
run = lambda program, test: programs.append(program) or "passed"
manager = TaskManager(include_path=compat.harness_task_folder() / "humaneval", include_defaults=False)
with compat.code_eval_replaced(CodeEval(run)):
    row = {"prompt": "", "test": "", "entry_point": ""}
    compat.load_tasks(manager, "humaneval", [compat.with_rows({"task": "humaneval"}, {"test": [row]})])
assert programs, "HumanEval no longer loads code_eval"
assert evaluate.load is original
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr


def test_simple_evaluate_calls_add_env_info_of_its_module():
    from lm_eval import evaluator

    assert "        add_env_info(results)" in inspect.getsource(evaluator.simple_evaluate)
    before = evaluator.add_env_info
    try:
        compat.skip_environment_report()
        assert evaluator.add_env_info is not before
        assert evaluator.add_env_info({}) is None
    finally:
        evaluator.add_env_info = before


@pytest.fixture(scope="module")
def model():
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=MODEL, device="cpu", batch_size=2)


def request(kind: str, *arguments) -> SimpleNamespace:
    return SimpleNamespace(request_type=kind, args=arguments)


def test_the_harness_reports_its_progress(model, monkeypatch):
    from lm_eval.models import huggingface

    monkeypatch.setattr(huggingface, "tqdm", huggingface.tqdm)  # restored at the end
    reports = []
    compat.report_progress(lambda done, total: reports.append((done, total)))
    model.loglikelihood([request("loglikelihood", "gold", f" {n}") for n in range(3)])
    assert reports
    assert {total for _, total in reports} == {3}


def test_the_harness_generates_by_one_method(model):
    """The contract of `_model_generate` that vLLM's answers rely on."""
    seen, original, size = [], model._model_generate, model.batch_size_per_gpu
    try:
        compat.answer_with_vllm(model, lambda: None, seed=1)
        model._model_generate = lambda **options: seen.append(options) or options["context"]
        wanted = {"until": ["Q:"], "max_gen_toks": 5, "do_sample": False}
        answers = model.generate_until([request("generate_until", "gold " * (n + 1), wanted) for n in range(3)])
    finally:
        model._model_generate = original
        del model.generate_until
    assert answers == ["", "", ""]
    (options,) = seen  # one batch of all, though the model's batches have 2
    assert options["context"].shape == options["attention_mask"].shape
    assert options["attention_mask"][-1][0] == 0  # padded on the left
    assert options["max_length"] == options["context"].shape[1] + 5
    assert "Q:" in options["stop"]
    assert options["do_sample"] is False
    assert model.batch_size_per_gpu == size


def test_the_harness_looks_for_ranks_in_the_environment(monkeypatch):
    import accelerate.state
    import lm_eval.models.huggingface

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.setenv(name, "2")
    source = inspect.getsource(accelerate.state) + inspect.getsource(lm_eval.models.huggingface)
    assert '"LOCAL_RANK"' in source
    assert '"WORLD_SIZE"' in source
    compat.hide_ranks()
    assert not any(name in os.environ for name in names)


def test_the_answers_of_a_model_can_be_shared(model, monkeypatch):
    requests = [request("loglikelihood", "gold", f" {n}") for n in range(3)]
    own_share = model.loglikelihood(requests[::2])
    shares = []
    monkeypatch.setattr(Ranks, "gather", lambda self, share: [shares.append(share) or ["a", "c"], ["b"]])
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(model, method, getattr(model, method))  # restored at the end
    compat.share_requests(model, Ranks(0, 2))
    assert model.loglikelihood(requests) == ["a", "b", "c"]
    assert [value for value, _ in shares[0]] == pytest.approx([value for value, _ in own_share], abs=1e-5)


def test_truncated_prompts_are_counted_as_the_model_cuts_them(model):
    word = " gold"
    tokens = len(model.tok_encode(word * 100)) / 100
    fits, long = word * int(0.8 * model.max_length / tokens), word * int(1.2 * model.max_length / tokens)
    task = SimpleNamespace(
        instances=[
            request("loglikelihood", fits, word),
            request("loglikelihood", long, word),
            request("loglikelihood", long, word),
            request("generate_until", "short", {"max_gen_toks": 8}),
            request("generate_until", fits, {"max_gen_toks": model.max_length // 2}),
            request("loglikelihood_rolling", long),
        ]
    )
    assert compat.count_truncated_prompts(task, model) == 2


def test_generate_ignores_the_generation_config_of_a_checkpoint():
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    ids = torch.tensor([[5, 6, 7]])
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    first_token = int(model.generate(ids, generation_config=settings)[0, 3])
    model.generation_config = GenerationConfig(eos_token_id=first_token, pad_token_id=0)
    assert model.generate(ids, generation_config=settings).shape[1] == 3 + 1  # ends at the checkpoint's EOS token
    compat.use_generation_settings_only(model, settings)
    assert model.generate(ids, generation_config=settings).shape[1] == 3 + 6
