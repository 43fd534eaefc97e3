"""A suite's benchmarks as tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.errors import UserError, choose
from hft_cli.evaluation.benchmarks import BENCHMARKS, parts, splits
from hft_cli.launch.jobs import HarnessJob, HarnessTask


def build_tasks(one: HarnessTask, job: HarnessJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """A benchmark's tasks by name, and what is to be noted of their rows.

    Raises:
        UserError: if the harness has no such task, or the files do not do.
    """
    from lm_eval.tasks import TaskManager

    if one.settings is None:
        manager = TaskManager()
        if one.name not in manager.all_tasks:
            near = get_close_matches(one.name, manager.all_tasks, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"lm-evaluation-harness has no task '{one.name}'.{hint} All of them: lm_eval ls tasks")
        return dict(manager.load([one.name])["tasks"]), {}

    settings, benchmark = BenchmarkConfig(**one.settings), BENCHMARKS[one.name]
    manager = TaskManager(include_path=harness_tasks() / benchmark.place, include_defaults=False)
    pattern = settings.task or benchmark.tasks
    names = [name for name in manager.all_subtasks if fnmatchcase(name, pattern)]
    if not names:
        choose(f"suite.benchmarks.{one.name}.task", pattern, manager.all_subtasks)
    known = {name: manager.task_index[name].cfg or {} for name in names}
    specs = [{"task": name, **_overrides(known[name], settings)} for name in names]
    notes: dict[str, Any] = {}
    if job.data_dir is not None:
        specs, notes = _local(one.name, specs, known, pattern, settings, Path(job.data_dir))
    with _own_code_runner() if benchmark.runs_code else nullcontext():
        tasks = dict(manager.load([{"group": one.name, "task": specs}])["tasks"])
    _check_metric(one.name, settings.metric, next(iter(tasks.values())))
    return tasks, notes


def _check_metric(name: str, metric: str | None, task: Any) -> None:
    """Refuse a metric that the task does not have, before anything is scored."""
    own = [spec["metric"] for spec in task.config.metric_list or ()]
    if metric is None or any(callable(one) for one in own):  # a function's metrics are known once it was called
        return
    filters = [spec["name"] for spec in task.config.filter_list or ()] or ["none"]
    choose(
        f"suite.benchmarks.{name}.metric", metric, [benchmark_name(one, {"filter": f}) for one in own for f in filters]
    )


def harness_tasks() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).parent


def _overrides(known: dict[str, Any], settings: BenchmarkConfig) -> dict[str, Any]:
    """What a suite's settings change in a task file."""
    changed: dict[str, Any] = {}
    if settings.shots is not None:
        changed["num_fewshot"] = settings.shots
    generation: dict[str, Any] = {}
    if settings.temperature:
        generation = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        changed["repeats"] = settings.samples
    if settings.max_new_tokens is not None:
        generation["max_gen_toks"] = settings.max_new_tokens
    if generation:
        changed["generation_kwargs"] = {**known["generation_kwargs"], **generation}
    if settings.pass_at:
        from hft_cli.evaluation.sandbox import pass_at_k

        metric = {"metric": pass_at_k, "aggregation": "mean", "higher_is_better": True, "k": list(settings.pass_at)}
        changed["metric_list"] = [metric]
    return changed


def _local(
    name: str,
    specs: Sequence[dict[str, Any]],
    known: dict[str, dict[str, Any]],
    pattern: str,
    settings: BenchmarkConfig,
    data_dir: Path,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The specs of those tasks that local files have rows for, with these rows, and which tasks have none."""
    from datasets import Dataset, DatasetDict

    before, _, after = pattern.partition("*")
    there = set(parts(name, data_dir))
    found, missing = [], []
    for spec in specs:
        task = known[spec["task"]]
        part = spec["task"].removeprefix(before).removesuffix(after) if "*" in pattern else ""
        shots = spec.get("num_fewshot", task.get("num_fewshot") or 0)
        split = task.get("fewshot_split") or task.get("training_split")
        written = (task.get("fewshot_config") or {}).get("samples")  # the examples are in the task file
        # The harness draws one more where it cannot tell that the item itself is not among them.
        needed = 0 if written or not shots else shots + ("fewshot_split" not in task)
        rows = splits(name, part, data_dir, needed) if part in there else {}
        if not rows:
            missing.append(spec["task"])
            continue
        if needed and (split is None or len(rows.get(split, ())) < needed):
            raise UserError(
                f"{name}: suite.data_dir has not the {needed} examples that {spec['task']} draws from. Put their file "
                f"there, or set suite.benchmarks.{name}.shots=0."
            )
        absent = {key: None for key in ("training_split", "fewshot_split") if task.get(key) not in {None, *rows}}
        data = DatasetDict({split: Dataset.from_list(own_rows) for split, own_rows in rows.items()})
        found.append({**spec, **absent, "custom_dataset": lambda data=data, **_: data})
    if not found:
        raise UserError(
            f"{name}: the files in suite.data_dir have too few rows for {settings.shots or 'their'} examples and a "
            f"question. Set suite.benchmarks.{name}.shots=0, or leave it out (suite.only=[…])."
        )
    return found, {"tasks_without_rows": missing}


@contextmanager
def _own_code_runner() -> Iterator[None]:
    """While task files load: HumanEval's gets our limits around programs, and not a runner fetched from the hub."""
    import evaluate

    from hft_cli.evaluation.sandbox import CodeEval

    stock = evaluate.load

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if name == "code_eval" else stock(name, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = stock


def benchmark_name(metric: str, record: Mapping[str, Any]) -> str:
    return metric if record["filter"] == "none" else f"{metric},{record['filter']}"
