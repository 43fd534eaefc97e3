"""Answers by vLLM: the prompts, the ends of answers and the scores are those of transformers.

A stand-in with the functions of vLLM that are used decodes with transformers: vLLM itself is a large package and does
not know heads of the embedded model's size.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.errors import UserError
from hft_cli.evaluation import scorer, vllm_engine
from hft_cli.evaluation.benchmarks import benchmark_settings
from hft_cli.evaluation.harness_worker import score_benchmarks
from hft_cli.evaluation.rows_worker import score_rows
from hft_cli.evaluation.scorer import HeldOutSets, ScoredModel, WorkerOptions
from hft_cli.evaluation.scorer import score as score_all
from hft_cli.evaluation.suite import read_suite
from hft_cli.evaluation.vllm_engine import Decoding, decoding_of
from hft_cli.launch.jobs import HarnessJob, HarnessTask, Progress, RowsJob, RowsTask
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir

MODEL = resolve_path("pocket:model")


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    stop: list[str] | None
    detokenize: bool
    skip_special_tokens: bool
    temperature: float
    repetition_penalty: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


class LLM:
    """vLLM's class, as far as it is used."""

    def __init__(self, *, model, dtype, max_model_len, seed, enforce_eager=False, kv_cache_memory_bytes=None):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        return [
            self._answer(prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, ids, params):
        tokens, ends = list(ids), set(params.stop_token_ids)
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
            seen = torch.tensor(sorted(set(tokens)))
            logits[seen] = torch.where(
                logits[seen] > 0, logits[seen] / params.repetition_penalty, logits[seen] * params.repetition_penalty
            )
            if params.temperature:
                token = torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator).item()
            else:
                token = int(logits.argmax())
            tokens.append(int(token))
            text = self.tokenizer.decode(tokens[len(ids) :], skip_special_tokens=params.skip_special_tokens)
            if token in ends or any(stop in text for stop in params.stop or ()):
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens[len(ids) :]))])


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The stand-in in the place of vLLM, and the environment as it was afterwards."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def score(out: Path, task: RowsTask, model: str = MODEL, **settings) -> tuple[dict, list[dict]]:
    """The scores of a model on a task, and its items."""
    generation = GenerationConfig(**{"max_new_tokens": 24, "batch_size": 6} | settings)
    out.mkdir()
    job = RowsJob(ModelConfig(), model, {"s": {"t": task}}, 7, generation, seed=1)
    score_rows(job, RoundDir(out), Progress(out / "progress.json"))
    items = (out / "s" / "t.jsonl").read_text().splitlines()
    return json.loads((out / "s" / "t.json").read_text()), [json.loads(item) for item in items]


@pytest.fixture
def rows(tmp_path) -> Path:
    """Facts that the model knows, and questions to which it has no short answer."""
    lines = Path(resolve_path("pocket:facts.jsonl")).read_text().splitlines()[:40:4]
    unknown = [{"prompt": f"Tell me more about {n} and {n}.", "completion": "more"} for n in range(4)]
    rows = [
        {"prompt": row[0]["content"], "completion": row[1]["content"]}
        for row in (json.loads(line)["messages"] for line in lines)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + unknown))
    return file


def test_rows_have_the_same_scores_and_answers(rows, tmp_path):
    task = RowsTask(str(rows), metric="accuracy")
    ours, items = score(tmp_path / "transformers", task)
    theirs, other_items = score(tmp_path / "vllm", task, backend="vllm")
    assert theirs == ours
    assert other_items == items
    assert ours["accuracy"] == pytest.approx(10 / 14)
    assert json.loads((tmp_path / "vllm" / "progress.json").read_text())["step"] == 14


def test_a_text_that_ends_answers_ends_them_too(rows, tmp_path):
    """The template `plain` writes a newline after an answer, and no special token."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ '?' if m.role == 'user' else 'a' }}{% endfor %}"
    )
    task = RowsTask(str(rows), metric="edit_similarity")
    ours, items = score(tmp_path / "transformers", task, str(model))
    theirs, other_items = score(tmp_path / "vllm", task, str(model), backend="vllm")
    assert (theirs, other_items) == (ours, items)
    assert any(item["prediction"] for item in items)
    assert not any("a" in item["prediction"] for item in items)


def test_prompts_are_cut_to_the_same_length(rows, tmp_path):
    task, cut = RowsTask(str(rows), metric="accuracy"), {"max_prompt_length": 8}
    ours = score(tmp_path / "transformers", task, **cut)
    assert score(tmp_path / "vllm", task, backend="vllm", **cut) == ours
    assert ours[0]["prompts_cut"] > 0


def test_a_benchmark_has_the_same_items(monkeypatch, tmp_path):
    """GSM8K with examples, and the penalty of a checkpoint's generation_config.json, which the harness applies."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    model, data = tmp_path / "model", tmp_path / "data" / "gsm8k"
    shutil.copytree(MODEL, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "repetition_penalty": 1.3}))
    data.mkdir(parents=True)
    rows = [
        {"question": f"What is {n} and {n}{', now' * n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(7)
    ]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, asked = {}, []
    answer = LLM.generate
    monkeypatch.setattr(LLM, "generate", lambda *args, **kwargs: asked.append(args[2]) or answer(*args, **kwargs))
    for backend in ("transformers", "vllm"):
        settings = {"shots": 1, "max_new_tokens": 16, "metric": "exact_match,flexible-extract"}
        out = tmp_path / backend / "gsm8k.json"
        out.parent.mkdir()
        task = HarnessTask("gsm8k", asdict(benchmark_settings("gsm8k", settings)), 5, chat=True, out=str(out))
        job = HarnessJob(ModelConfig(dtype="float32"), str(model), (task,), str(data.parent), 2, 1, backend=backend)
        score_benchmarks(job, RoundDir(out.parent), Progress(out.parent / "progress.json"))
        items[backend] = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert items["vllm"] == items["transformers"]
    assert len(items["vllm"]) == 5
    assert [len(params) for params in asked] == [5]  # together, whatever suite.batch_size is
    assert all("Q:" in params.stop for params in asked[0])


def test_an_answer_ends_where_it_is_said_to():
    engine, prompts = vllm_engine.start_engine(MODEL, ModelConfig(dtype="float32")), [[5, 6, 7], [8, 9]]
    free = vllm_engine.generate(engine, prompts, Decoding(8, ends=[]))
    assert [len(answer) for answer in free] == [8, 8]
    end = free[0][3]
    ended = vllm_engine.generate(engine, prompts, Decoding(8, ends=[end]))
    assert ended == [answer[: answer.index(end) + 1] if end in answer else answer for answer in free]
    stop = engine.tokenizer.decode(free[0][:3])
    assert vllm_engine.generate(engine, prompts, Decoding(8, ends=[], stops=[stop]))[0] == free[0][:3]


def test_samples_repeat_and_differ_between_equal_prompts(tmp_path):
    prompts, hot = [[5, 6, 7]] * 4, Decoding(8, ends=[1], temperature=1.5, seed=3)
    engine = vllm_engine.start_engine(MODEL, ModelConfig(dtype="float32"))
    first = vllm_engine.generate(engine, prompts, hot)
    assert vllm_engine.generate(engine, prompts, hot) == first
    assert len({tuple(answer) for answer in first}) > 1
    # Also over the border between two portions of prompts.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "AT_ONCE", 3)
        done: list[tuple[int, int]] = []
        assert vllm_engine.generate(engine, prompts, hot, lambda *counts: done.append(counts)) == first
    assert [prompts for prompts, _ in done] == [3, 1]
    assert sum(tokens for _, tokens in done) == sum(map(len, first))


def test_decoding_is_what_transformers_would_do():
    checkpoint = SimpleNamespace(
        eos_token_id=[2, 7], repetition_penalty=1.1, do_sample=True, temperature=0.6, top_k=20, top_p=None
    )
    greedy = decoding_of(checkpoint, {"do_sample": False}, 9)
    assert greedy == Decoding(9, ends=[2, 7], repetition_penalty=1.1)  # the checkpoint's penalty counts, lm-eval 3154
    sampled = decoding_of(checkpoint, {"do_sample": True, "temperature": 0.2, "top_p": 0.95}, 9)
    assert sampled == Decoding(9, [2, 7], temperature=0.2, top_k=20, top_p=0.95, repetition_penalty=1.1)
    bare = decoding_of(SimpleNamespace(eos_token_id=2), {"do_sample": True}, 9)
    assert bare == Decoding(9, [2], temperature=1.0, top_k=50, top_p=1.0)
    with pytest.raises(UserError, match="cannot apply no_repeat_ngram_size=3"):
        decoding_of(SimpleNamespace(eos_token_id=2, no_repeat_ngram_size=3), {}, 9)
    with pytest.raises(UserError, match="cannot apply num_beams=4"):
        decoding_of(SimpleNamespace(eos_token_id=2), {"num_beams": 4}, 9)


def test_what_vllm_cannot_do_is_one_line(monkeypatch, rows, tmp_path):
    def fail(self, **options):
        raise ValueError("Model architectures ['X'] are not supported.\nMore lines.")

    monkeypatch.setattr(LLM, "__init__", fail)
    with pytest.raises(UserError) as raised:
        score(tmp_path / "vllm", RowsTask(str(rows), metric="accuracy"), backend="vllm")
    assert str(raised.value) == (
        "vLLM cannot answer with this model: Model architectures ['X'] are not supported. "
        "Set the key backend back to transformers."
    )


def test_without_vllm_the_command_stops_at_once(monkeypatch):
    vllm_engine.check_backend("suite.backend", "vllm")
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    vllm_engine.check_backend("suite.backend", "transformers")
    with pytest.raises(UserError, match=r"suite\.backend=vllm needs vLLM, which is not installed"):
        vllm_engine.check_backend("suite.backend", "vllm")
    with pytest.raises(UserError, match=r"suite\.backend=vllm needs vLLM"):
        read_suite(SuiteConfig(name="s", harness=["arc_easy"], backend="vllm"))


def test_only_generated_answers_go_to_vllm(monkeypatch, tmp_path):
    """The parent splits the sets of rows: two programs would share the memory of one GPU."""
    jobs = []
    monkeypatch.setattr(scorer, "run_worker", lambda run, poll: jobs.append((run.job, run.ranks)))
    monkeypatch.setattr(scorer.metadata, "packages_distributions", lambda: {"vllm": ["torch"]})
    monkeypatch.setattr(scorer, "gpus", lambda: [None, None])
    forced, generated = (RowsTask("pocket:facts.jsonl", metric) for metric in ("token_accuracy", "rouge_l"))
    tests = HeldOutSets({"a": forced, "b": generated}, GenerationConfig(backend="vllm"))
    model = ScoredModel(Path(MODEL), ModelConfig(name="pocket"), "hash")
    suite = read_suite(SuiteConfig(name="none"))
    score_all(suite, model, RoundDir(tmp_path), tests, workers=WorkerOptions(2))
    assert [(job.generation.backend, set(job.tasks["data"]), ranks) for job, ranks in jobs] == [
        ("transformers", {"a"}, 2),
        ("vllm", {"b"}, None),
    ]
    names = score_all(suite, model, RoundDir(tmp_path), tests, keyed=True)["data"]
    others = score_all(suite, model, RoundDir(tmp_path), HeldOutSets(tests.tasks), keyed=True)["data"]
    assert names["a"] == others["a"]
    assert names["b"] != others["b"]
