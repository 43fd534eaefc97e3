"""Folders -> runs, read for the report: what each did, scored and cost, and what is wrong with it. Writes nothing.

A run that is unfinished, broken, unverified or was never begun is a run here too, with its status and a note.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.run_dir import RunDir
from hft_cli.runner.sweeps import jobs
from hft_cli.text import natural_order

COUNTED = ("verified", "no model written")  # statuses of runs that means are taken over

Matrix = tuple[tuple[float | None, ...], ...]

Scores = dict[str, dict[str, float | None]]  # SUITE/TASK -> before, after; None where it was not scored

# Keys of config.yaml in which runs of one setting may differ.
FREE = (
    "seed",
    "selection.seed",
    "output_dir",
    "resume",
    "train.save_every",
    "train.save_minutes",
    "train.save_limit",
    "train.log_every",
)


@dataclass(frozen=True)
class RunRow:
    """One run in a table. Shares are in [0, 1]; `skill` and `retained` are means over the tasks, None if not scored."""

    run: str
    status: str  # verified, failed, no model written, unfinished, results.json is broken or missing
    method: str = ""
    selection: str = ""
    learning_rate: float | None = None
    seed: int | None = None
    draw_seed: int | None = None  # where it is not the seed
    updated: float | None = None
    skill: float | None = None
    retained: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    op: float | None = None  # of a sequence of tasks: overall performance and backward transfer
    bwt: float | None = None
    continual: str = ""  # seqft, replay, gem or lora, where there are rounds
    level: str = ""
    ratio: float | None = None  # asked for
    tokens_per_second: float | None = None
    note: str = ""  # what is wrong
    scores: Scores = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method as it is called in tables and figures."""
        name = "LoRA" if self.continual == "lora" else self.method.upper().replace("_", "-")
        name = {"HALF-RESET": "Half-Reset"}.get(name, name)
        return f"{name} + {self.continual}" if self.continual in ("replay", "gem") else name


@dataclass(frozen=True)
class Tasks:
    """A sequence: `scores[i][j]` is that of task j after round i, None where it was not scored."""

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: Matrix


@dataclass(frozen=True)
class Drawn:
    """What one round updated and froze, by parameter names."""

    round: int
    name: str
    level: str
    updated: frozenset[str]
    frozen: frozenset[str]


@dataclass(frozen=True)
class Run:
    """A run with all that the report needs of it. `setting`: its flat configuration without seeds and places."""

    row: RunRow
    folder: Path
    stages: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)  # SUITE/TASK -> the task's own metric
    records: Mapping[str, dict[str, Path]] = field(default_factory=dict)  # the same -> files of items before, after
    tasks: Tasks | None = None
    draws: tuple[Drawn, ...] = ()
    setting: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""

    @property
    def counted(self) -> bool:
        return self.row.status in COUNTED

    @property
    def draw_seed(self) -> int | None:
        return self.row.seed if self.row.draw_seed is None else self.row.draw_seed

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """Equal for runs that differ in nothing but their seeds."""
        return tuple(sorted(self.setting.items()))

    def without(self, *prefixes: str) -> tuple[tuple[str, str], ...]:
        """The setting's key, less what begins with one of the prefixes."""
        return tuple(item for item in self.key if not item[0].startswith(prefixes))


def find_runs(places: Iterable[Path]) -> list[Run]:
    """Every run in the places or below them, once each, and those that a sweep was to have but has not.

    Raises:
        UserError: if there is no run at a place.
    """
    found: dict[Path, Run] = {}
    for place in places:
        plans = sorted(place.glob("**/plan.json"), key=lambda path: natural_order(str(path)))
        if not plans:
            raise UserError(f"There is no run in {place}: no plan.json in it or below it.")
        for plan in plans:
            if plan.parent.resolve() not in found:
                found[plan.parent.resolve()] = read_run(RunDir(plan.parent))
        for sweep in sorted(place.glob("**/multirun.yaml")):
            for folder, typed in jobs(sweep):
                if folder.resolve() not in found:
                    row = RunRow(run=str(folder), status="missing", note=f"the sweep was to have: {' '.join(typed)}")
                    found[folder.resolve()] = Run(row, folder)
    return list(found.values())


def read_run(run: RunDir) -> Run:
    """A run with its status, whatever state it is in."""
    if not run.results.exists():
        return Run(RunRow(run=str(run.folder), status="unfinished", note=_progress(run)), run.folder)
    try:
        return _read(run, read_json(run.results))
    # one run's broken file does not take the others' table away
    except (UserError, KeyError, TypeError, ValueError, AttributeError, StopIteration, OSError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        return Run(RunRow(run=str(run.folder), status="results.json is broken", note=reason), run.folder)


def _progress(run: RunDir) -> str:
    """How far an unfinished run came, and the last error in the log of the round that it was at."""
    try:
        planned = len(read_json(run.plan)["rounds"])
    except (UserError, KeyError, TypeError):
        return "plan.json is broken"
    done = len(list(run.folder.glob("rounds/*/outcome.json")))
    note = f"{done} of {planned} rounds trained"
    logs = sorted(run.folder.glob("rounds/*/worker.log")) + sorted(run.folder.glob("eval/*/worker.log"))
    if logs:
        last = max(logs, key=lambda path: path.stat().st_mtime)
        lines = last.read_text(errors="replace")[-20_000:].splitlines()
        errors = [line.strip() for line in lines if re.match(r"\s*(\[rank\d+\]:)?\s*[\w.]*(Error|Exception)\b", line)]
        note += f"; {errors[-1][:200]}" if errors else ""
    return note


def _read(run: RunDir, results: dict[str, Any]) -> Run:
    scores, metrics = _scores(results["eval"])
    skill = _mean(_after(pair) for task, pair in scores.items() if task.startswith("data/"))
    retained = _mean(_after(pair) for task, pair in scores.items() if not task.startswith("data/"))
    later, records = _evals(run, scores, metrics)
    rounds, selection = results["rounds"], results["selection"]
    passed = results["verification"]["passed"]
    status = {True: "verified", False: "failed", None: "no model written"}[passed]
    note = "; ".join(str(fault) for fault in results["verification"].get("faults", ()))[:300]
    if passed is not False and not run.done.exists():
        status, note = "unfinished", "results.json is there, but not DONE"
    sequence = results.get("continual") or {}
    seconds = [number(entry["train_seconds"]) for entry in rounds]
    speeds = [(number(entry["tokens_per_second"]), s) for entry, s in zip(rounds, seconds, strict=True)
              if "tokens_per_second" in entry and s > 0]  # fmt: skip
    tasks = _tasks(sequence) if "R" in sequence else None
    level, ratio = str(selection["level"]), number(selection["ratio"])
    draws, problem = _draws(run)
    row = RunRow(
        run=str(run.folder),
        status=status,
        method=str(results["method"]),
        selection=level if level == "all" else f"{level} {ratio:g}",
        learning_rate=_maybe(results["learning_rate"]),
        seed=results["seed"],
        draw_seed=selection["seed"],
        updated=_mean({entry["round"]: number(entry["updated_fraction"]) for entry in rounds}.values()),
        skill=skill,
        retained=retained,
        train_seconds=sum(seconds),
        peak_memory_bytes=max((int(entry.get("peak_memory_bytes") or 0) for entry in rounds), default=0) or None,
        op=_maybe(sequence.get("OP")),
        bwt=_maybe(sequence.get("BWT")),
        continual=str(sequence.get("name", "seqft")) if tasks or sequence.get("name") == "lora" else "",
        level=level,
        ratio=1.0 if level == "all" else ratio,
        tokens_per_second=sum(v * s for v, s in speeds) / sum(s for _, s in speeds) if speeds else None,
        note="; ".join(part for part in (note, problem) if part),
        scores=scores | later,
    )
    return Run(
        row=row,
        folder=run.folder,
        stages=_stages(run, str(results["stage"])),
        metrics=metrics,
        records=records,
        tasks=tasks,
        draws=draws,
        setting=_setting(run, row, results),
        hardware=_hardware(run),
    )


def number(value: Any) -> float:
    """A finite number.

    Raises:
        TypeError, ValueError: if it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"a score or measure is {value}")
    return value


def _maybe(value: Any) -> float | None:
    return None if value is None else number(value)


def _scores(evaluation: Mapping[str, Any]) -> tuple[Scores, dict[str, str]]:
    """SUITE/TASK -> the task's own metric before and after, and its name; `data` is the suite of what was trained.

    A task's own metric is the first; what follows is its error and counts.
    """
    scores: Scores = {}
    metrics: dict[str, str] = {}
    for suite, tasks in evaluation.get("before", {}).items():
        for task, measured in tasks.items():
            after = evaluation["after"][suite][task]
            metric = next(iter(after))
            scores[f"{suite}/{task}"] = {"before": number(measured[metric]), "after": number(after[metric])}
            metrics[f"{suite}/{task}"] = str(metric)
    return scores, metrics


def _after(pair: Mapping[str, float | None]) -> float:
    return number(pair["after"])


def _evals(run: RunDir, known: Scores, metrics: dict[str, str]) -> tuple[Scores, dict[str, dict[str, Path]]]:
    """What `hft eval` scored of the run later and is not `known`, with the files of items; its metrics go to `metrics`.

    Not part of `retained`, which is to be of the same tasks in all runs of a sweep.
    """
    scores: Scores = {}
    records: dict[str, dict[str, Path]] = {}
    for file in sorted(run.folder.glob("eval/*.json")):
        made = read_json(file)
        suite, models = str(made["suite"]), made["models"]
        for when in ("before", "after"):
            one = models.get(when)
            for name, measured in (one["eval"][suite] if one else {}).items():
                task = f"{suite}/{name}"
                if task in known:
                    continue
                metric = next(iter(measured))
                metrics[task] = str(metric)
                scores.setdefault(task, {"before": None, "after": None})[when] = number(measured[metric])
                records.setdefault(task, {})[when] = run.folder / "eval" / one["details"][name]["items"]
    return scores, records


def _tasks(sequence: Mapping[str, Any]) -> Tasks:
    names = tuple(str(name) for name in sequence["tasks"])
    scores = tuple(tuple(_maybe(value) for value in row) for row in sequence["R"])
    if len(scores) != len(names) or any(len(row) != len(names) for row in scores):
        raise ValueError("R has not a row and a column for each task")
    metrics = sequence.get("metrics") or [sequence.get("metric", "")] * len(names)
    return Tasks(names, tuple(str(metric) for metric in metrics), scores)


def _draws(run: RunDir) -> tuple[tuple[Drawn, ...], str]:
    """The ledger, a draw for each round (a replay shares its round's), and what is wrong with it."""
    try:
        entries = read_json(run.draws)["rounds"]
        drawn = {
            int(entry["round"]): Drawn(
                round=int(entry["round"]),
                name=str(entry["name"]),
                level=str(entry["level"]),
                updated=frozenset(entry["updated"]),
                frozen=frozenset(entry["frozen"]),
            )
            for entry in reversed(entries)
        }
    except (UserError, KeyError, TypeError, ValueError):
        return (), "draws.json is missing or broken"
    return tuple(drawn[number] for number in sorted(drawn)), ""


def _stages(run: RunDir, first: str) -> tuple[str, ...]:
    try:
        return tuple(str(entry["stage"]) for entry in read_json(run.plan)["rounds"])
    except (UserError, KeyError, TypeError):
        return (first,)


def _setting(run: RunDir, row: RunRow, results: Mapping[str, Any]) -> dict[str, str]:
    """What the run was set to, as text by key, without what only seeds or places it, and without what had no say in it
    (the keys of a selection where all is updated, of replay without replay).
    """
    flat = {
        "method.name": row.method, "selection.level": row.level, "selection.ratio": f"{row.ratio:g}",
        "train.learning_rate": f"{row.learning_rate}", "model.name": str(results.get("model")),
        "data.name": str(results.get("data")), "continual.name": row.continual,
    }  # fmt: skip
    if (values := _yaml(run.config)) is not None:
        flat = dict(_flat(values)) | flat
    idle = [r"continual\.score_unseen$"]
    idle += [rf"continual\.{name}_" for name in ("replay", "gem", "lora") if name != row.continual]
    idle += [r"selection\.(ratio|balance|redraw)$"] if row.level == "all" else []
    idle += [r"train\."] if row.method == "half_reset" else []
    idle += [r"dpo\."] if "dpo" not in flat.get("method.stages", "") else []
    return {k: v for k, v in flat.items() if k not in FREE and not any(re.match(pattern, k) for pattern in idle)}


def _yaml(path: Path) -> dict[str, Any] | None:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    try:
        values = yaml.load(path.read_text(), loader)
    except (OSError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _hardware(run: RunDir) -> str:
    """What the run was made on: GPUs, or the number of CPUs."""
    try:
        made = read_json(run.environment)
        gpus = [str(gpu).split(",")[0] for gpu in made["gpus"]]
        return ", ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus)) or f"{made['cpus']} CPUs"
    except (UserError, KeyError, TypeError):
        return ""


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def item_scores(run: Run, task: str) -> tuple[list[float], list[float]] | None:
    """What each item of SUITE/TASK scored before and after, the items of both only; None without such records."""
    metric = run.metrics[task]
    if kept := run.records.get(task):
        return _both(_records(kept[when], metric) if when in kept else None for when in ("before", "after"))
    last = [run.folder / "eval" / "after", *sorted(run.folder.glob("eval/round-*"), reverse=True)]
    after = next((folder for folder in last if folder.is_dir()), None)
    if after is None:
        return None
    return _both(_records(folder / f"{task}.jsonl", metric) for folder in (run.folder / "eval" / "before", after))


def _both(found: Iterable[dict[Any, float] | None]) -> tuple[list[float], list[float]] | None:
    before, after = found
    if before is None or after is None:
        return None
    rows = [row for row in before if row in after]
    return ([before[row] for row in rows], [after[row] for row in rows]) if rows else None


def _records(path: Path, metric: str) -> dict[Any, float] | None:
    """Row -> its score. None if there is no such file, or a line of it is not what it should be."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line.get("row", i): number(line[metric]) for i, line in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
