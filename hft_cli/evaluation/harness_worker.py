"""Worker: scores of one model on benchmarks of lm-evaluation-harness.

With several ranks, each rank holds the whole model and answers a share of the requests. The harness itself runs on
every rank as if that were the only one; rank 0 runs the programs of HumanEval and writes the files.
"""

from __future__ import annotations

import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.evaluation.benchmarks import BENCHMARKS
from hft_cli.evaluation.compat import (
    count_truncated_prompts,
    hide_ranks,
    report_progress,
    share_requests,
    skip_environment_report,
)
from hft_cli.evaluation.harness_results import item_records, summarize, summarize_unknown
from hft_cli.evaluation.harness_tasks import build_tasks
from hft_cli.evaluation.sandbox import isolation, run_program
from hft_cli.evaluation.score_files import write_scores
from hft_cli.evaluation.workers import current_ranks, device_of_rank, load_tokenizer, process_group
from hft_cli.launch.jobs import HarnessJob, HarnessTask, Progress
from hft_cli.run_dir import RoundDir


def score_benchmarks(job: HarnessJob, folder: RoundDir, progress: Progress) -> None:
    """Score each benchmark of the job and write its files."""
    if job.data_dir is not None:  # before the hub's library is imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    skip_environment_report()
    ranks = current_ranks()
    progress.activity("reading the benchmarks")
    data_dir = None if job.data_dir is None else Path(job.data_dir)
    run = run_program if ranks.first else _leave_to_first_rank
    tasks = {request.name: build_tasks(request, data_dir, run) for request in job.todo}
    progress.activity("loading the model")
    model = _load(job)
    with process_group(ranks):
        if ranks.count > 1:
            share_requests(model, ranks)
        for request in job.todo:
            start = time.perf_counter()
            report_progress(partial(progress.count, activity=request.name))
            benchmark_tasks, notes = tasks[request.name]
            results = _evaluate(model, benchmark_tasks, request, job.seed + ranks.rank)
            if ranks.first:
                details = {
                    "prompts_cut": sum(count_truncated_prompts(task, model) for task in benchmark_tasks.values()),
                    "seconds": round(time.perf_counter() - start, 1),
                    **notes,
                    **({"programs_cut_off_from": isolation()} if _runs_code(request) else {}),
                }
                _write(request, results, list(benchmark_tasks), details)


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
    return HFLM(
        pretrained=job.path,
        tokenizer=load_tokenizer(job.path, job.model),
        dtype=job.model.dtype,
        batch_size=job.batch_size,
        device=device,
        **attention,
    )


def _evaluate(model: Any, tasks: dict[str, Any], request: HarnessTask, seed: int) -> dict[str, Any]:
    """The harness's results. Each rank needs a seed of its own, or all would draw the same samples for a prompt."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = evaluator.simple_evaluate(
        model=model,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=request.limit,
        apply_chat_template=request.chat,
        bootstrap_iters=1000,
        torch_random_seed=seed,
        confirm_run_unsafe_code=_runs_code(request),  # suite.allow_code was checked before this worker was started
    )
    return results


def _write(request: HarnessTask, results: dict[str, Any], tasks: list[str], details: dict[str, Any]) -> None:
    if request.settings is None:
        scores = summarize_unknown(results, tasks)
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
