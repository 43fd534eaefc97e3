"""A suite's benchmarks as tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.errors import UserError, choose
from hft_cli.evaluation.benchmarks import BENCHMARKS
from hft_cli.evaluation.compat import (
    code_eval_replaced,
    harness_task_folder,
    load_tasks,
    required_examples,
    task_file_settings,
    with_rows,
)
from hft_cli.evaluation.local_files import available_parts, read_splits
from hft_cli.evaluation.sandbox import CodeEval, run_program
from hft_cli.launch.jobs import HarnessTask
from hft_cli.text import first_of


@dataclass(frozen=True)
class Sources:
    """Where the tasks of a job come from.

    Attributes:
        data_dir: the folder of local files; None reads the rows from the hub.
        include_path: a folder with further task files.
        run: runs a program of the model and its test, and returns the result, as `sandbox.run_program` does.
    """

    data_dir: Path | None = None
    include_path: str | None = None
    run: Callable[[str, str], str] = run_program


@dataclass(frozen=True)
class Tasks:
    """The harness's tasks of a benchmark.

    Attributes:
        tasks: name -> lm_eval.api.task.Task.
        group: the lm_eval.api.group.Group of these tasks, whose scores the harness computes; None without one.
        notes: what the file of scores says about the rows.
    """

    tasks: dict[str, Any]
    group: Any = None
    notes: dict[str, Any] = field(default_factory=dict)


def build_tasks(request: HarnessTask, sources: Sources) -> Tasks:
    """Build the harness's tasks of a benchmark and its settings.

    Raises:
        UserError: if the harness has no such task or metric, or the local files do not fit.
    """
    if request.settings is None:
        return _tasks_of_harness(request.name, sources.include_path)
    from lm_eval.tasks import TaskManager

    name, settings = request.name, BenchmarkConfig(**request.settings)
    benchmark = BENCHMARKS[name]
    manager = TaskManager(
        include_path=harness_task_folder() / (benchmark.task_folder or benchmark.folder), include_defaults=False
    )
    pattern = settings.task or benchmark.tasks
    names = [task for task in manager.all_subtasks if fnmatchcase(task, pattern)]
    if not names:
        choose(f"suite.benchmarks.{name}.task", pattern, manager.all_subtasks)
    files = {task: task_file_settings(manager, task) for task in names}
    specs = [{"task": task, **_changes(files[task], settings)} for task in names]
    if benchmark.runs_code:
        for spec in specs:
            spec["metric_list"] = [_pass_at_k(files[spec["task"]], settings, CodeEval(sources.run))]
    notes: dict[str, Any] = {}
    if sources.data_dir is not None:
        specs, notes["tasks_without_rows"] = _with_local_rows(name, specs, files, sources.data_dir)
    with code_eval_replaced(CodeEval()) if benchmark.runs_code else nullcontext():
        tasks = load_tasks(manager, name, specs)
    _check_metric(name, settings.metric, next(iter(tasks.values())))
    return Tasks(tasks, notes=notes)


def _tasks_of_harness(name: str, include_path: str | None) -> Tasks:
    """The tasks of a name that only the harness knows or a file in `include_path` has: a task, a group or a tag."""
    from lm_eval.tasks import TaskManager

    # A single folder is read much faster than the thousands of the harness's own files.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if name not in manager.all_tasks and include_path is not None:
        manager = TaskManager(include_path=include_path)
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"lm-evaluation-harness has no task '{name}'.{hint} To list all tasks: lm_eval ls tasks")
    _refuse_programs(name, task_file_settings(manager, name))  # before its file is imported
    loaded = manager.load([name])
    tasks = dict(loaded["tasks"])
    for task in tasks.values():
        _refuse_programs(name, task.config.to_dict())
    return Tasks(tasks, dict(loaded["groups"]).get(name))


def _refuse_programs(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a task whose metric runs programs of the model: the harness runs them without limits."""
    if settings.get("unsafe_code"):
        ours = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.runs_code)
        raise UserError(
            f"suite.harness: {name} runs programs that the model writes, without limits. Leave it out. With limits "
            f"there is {ours}: suite=general suite.only=[{ours}]"
        )


def _changes(file: Mapping[str, Any], settings: BenchmarkConfig) -> dict[str, Any]:
    """What a suite's settings change in a task file."""
    changes: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    if settings.shots is not None:
        changes["num_fewshot"] = settings.shots
    if settings.temperature:
        generation = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        changes["repeats"] = settings.samples
    if settings.max_new_tokens is not None:
        generation["max_gen_toks"] = settings.max_new_tokens
    if settings.until is not None:
        generation["until"] = list(settings.until)
    if generation:
        changes["generation_kwargs"] = {**(file.get("generation_kwargs") or {}), **generation}
    return changes


def _pass_at_k(file: Mapping[str, Any], settings: BenchmarkConfig, code_eval: CodeEval) -> dict[str, Any]:
    """The metric of programs: as in the task file, but with our limits around each program."""
    k = list(settings.pass_at) or file["metric_list"][0]["k"]
    return {"metric": code_eval.pass_at_k, "aggregation": "mean", "higher_is_better": True, "k": k}


def _with_local_rows(
    name: str, specs: Sequence[dict[str, Any]], files: Mapping[str, Mapping[str, Any]], data_dir: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """The specs of the tasks that have rows in local files, with these rows; and the names of the other tasks."""
    parts = available_parts(name, data_dir)
    local, missing, parts_found = [], [], False
    for spec in specs:
        task = spec["task"]
        part = max((part for part in parts if f"_{task}".endswith(f"_{part}" if part else "")), key=len, default=None)
        parts_found |= part is not None
        splits = {} if part is None else _local_splits(name, part, spec, files[task], data_dir)
        if splits:
            absent = {key: None for key in FEW_SHOT_SPLITS if files[task].get(key) not in {None, *splits}}
            local.append({**with_rows(spec, splits), **absent})
        else:
            missing.append(task)
    if not parts_found:
        raise UserError(
            f"{name}: the files in suite.data_dir have no rows of {first_of(missing)}. They have: {first_of(parts)}."
        )
    if not local:
        raise UserError(
            f"{name}: the files in suite.data_dir have too few rows for the few-shot examples and a question. Set "
            f"suite.benchmarks.{name}.shots=0, or leave it out (suite.only=[…])."
        )
    return local, missing


FEW_SHOT_SPLITS = ("fewshot_split", "training_split")  # keys of a task file, the first that is set is used


def _local_splits(
    name: str, part: str, spec: Mapping[str, Any], file: Mapping[str, Any], data_dir: Path
) -> dict[str, list[dict[str, Any]]]:
    """Split -> rows of a task; empty if no row to score remains.

    Raises:
        UserError: if there are too few rows for the few-shot examples.
    """
    required = required_examples(file, spec.get("num_fewshot", file.get("num_fewshot") or 0))
    splits = read_splits(name, part, data_dir, required)
    few_shot_split = next((str(file[key]) for key in FEW_SHOT_SPLITS if file.get(key)), "")
    if splits and len(splits.get(few_shot_split, ())) < required:
        raise UserError(
            f"{name}: suite.data_dir has fewer than the {required} examples that {spec['task']} draws from. Put their "
            f"file there, or set suite.benchmarks.{name}.shots=0."
        )
    return splits


def _check_metric(benchmark: str, metric: str | None, task: Any) -> None:
    """Refuse a metric that the task does not have, before anything is scored."""
    metrics = [spec["metric"] for spec in task.config.metric_list or ()]
    if metric is None or any(map(callable, metrics)):  # a function names its metrics when it is called
        return
    filters = [spec["name"] for spec in task.config.filter_list or ()] or ["none"]
    choices = [benchmark_metric(name, filter_name) for name in metrics for filter_name in filters]
    choose(f"suite.benchmarks.{benchmark}.metric", metric, choices)


def benchmark_metric(metric: str, filter_name: str) -> str:
    """The name of a metric in our files: METRIC, or METRIC,FILTER if the answers went through a filter."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"
