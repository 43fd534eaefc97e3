"""From the harness's results of a benchmark to a record of each item, means and standard errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.errors import choose
from hft_cli.evaluation.harness_tasks import benchmark_metric
from hft_cli.evaluation.metrics import mean_and_error

Sample = dict[str, Any]
"""The harness's record of an item under one filter."""

Item = dict[str, Any]
"""Our record of an item, a line of NAME.jsonl."""


def item_records(samples: Mapping[str, Sequence[Sample]]) -> list[Item]:
    """One record of each item, from the harness's samples (task -> samples).

    The scores of an item have the same names as the means of the benchmark.
    """
    items: list[Item] = []
    for task, task_samples in samples.items():
        by_number: dict[int, Item] = {}
        for sample in task_samples:
            item = by_number.setdefault(
                sample["doc_id"],
                {
                    "row": f"{task}/{sample['doc_id']}",
                    "task": task,
                    "item": sample["doc_id"],
                    "prompt": sample["arguments"][0][0],
                    "target": sample["target"],
                    "choices": [words[0] for _, *words in sample["arguments"] if words and isinstance(words[0], str)],
                    "responses": sample["resps"],
                },
            )
            item |= {benchmark_metric(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
        items += [by_number[number] for number in sorted(by_number)]
    return items


def summarize(samples: Mapping[str, Sequence[Sample]], settings: BenchmarkConfig) -> dict[str, Any]:
    """Means over the items with their standard errors: `scores` of the benchmark, and `tasks` if there are several.

    The metric of `settings` is the first of the scores.
    """
    names = list(
        dict.fromkeys(
            benchmark_metric(metric, sample["filter"])
            for task_samples in samples.values()
            for sample in task_samples
            for metric in sample["metrics"]
        )
    )
    if settings.metric is not None:
        choose("metric", settings.metric, names)
        names = [settings.metric, *(name for name in names if name != settings.metric)]
    items = item_records(samples)
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)
    tasks = {task: _means(names, task_items) for task, task_items in by_task.items()}
    scores = _means_over_tasks(names, list(tasks.values())) if settings.mean == "tasks" else _means(names, items)
    scores["items"] = len(items)
    return {"scores": scores, **({"tasks": tasks} if len(tasks) > 1 else {})}


def _means(names: Sequence[str], items: Sequence[Item]) -> dict[str, float]:
    means: dict[str, float] = {}
    for name in names:
        means |= mean_and_error(name, [float(item[name]) for item in items])
    return means | {"items": len(items)}


def _means_over_tasks(names: Sequence[str], tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The plain mean over tasks; its standard error takes the tasks as independent."""
    means: dict[str, float] = {}
    for name in names:
        errors = [scores[f"{name}_stderr"] for scores in tasks]
        means[name] = sum(scores[name] for scores in tasks) / len(tasks)
        means[f"{name}_stderr"] = sqrt(sum(error**2 for error in errors)) / len(errors)
    return means


def summarize_unknown(results: Mapping[str, Any], tasks: Sequence[str], group: str | None = None) -> dict[str, Any]:
    """The harness's own figures of tasks without settings of ours.

    Args:
        group: the name of a group of these tasks, of which the harness computes the scores. Of other tasks the scores
            are means weighted by the number of items, as is its default.
    """
    figures = {task: _figures(results["results"][task]) for task in tasks}
    sizes = {task: results["n-samples"][task]["effective"] for task in tasks}
    by_task = {task: {**metrics, "items": sizes[task]} for task, metrics in figures.items()}
    of_group = _figures(results["results"].get(group, {}))
    if not of_group and len(figures) == 1:
        return {"scores": next(iter(by_task.values()))}
    scores = of_group or _weighted_means(figures, sizes)
    return {"scores": {**scores, "items": sum(sizes.values())}, "tasks": by_task}


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """The harness's figures under our names. Its keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    return {
        re.sub(r"^(.*)_stderr,(.*)$", r"\1,\2_stderr", key).replace(",none", ""): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }


def _weighted_means(figures: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> dict[str, float]:
    """Means over tasks of the metrics that all have, weighted by items; a standard error if all tasks have one."""
    weights = {task: size / sum(sizes.values()) for task, size in sizes.items()}
    shared = [name for name in next(iter(figures.values())) if all(name in metrics for metrics in figures.values())]
    means = {}
    for name in shared:
        if not name.endswith("_stderr"):
            means[name] = sum(weights[task] * metrics[name] for task, metrics in figures.items())
            if (error := f"{name}_stderr") in shared:
                means[error] = sqrt(sum((weights[task] * metrics[error]) ** 2 for task, metrics in figures.items()))
    return means
