"""Worker: scores of one model on benchmarks of lm-evaluation-harness.

With several ranks, each rank holds the whole model and answers a share of the requests. The harness itself runs on
every rank as if that were the only one; rank 0 runs the programs of HumanEval and writes the files.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.data.reasoning import has_reasoning
from hft_cli.errors import UserError
from hft_cli.evaluation.benchmarks import BENCHMARKS
from hft_cli.evaluation.compat import (
    answer_with_vllm,
    count_truncated_prompts,
    hide_ranks,
    report_progress,
    share_requests,
    skip_environment_report,
    without_reasoning,
)
from hft_cli.evaluation.harness_errors import explain
from hft_cli.evaluation.harness_results import item_records, summarize, summarize_unknown
from hft_cli.evaluation.harness_tasks import Sources, Tasks, build_tasks
from hft_cli.evaluation.sandbox import isolation, run_program
from hft_cli.evaluation.score_files import write_scores
from hft_cli.evaluation.vllm_engine import start_engine
from hft_cli.evaluation.workers import current_ranks, device_of_rank, load_tokenizer, load_weights, process_group
from hft_cli.launch.jobs import HarnessJob, HarnessTask, Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir

logger = logging.getLogger(__name__)


def score_benchmarks(job: HarnessJob, folder: RoundDir, progress: Progress) -> None:
    """Score each benchmark of the job and write its files. One that fails does not keep others from being scored.

    Raises:
        UserError: if benchmarks failed, with a line on each.
    """
    if job.data_dir is not None:  # before the hub's library is imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    skip_environment_report()
    ranks = current_ranks()
    progress.activity("reading the benchmarks")
    failures: list[str] = []
    tasks = {}
    sources = Sources(
        data_dir=None if job.data_dir is None else Path(job.data_dir),
        include_path=job.include_path,
        run=run_program if ranks.first else _leave_to_first_rank,
    )
    for request in job.todo:
        with _noted(request, failures, ranks):
            tasks[request.name] = build_tasks(request, sources)
    if tasks:
        progress.activity("loading the model")
        model = _load(job)
        with process_group(ranks):
            if ranks.count > 1:
                share_requests(model, ranks)
            for request in job.todo:
                if request.name in tasks:
                    report_progress(partial(progress.count, activity=request.name))
                    with _noted(request, failures, ranks):
                        _score(model, tasks[request.name], request, job.seed, ranks)
    if failures:
        others = "" if len(failures) == len(job.todo) else " The scores of the other benchmarks are kept."
        raise UserError(" ".join(failures) + others)


@contextmanager
def _noted(request: HarnessTask, failures: list[str], ranks: Ranks) -> Iterator[None]:
    """Within this context an error of one benchmark is noted, with its traceback in the worker's log.

    Of several ranks others may not see it, and would wait: then it ends the worker.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            logger.exception("%s failed", request.name)
        failures.append(explain(request, error))
        if ranks.count > 1:
            raise UserError(" ".join(failures)) from error


def _score(model: Any, built: Tasks, request: HarnessTask, seed: int, ranks: Ranks) -> None:
    """Score a benchmark and write its files."""
    start = time.perf_counter()
    reasons = request.chat and has_reasoning(model.tokenizer)
    with without_reasoning(model) if reasons else nullcontext():
        results = _evaluate(model, built, request, seed + ranks.rank)
    if ranks.first:
        details = {
            "prompts_cut": sum(count_truncated_prompts(task, model) for task in built.tasks.values()),
            "seconds": round(time.perf_counter() - start, 1),
            **built.notes,
            **({"programs_cut_off_from": isolation()} if _runs_code(request) else {}),
        }
        _write(request, results, built, details)


def _runs_code(request: HarnessTask) -> bool:
    return request.settings is not None and BENCHMARKS[request.name].runs_code


def _leave_to_first_rank(program: str, test: str) -> str:
    return "left to the first rank"


def _load(job: HarnessJob) -> Any:
    """The model as the harness wraps it."""
    from lm_eval.models.huggingface import HFLM

    device = device_of_rank()
    hide_ranks()
    attention = {} if job.model.attention is None else {"attn_implementation": job.model.attention}
    model = HFLM(
        pretrained=load_weights(job.path, job.model).to(device) if job.model.part else job.path,
        tokenizer=load_tokenizer(job.path, job.model),
        dtype=job.model.dtype,
        batch_size=job.batch_size,
        device=device,
        **attention,
    )
    if job.backend == "vllm":
        # The rest of the memory is for the log-likelihoods of other benchmarks, which transformers computes.
        start = partial(start_engine, job.path, job.model, memory_share=0.7)
        answer_with_vllm(model, start, job.seed)
    return model


def _evaluate(model: Any, built: Tasks, request: HarnessTask, seed: int) -> dict[str, Any]:
    """The harness's results. Each rank needs a seed of its own, or all would draw the same samples for a prompt."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = evaluator.simple_evaluate(
        model=model,
        tasks=[built.group] if built.group is not None else list(built.tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=request.limit,
        apply_chat_template=request.chat,
        fewshot_as_multiturn=request.settings is None or request.settings["multiturn"],
        bootstrap_iters=1000,
        torch_random_seed=seed,
        confirm_run_unsafe_code=_runs_code(request),  # suite.allow_code was checked before this worker was started
    )
    return results


def _write(request: HarnessTask, results: dict[str, Any], built: Tasks, details: dict[str, Any]) -> None:
    tasks = list(built.tasks)
    if request.settings is None:
        scores = summarize_unknown(results, tasks, request.name if built.group is not None else None)
    else:
        scores = summarize(results["samples"], BenchmarkConfig(**request.settings))
    description = {
        "settings": request.settings,
        "limit": request.limit,
        "chat": request.chat,
        "lm_eval": version("lm-eval"),
        "versions": {task: results["versions"].get(task) for task in tasks},
        "shots": results["n-shot"],
        "items_of": {task: results["n-samples"][task] for task in tasks},
    }
    write_scores(Path(request.out), {**scores, **description, **details}, item_records(results["samples"]))
