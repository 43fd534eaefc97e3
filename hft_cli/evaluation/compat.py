"""Uses of private or undocumented parts of lm-evaluation-harness and transformers, each with the version tried."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hft_cli.data.reasoning import decode_answer
from hft_cli.evaluation import vllm_engine
from hft_cli.evaluation.workers import share_items
from hft_cli.launch.ranks import Ranks


def harness_task_folder() -> Path:
    """The folder of the harness's own task files.

    UPSTREAM: lm-eval 0.4.13: a `TaskManager` of a single folder starts much faster than one of all task files, but
    needs the path of the folder. Can go when the index of all tasks is cached.
    """
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


def task_file_settings(manager: Any, task: str) -> dict[str, Any]:
    """The settings in the file of a task.

    UPSTREAM: lm-eval 0.4.13: `TaskManager.task_index` is the only access to the settings of a task before it is loaded
    with its rows. `Entry.cfg`, which holds them, is undocumented.
    """
    return manager.task_index[task].cfg or {}


def load_tasks(manager: Any, benchmark: str, specs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> task for specs, each of which has a task's name and changes to the settings in its file.

    UPSTREAM: lm-eval 0.4.13: only within a group does a spec change the file of the task; alone, it replaces the file.
    """
    return dict(manager.load([{"group": benchmark, "task": list(specs)}])["tasks"])


def with_rows(spec: Mapping[str, Any], splits: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The spec of a task that takes its rows from `splits` (split -> rows) instead of the hub.

    UPSTREAM: lm-eval 0.4.13: `custom_dataset` is a field of `TaskConfig` without documentation.
    """
    from datasets import Dataset, DatasetDict

    dataset = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    return {**spec, "custom_dataset": lambda **_: dataset}


def required_examples(task: Mapping[str, Any], shots: int) -> int:
    """How many rows the few-shot split of a task needs, from the settings in its file.

    UPSTREAM: lm-eval 0.4.13: if a task has no few-shot split of its own, the sampler draws one row more than there are
    shots, because the item itself may be among them. Nothing is drawn if the examples are in the task file.
    """
    if not shots or (task.get("fewshot_config") or {}).get("samples"):
        return 0
    return shots + ("fewshot_split" not in task)


@contextmanager
def code_eval_replaced(code_eval: Any) -> Iterator[None]:
    """Within this context, task files that load the metric `code_eval` get `code_eval` instead.

    UPSTREAM: lm-eval 0.4.13: HumanEval's task file calls `evaluate.load("code_eval")` when it is imported, which
    downloads a program from the hub that runs the model's code without limits. The task has no setting to replace it.
    """
    import evaluate

    original = evaluate.load

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return code_eval if name == "code_eval" else original(name, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


def skip_environment_report() -> None:
    """Do not collect a description of the machine in each evaluation.

    UPSTREAM: lm-eval 0.4.13: `simple_evaluate` always calls `add_env_info`, which starts pip to list all packages. Can
    go when it has an option.
    """
    from lm_eval import evaluator

    evaluator.add_env_info = lambda results: None


def report_progress(report: Callable[[int, int], None]) -> None:
    """Call `report(done, total)` whenever the harness updates its progress bar.

    UPSTREAM: lm-eval 0.4.13: `HFLM` has no callback. It counts requests by `tqdm` in its module's namespace.
    """
    from lm_eval.models import huggingface
    from tqdm import tqdm

    class ReportingBar(tqdm):  # type: ignore[misc]
        def refresh(self, *arguments: Any, **options: Any) -> Any:
            if not self.disable and self.total:
                report(self.n, self.total)
            return super().refresh(*arguments, **options)

    huggingface.tqdm = ReportingBar


def hide_ranks() -> None:
    """Hide the other ranks from the harness.

    UPSTREAM: lm-eval 0.4.13: `HFLM` reads torchrun's environment variables through accelerate. The harness then draws
    other few-shot examples for other numbers of ranks, and fails if a task has fewer items than there are ranks.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def share_requests(model: Any, ranks: Ranks) -> None:
    """Let each rank answer a share of a model's requests; every rank gets all answers, in order.

    UPSTREAM: lm-eval 0.4.13: `simple_evaluate` calls these three methods of the model, each with a list of requests.
    They are replaced, because the harness cannot share the requests itself (see `hide_ranks`).
    """
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, method, partial(share_items, ranks, getattr(model, method)))


@contextmanager
def without_reasoning(model: Any) -> Iterator[None]:
    """Within this context a model of the harness answers without the reasoning before an answer.

    UPSTREAM: lm-eval 0.4.13: `think_end_token` of `HFLM` is one text; generation ends at a stop string within the
    reasoning, and special tokens are gone before it is looked for. `generate_until` decodes by `tok_decode` and then
    cuts at the stop strings; `_model_generate` gets them too, with the text of the EOS token.
    """
    decode, generate = model.tok_decode, model._model_generate

    def tok_decode(tokens: Any, skip_special_tokens: bool = True) -> str:
        if isinstance(tokens, int) or not skip_special_tokens:
            return str(decode(tokens, skip_special_tokens=skip_special_tokens))
        return decode_answer(list(tokens), model.tokenizer)[1]

    def end_at_eos(context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        return generate(context, max_length, [decode(model.eot_token_id, skip_special_tokens=False)], **options)

    model.tok_decode, model._model_generate = tok_decode, end_at_eos
    try:
        yield
    finally:
        model.tok_decode, model._model_generate = decode, generate


def answer_with_vllm(model: Any, start: Callable[[], Any], seed: int) -> None:
    """Let vLLM generate the answers of a model of the harness; `start` returns its engine, at the first answer.

    UPSTREAM: lm-eval 0.4.13: its own model for vLLM drops the penalties and sampling settings of the checkpoint's
    generation_config.json, which `HFLM` applies (issue 3154), and tokenizes by itself. So `HFLM` makes the prompts and
    cuts the answers, and only `_model_generate` is replaced: it gets a batch of prompts, padded on the left, and
    returns them with their answers. `batch_size_per_gpu` is the number of prompts in a batch.
    """
    import torch

    generate_until = model.generate_until
    engines: list[Any] = []

    def generate(context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        if not engines:
            engines.append(start())
        prompts = [row[mask.bool()].tolist() for row, mask in zip(context, options["attention_mask"], strict=True)]
        decoding = vllm_engine.decoding_of(model.model.generation_config, options, max_length - context.shape[1])
        decoding = replace(decoding, stops=tuple(stop), seed=seed)
        answers = [torch.tensor(tokens) for tokens in vllm_engine.generate(engines[0], prompts, decoding)]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=model.eot_token_id)
        return torch.cat([context.cpu(), padded], dim=1)

    def all_at_once(requests: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        size, model.batch_size_per_gpu = model.batch_size_per_gpu, len(requests)
        try:
            return generate_until(requests, *arguments, **options)
        finally:
            model.batch_size_per_gpu = size

    model._model_generate, model.generate_until = generate, all_at_once


def count_truncated_prompts(task: Any, model: Any) -> int:
    """How many prompts of an evaluated task were too long for the model.

    UPSTREAM: lm-eval 0.4.13: `HFLM` drops the start of a long prompt and counts nothing. The prompts are read from
    `Task.instances`, their lengths computed as in `HFLM`. Requests for a whole text are never truncated.
    """
    lengths: dict[str, int] = {}
    truncated = set()
    for instance in task.instances:
        if instance.request_type not in ("generate_until", "loglikelihood"):
            continue
        prompt, target = instance.args[:2]
        if prompt not in lengths:
            lengths[prompt] = len(model.tok_encode(prompt))
        if isinstance(target, dict):  # settings of generation
            limit = model.max_length - (target.get("max_gen_toks") or model.max_gen_toks)
        else:
            limit = model.max_length + 1 - len(model.tok_encode(target))
        if lengths[prompt] > limit:
            truncated.add(prompt)
    return len(truncated)


def use_generation_settings_only(model: Any, settings: Any) -> None:
    """Let `model.generate` use the GenerationConfig `settings` and nothing of the checkpoint's generation_config.json.

    UPSTREAM: transformers 5.23.0: `generate` takes each value that is None in its `generation_config` argument from
    `model.generation_config`. A checkpoint's sampling settings or stop tokens would change the answers.
    """
    model.generation_config = settings
