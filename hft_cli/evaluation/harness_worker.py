"""Worker: one model's scores on benchmarks of lm-evaluation-harness.

Started through hft_cli.launch.work.

With several ranks (torchrun) each answers a share of the requests. The harness itself is kept from knowing: it would
draw other examples for other numbers of ranks, and stop where a task has fewer items than there are ranks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.data.templates import chat_template
from hft_cli.errors import choose
from hft_cli.evaluation import sandbox
from hft_cli.evaluation.harness_tasks import benchmark_name, build_tasks
from hft_cli.evaluation.metrics import mean_and_error
from hft_cli.files import write_json, write_text
from hft_cli.launch.jobs import HarnessJob, Progress
from hft_cli.run_dir import RoundDir

Item = dict[str, Any]

PATIENCE = timedelta(weeks=1)  # of the other ranks, while the first one runs programs


def score(job: HarnessJob, folder: RoundDir, progress: Progress) -> None:
    """Score what is to do, benchmark by benchmark; each one's file of scores is written last, when it is done."""
    if job.data_dir is not None:  # before the first import of the hub's library, which reads them then
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    progress.activity("loading lm-evaluation-harness")
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda results: None  # pip's list of all packages, anew for each benchmark
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank:  # the first one runs the programs
        sandbox.run = lambda program: "left to the first rank"  # type: ignore[assignment,misc]
    none = TaskManager(include_defaults=False)
    progress.activity("reading the benchmarks")
    built = {
        one.name: build_tasks(one, job) for one in job.todo
    }  # before the model: what is wrong with files shows here
    progress.activity("loading the model")
    model = load(job, rank, ranks)
    for one in job.todo:
        start = time.perf_counter()
        _show_progress(progress, one.name)
        tasks, notes = built[one.name]
        results = evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            task_manager=none,
            limit=one.limit,
            apply_chat_template=one.chat,
            bootstrap_iters=1000,
            torch_random_seed=job.seed + rank,  # or several ranks would draw the same samples of one prompt
            confirm_run_unsafe_code=True,  # that it may run was checked before this worker was started
        )
        if rank:
            continue
        settings = BenchmarkConfig(**one.settings) if one.settings is not None else None
        measured = _measured(results["samples"], settings) if settings else _as_reported(results, tasks)
        lines = (json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in _items(results["samples"]))
        out = Path(one.out)
        write_text(out.with_suffix(".jsonl"), "".join(lines))
        write_json(
            out,
            {
                **measured,
                "settings": one.settings,
                "limit": one.limit,
                "chat": one.chat,
                "lm_eval": version("lm-eval"),
                "prompts_cut": sum(_cut(task, model) for task in tasks.values()),
                "seconds": round(time.perf_counter() - start, 1),
                "versions": {name: results["versions"].get(name) for name in tasks},
                "shots": results["n-shot"],
                "items_of": {name: results["n-samples"][name] for name in tasks},
                **notes,
            },
        )
    if ranks > 1:
        import torch.distributed

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _show_progress(progress: Progress, benchmark: str) -> None:
    """Report the counts of the harness's own progress bar."""
    from lm_eval.models import huggingface
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def refresh(self, *arguments: Any, **options: Any) -> Any:
            if not self.disable and self.total:
                progress.count(self.n, self.total, activity=benchmark)
            return super().refresh(*arguments, **options)

    huggingface.tqdm = Bar


def load(job: HarnessJob, rank: int = 0, ranks: int = 1) -> Any:
    """The model as the harness takes it, in the precision and with the chat template of the job."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.path)
    if job.model.chat_template is not None:
        tokenizer.chat_template = chat_template(job.model.chat_template, tokenizer)
    attention = {} if job.model.attention is None else {"attn_implementation": job.model.attention}
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # which the harness would go by
        os.environ.pop(name, None)
    model = HFLM(
        pretrained=job.path,
        tokenizer=tokenizer,
        dtype=job.model.dtype,
        batch_size=job.batch_size,
        device=device,
        **attention,
    )
    if ranks > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, timeout=PATIENCE)
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(model, name, _shared(getattr(model, name), rank, ranks))
    return model


def _shared(answer: Callable[..., list[Any]], rank: int, ranks: int) -> Callable[..., list[Any]]:
    """A model's method, with its requests shared out over the ranks; each rank gets all answers."""

    def share(requests: list[Any], **options: Any) -> list[Any]:
        import torch.distributed

        mine = requests[rank::ranks]
        gathered: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(gathered, answer(mine, **options) if mine else [])
        whole: list[Any] = [None] * len(requests)
        for number, own in enumerate(gathered):
            whole[number::ranks] = own
        return whole

    return share


def _items(samples: Mapping[str, list[Item]]) -> Iterator[Item]:
    """One record of each item; its scores stand under "metric" or "metric,filter", as in the means over them."""
    for task, records in samples.items():
        merged: dict[int, Item] = {}
        for record in records:
            item = merged.setdefault(
                record["doc_id"],
                {
                    "row": f"{task}/{record['doc_id']}",
                    "task": task,
                    "item": record["doc_id"],
                    "prompt": record["arguments"][0][0],
                    "target": record["target"],
                    "choices": [argument[1] for argument in record["arguments"] if isinstance(argument[1], str)],
                    "responses": record["resps"],
                },
            )
            item |= {benchmark_name(metric, record): record[metric] for metric in record["metrics"]}
        yield from (merged[number] for number in sorted(merged))


def _measured(samples: Mapping[str, list[Item]], settings: BenchmarkConfig) -> dict[str, Any]:
    """Means over the items with their standard errors, the benchmark's own metric first, and the same by task."""
    items = list(_items(samples))
    records = [record for own in samples.values() for record in own]
    names = list(dict.fromkeys(benchmark_name(metric, record) for record in records for metric in record["metrics"]))
    if settings.metric is not None:
        choose("metric", settings.metric, names)
        names = [settings.metric, *(name for name in names if name != settings.metric)]
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)

    def values(name: str, own: Iterable[Item]) -> list[float]:
        return [float(item[name]) for item in own]

    of_tasks = {
        task: {key: value for name in names for key, value in mean_and_error(name, values(name, own)).items()}
        | {"items": len(own)}
        for task, own in by_task.items()
    }
    scores: dict[str, float] = {}
    for name in names:
        if settings.mean == "tasks":
            means = [of_tasks[task][name] for task in of_tasks]
            errors = [of_tasks[task][f"{name}_stderr"] for task in of_tasks]
            scores[name] = sum(means) / len(means)
            scores[f"{name}_stderr"] = sqrt(sum(error**2 for error in errors)) / len(errors)
        else:
            scores |= mean_and_error(name, values(name, items))
    scores["items"] = len(items)
    return {"scores": scores, **({"tasks": of_tasks} if len(of_tasks) > 1 else {})}


def _as_reported(results: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    """The harness's own figures of tasks that hft knows nothing of; of several tasks the plain mean of each metric."""
    of_tasks = {}
    for task in tasks:
        figures = {
            re.sub(r"^(.*)_stderr,(.*)$", r"\1,\2_stderr", key).replace(",none", ""): value
            for key, value in results["results"][task].items()
            if "," in key and isinstance(value, int | float)  # "metric,filter"; other keys say what the task is
        }
        of_tasks[task] = figures | {"items": results["n-samples"][task]["effective"]}
    if len(of_tasks) == 1:
        return {"scores": next(iter(of_tasks.values()))}
    shared = set.intersection(*(set(figures) for figures in of_tasks.values()))
    first = next(iter(of_tasks.values()))
    kept = [key for key in first if key in shared and "_stderr" not in key and key != "items"]
    scores = {key: sum(figures[key] for figures in of_tasks.values()) / len(of_tasks) for key in kept}
    return {"scores": scores | {"items": sum(f["items"] for f in of_tasks.values())}, "tasks": of_tasks}


def _cut(task: Any, model: Any) -> int:
    """How many prompts are too long for the model, so that the harness cuts their start."""
    lengths: dict[str, int] = {}
    cut = set()
    for instance in task.instances:
        if instance.request_type not in ("generate_until", "loglikelihood"):
            continue  # a whole text, which is scored window by window
        prompt, rest = instance.args[:2]
        if prompt not in lengths:
            lengths[prompt] = len(model.tok_encode(prompt))
        if isinstance(rest, dict):
            most = model.max_length - (rest.get("max_gen_toks") or model.max_gen_toks)
        else:
            most = model.max_length + 1 - len(model.tok_encode(rest))
        if lengths[prompt] > most:
            cut.add(prompt)
    return len(cut)
