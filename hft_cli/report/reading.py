"""Folders -> runs for the report. Nothing is written.

A run that is unfinished, broken, unverified or was never started is a run here too, with its status and a note.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hft_cli.config.settings import WITHOUT_TRAINING
from hft_cli.errors import UserError
from hft_cli.evaluation.score_files import conditions
from hft_cli.files import finite, read_json
from hft_cli.method.selection import UNDRAWN
from hft_cli.report.runs import ANCHORS, Conditions, Draw, Run, RunRow, Scores, TaskScores, start_of
from hft_cli.report.setting import setting_of
from hft_cli.run_dir import RunDir
from hft_cli.runner.sweeps import jobs
from hft_cli.text import is_loss, natural_order


def find_runs(places: Iterable[Path]) -> list[Run]:
    """Every run in the places or below them, each once, and the runs that their sweeps should have but have not.

    Raises:
        UserError: a place has no run.
    """
    runs: dict[Path, Run] = {}
    for place in places:
        plans = sorted(place.glob("**/plan.json"), key=lambda path: natural_order(str(path)))
        if not plans:
            raise UserError(f"There is no run in {place}: no plan.json in it or below it.")
        for plan in plans:
            if plan.parent.resolve() not in runs:
                runs[plan.parent.resolve()] = read_run(RunDir(plan.parent))
        for sweep in sorted(place.glob("**/multirun.yaml")):
            for folder, overrides in jobs(sweep):
                if folder.resolve() not in runs:
                    note = f"the sweep has not started this run: {' '.join(overrides)}"
                    runs[folder.resolve()] = Run(RunRow(str(folder), "missing", note=note), folder)
    return list(runs.values())


def read_run(run: RunDir) -> Run:
    """A run with its status, whatever state it is in."""
    if not run.results.exists():
        return Run(RunRow(str(run.folder), "unfinished", note=_progress(run)), run.folder)
    try:
        return _read_results(run, read_json(run.results))
    except BROKEN as error:  # one run's broken file must not take the others' table away
        return Run(
            RunRow(str(run.folder), "results.json is broken", note=_reason(error)), run.folder, broken=("results",)
        )


BROKEN = (UserError, KeyError, TypeError, ValueError, AttributeError, StopIteration, OSError)  # of a file's content


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _relative_to_base(scores: Scores, start: str) -> dict[str, tuple[float, float]]:
    """The scores of the model that a run is compared with, and those after the run."""
    pairs = {}
    for task, pair in scores.items():
        before, after = pair.get(start), pair["after"]
        if before is not None and after is not None:
            pairs[task] = (before, after)
    return pairs


def _learned(pair: tuple[float, float], metric: str) -> float:
    before, after = pair
    return before - after if is_loss(metric) else after - before


def _kept(pair: tuple[float, float], metric: str) -> float | None:
    """The share of a score that is left; None if there was nothing."""
    whole, left = reversed(pair) if is_loss(metric) else pair
    return left / whole if whole > 0 else None


def _items(after: Mapping[str, Any]) -> int:
    scored = (scores for suite, tasks in after.items() if suite != "data" for scores in tasks.values())
    return sum(int(scores.get("items") or 0) for scores in scored)


def _basis(run: RunDir, scores: Scores, stage: str) -> tuple[str, ...]:
    """The hash of the base's weights, and the tasks of the suites."""
    try:
        plan = read_json(run.plan)
        weights = plan["rounds"][0]["data_sha256"] if stage in WITHOUT_TRAINING else plan["base_sha256"]
    except (UserError, KeyError, IndexError, TypeError):
        weights = ""
    return (str(weights), *sorted(task for task in scores if not task.startswith("data/")))


def _anchor(record: Mapping[str, Any]) -> str:
    parts = [
        ANCHORS.get(str(record.get("name"))),
        "MoFO" if record.get("momentum_filter") is not None else None,
        "WiSE-FT" if record.get("alpha") is not None else None,
    ]
    return " + ".join(filter(None, parts))


def _progress(run: RunDir) -> str:
    """How many rounds of an unfinished run are trained, and the last error in its newest log."""
    try:
        planned = len(read_json(run.plan)["rounds"])
    except (UserError, KeyError, TypeError):
        return "plan.json is broken"
    note = f"{len(list(run.folder.glob('rounds/*/outcome.json')))} of {planned} rounds trained"
    logs = sorted(run.folder.glob("rounds/*/worker.log")) + sorted(run.folder.glob("eval/*/worker.log"))
    if logs:
        newest = max(logs, key=lambda path: path.stat().st_mtime)
        lines = newest.read_text(encoding="utf-8", errors="replace")[-20_000:].splitlines()
        errors = [line.strip() for line in lines if re.match(r"\s*(\[rank\d+\]:)?\s*[\w.]*(Error|Exception)\b", line)]
        note += f"; {errors[-1][:200]}" if errors else ""
    return note


def _read_results(run: RunDir, results: dict[str, Any]) -> Run:
    scores, metrics, counts = _trained_scores(results["eval"])
    relative = _relative_to_base(scores, start_of(str(results["method"])))
    later = _later_scores(run, scores)
    rounds, selection = results["rounds"], results["selection"]
    sequence = results.get("continual") or {}
    tasks = _task_scores(sequence) if "R" in sequence else None
    method, strategy = str(results["method"]), str(sequence.get("name", "seqft"))
    if strategy == "lora":  # as earlier versions wrote it
        method, strategy = "lora", "seqft"
    level, ratio = str(selection["level"]), finite(selection["ratio"])
    status, note = _status(run, results["verification"])
    draws, draws_note = _draws(run)
    losses, losses_note = _losses(run)
    row = RunRow(
        run=str(run.folder),
        status=status,
        method=method,
        selection=level if level in UNDRAWN else f"{level} {ratio:g}",
        learning_rate=_finite_or_none(results["learning_rate"]),
        seed=results["seed"],
        draw_seed=selection["seed"],
        updated=_mean({entry["round"]: finite(entry["updated_fraction"]) for entry in rounds}.values()),
        skill=_mean(_learned(pair, metrics[task]) for task, pair in relative.items() if task.startswith("data/")),
        retained=_mean(_kept(pair, metrics[task]) for task, pair in relative.items() if not task.startswith("data/")),
        train_seconds=sum(finite(entry["train_seconds"]) for entry in rounds),
        peak_memory_bytes=max((int(entry.get("peak_memory_bytes") or 0) for entry in rounds), default=0) or None,
        op=_finite_or_none(sequence.get("OP")),
        bwt=_finite_or_none(sequence.get("BWT")),
        continual=strategy if tasks or strategy == "mixed_replay" else "",
        anchor=_anchor(results.get("anchor") or {}),
        level=level,
        ratio=1.0 if level == "all" else ratio,
        tokens_per_second=_speed(rounds),
        note="; ".join(filter(None, (note, draws_note, losses_note, *later.broken.values()))),
        scores=scores | later.scores,
    )
    return Run(
        row=row,
        folder=run.folder,
        stages=_stages(run, str(results["stage"])),
        metrics=metrics | later.metrics,
        records=later.records,
        conditions=counts | later.conditions,
        broken=tuple(later.broken),
        tasks=tasks,
        draws=draws,
        setting=setting_of(run, row, results),
        hardware=_hardware(run),
        items=_items(results["eval"]["after"]),
        losses=losses,
        basis=_basis(run, scores, str(results["stage"])),
    )


def _losses(run: RunDir) -> tuple[tuple[tuple[int, float], ...], str]:
    """The losses in metrics.jsonl, and a note if it cannot be read. Of entries for one step the last one holds."""
    by_phase: dict[str, dict[int, float]] = {}
    try:
        for line in run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.exists() else ():
            entry = json.loads(line)
            if "loss" in entry:
                by_phase.setdefault(entry["name"], {})[int(entry["step"])] = finite(entry["loss"])
    except (KeyError, TypeError, ValueError, OSError):
        return (), "metrics.jsonl is broken"
    losses: list[tuple[int, float]] = []
    for phase in by_phase.values():
        before = losses[-1][0] if losses else 0
        losses += [(before + step, phase[step]) for step in sorted(phase)]
    return tuple(losses), ""


def _finite_or_none(value: Any) -> float | None:
    return None if value is None else finite(value)


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def _status(run: RunDir, verification: Mapping[str, Any]) -> tuple[str, str]:
    """Status and note of a run with results.json."""
    if verification["passed"] is not False and not run.done.exists():
        return "unfinished", "results.json is there, but not DONE"
    status = {True: "verified", False: "failed", None: "no model written"}[verification["passed"]]
    return status, "; ".join(str(fault) for fault in verification.get("faults", ()))[:300]


def _speed(rounds: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens a second over all rounds that were measured."""
    timed = [(finite(entry["tokens_per_second"]), finite(entry["train_seconds"])) for entry in rounds
             if "tokens_per_second" in entry and entry["train_seconds"] > 0]  # fmt: skip
    return sum(speed * seconds for speed, seconds in timed) / sum(seconds for _, seconds in timed) if timed else None


def _trained_scores(evaluation: Mapping[str, Any]) -> tuple[Scores, dict[str, str], Conditions]:
    """The scores that training took, each task's metric, and how many items were scored.

    The suite `data` holds the test sets of what was trained. A task's main metric is its first entry; its error and
    counts follow.
    """
    scores: Scores = {}
    metrics: dict[str, str] = {}
    counts: Conditions = {}
    for suite, tasks in evaluation.get("before", {}).items():
        for task, before in tasks.items():
            by_model = {"before": before, "after": evaluation["after"][suite][task]}
            if base := evaluation.get("base", {}).get(suite, {}).get(task):
                by_model["base"] = base
            name, metric = f"{suite}/{task}", next(iter(by_model["after"]))
            scores[name] = {when: finite(measured[metric]) for when, measured in by_model.items()}
            metrics[name] = str(metric)
            counts[name] = {when: {"items": measured.get("items")} for when, measured in by_model.items()}
    return scores, metrics, counts


@dataclass(frozen=True)
class _LaterScores:
    """The fields of Run that `hft eval` gives; `broken` has the reason for each suite whose file cannot be read."""

    scores: Scores = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[str, Path]] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def _later_scores(run: RunDir, trained: Scores) -> _LaterScores:
    """The scores of later `hft eval` commands, without tasks in `trained`.

    They are no part of `retained`, so that it is about the same tasks in every run of a sweep.
    """
    later = _LaterScores()
    for file in sorted(run.folder.glob("eval/*.json")):
        try:
            suite = _scores_of_suite(run, read_json(file), trained)
        except BROKEN as error:  # the scores of training are good all the same
            later.broken[file.stem] = f"eval/{file.name} is broken ({_reason(error)})"
            continue
        for name in ("scores", "metrics", "records", "conditions"):
            getattr(later, name).update(getattr(suite, name))
    return later


def _scores_of_suite(run: RunDir, evaluation: Mapping[str, Any], trained: Scores) -> _LaterScores:
    found, suite = _LaterScores(), str(evaluation["suite"])
    for when, model in evaluation["models"].items():
        for name, measured in model["eval"][suite].items():
            task, metric, details = f"{suite}/{name}", next(iter(measured)), model["details"][name]
            if task in trained:
                continue
            found.metrics[task] = str(metric)
            found.scores.setdefault(task, {"before": None, "after": None})[when] = finite(measured[metric])
            found.records.setdefault(task, {})[when] = run.folder / "eval" / details["items"]
            of_model = {f"model.{key}": value for key, value in details.get("model", {}).items()}
            found.conditions.setdefault(task, {})[when] = {
                "metric": metric, "items": measured.get("items"), **conditions(details), **of_model,
            }  # fmt: skip
    return found


def _task_scores(sequence: Mapping[str, Any]) -> TaskScores:
    names = tuple(str(name) for name in sequence["tasks"])
    scores = tuple(tuple(_finite_or_none(value) for value in row) for row in sequence["R"])
    if len(scores) != len(names) or any(len(row) != len(names) for row in scores):
        raise ValueError("R does not have a row and a column for each task")
    metrics = sequence.get("metrics") or [sequence.get("metric", "")] * len(names)
    return TaskScores(names, tuple(str(metric) for metric in metrics), scores)


def _draws(run: RunDir) -> tuple[tuple[Draw, ...], str]:
    """The ledger's draw of each round (a replay shares that of its round), and a note if it cannot be read."""
    try:
        entries = TypeAdapter(list[Draw]).validate_python(read_json(run.draws)["rounds"])
    except (UserError, KeyError, TypeError, ValidationError):
        return (), "draws.json is missing or broken"
    draws = {draw.round: draw for draw in reversed(entries)}
    return tuple(draws[number] for number in sorted(draws)), ""


def _stages(run: RunDir, first: str) -> tuple[str, ...]:
    try:
        return tuple(str(entry["stage"]) for entry in read_json(run.plan)["rounds"])
    except (UserError, KeyError, TypeError):
        return (first,)


def _hardware(run: RunDir) -> str:
    try:
        environment = read_json(run.environment)
        gpus = [str(gpu).split(",")[0] for gpu in environment["gpus"]]
        return ", ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus)) or f"{environment['cpus']} CPUs"
    except (UserError, KeyError, TypeError):
        return ""
