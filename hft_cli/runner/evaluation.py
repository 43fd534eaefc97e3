"""`hft eval`: score the models of a run, or any model."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.checkpoint.model_config import check_companions, read_model_config
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import EvalConfig, ModelConfig, RunConfig, read_config
from hft_cli.config.settings import AUTO
from hft_cli.config.validate import check_eval
from hft_cli.data.model_template import check_thinking, dated
from hft_cli.errors import UserError
from hft_cli.evaluation.rescoring import compare_scorings
from hft_cli.evaluation.score_files import conditions, notes_on, read_scores
from hft_cli.evaluation.scorer import ScoredModel, WorkerOptions, score
from hft_cli.evaluation.suite import Suite, read_suite, uses_chat_template
from hft_cli.files import read_json, read_record, write_json
from hft_cli.launch.environment import gpus
from hft_cli.launch.lifetime import hold_lock
from hft_cli.paths import expanded, resolve_path
from hft_cli.plan.automatic import this_machine, with_dtype
from hft_cli.plan.preflight import check_device
from hft_cli.run_dir import PlanRecord, RoundDir, RunDir, finished
from hft_cli.runner.base import find_base
from hft_cli.runner.tracking import log_scores, require_tracker
from hft_cli.text import format_score, is_share, plural, text_table

Record = dict[str, Any]  # of one model in the file of results: path, weights_sha256, eval, details


def run_eval(config: EvalConfig) -> Path:
    """Do what `hft eval` is asked for and return the file of results. Finished benchmarks are skipped.

    The file keeps the results of earlier commands on the same weights.

    Raises:
        UserError: for a mistake in the config, the run or the files, before anything is scored.
        subprocess.CalledProcessError: if a worker fails. Its log is named on stderr.
    """
    check_eval(config)
    require_tracker(config.tracking)
    if config.model.dtype == AUTO:
        config = replace(config, model=with_dtype(config.model, this_machine()))
    ranks = config.engine.num_processes or len(gpus()) or 1
    suite = _read_suite(config)
    models = _models(config)
    for model in models.values():
        params = parameters_from_folder(model.path, model.config.kinds, model.config.part)
        check_device(replace(config.engine, num_processes=ranks), gpus(), sum(param.elements for param in params))
    folder = expanded(config.run or config.output_dir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config.suite.name}.json"
    workers = WorkerOptions(ranks)
    with hold_lock(folder / ".lock"):
        records: dict[str, Record] = read_json(file)["models"] if file.exists() else {}
        _refuse_another_model(config, records, models)
        for when, model in models.items():
            paths = score(suite, model, RoundDir(folder / when), keyed=True, workers=workers)
            files = paths[config.suite.name]
            record = _record(suite, model, files, folder)
            if config.again:
                record["again"] = _score_again(suite, model, files, folder / f"{when}.again", workers)
            records[when] = _merge(records.get(when, {}), record)
        write_json(file, {"suite": config.suite.name, "left_out": suite.left_out, "models": records})
    for when in models:
        record = records[when]
        name = f"{when} {config.suite.name}"
        log_scores(config.tracking, folder.parent, name, record["eval"], {"path": record["path"]})
    return file


def _score_again(
    suite: Suite, model: ScoredModel, first: dict[str, Path], folder: Path, workers: WorkerOptions
) -> dict[str, dict[str, Any]]:
    """Score a model anew, and compare with the files of its first scores. The new files are removed at the end."""
    files = score(suite, replace(model, shared=False), RoundDir(folder), workers=workers)[suite.config.name]
    compared = {name: asdict(compare_scorings(first[name], file)) for name, file in files.items()}
    shutil.rmtree(folder)
    return compared


def _refuse_another_model(config: EvalConfig, records: dict[str, Record], models: dict[str, ScoredModel]) -> None:
    """Raise UserError if the scores of another model would be overwritten: a/model and b/model have one name."""
    for name, model in models.items():
        old = records.get(name, {})
        if config.run is None and old and old["path"] != str(model.path) and old["weights_sha256"] != model.weights:
            raise UserError(
                f"{config.output_dir} has the scores of {old['path']}, which those of {model.path} would replace. Give "
                "another folder: output_dir=…"
            )


def _error_text(metric: str, value: float, error: float) -> str:
    """A standard error, in the unit of its score."""
    return f"±{100 * error:.1f}" if is_share(metric, value) else f"±{error:.2g}"


def _read_suite(config: EvalConfig) -> Suite:
    """The suite with its files; UserError if it has nothing to score."""
    suite = read_suite(config.suite)
    if not suite.hashes:
        reason = f": {'; '.join(suite.left_out)}" if suite.left_out else ""
        raise UserError(
            f"suite={config.suite.name} has nothing to score{reason}. Use suite=general, knowledge, quick, probe or "
            "pocket, or suite=harness suite.harness=[TASK,…]."
        )
    return suite


def _models(config: EvalConfig) -> dict[str, ScoredModel]:
    """The models to score, by the name of their folder of results: those of a run, or one model."""
    if config.run is None:
        path = model_folder(resolve_path(config.model.path), revision=config.model.revision)
        read_model_config(path / "config.json", config.model.part)
        check_companions(path)
        models = {"model": ScoredModel(path, config.model, weights_hash(path))}
    else:
        models = _models_of_run(config, config.run)
    for model in models.values():
        check_thinking(model.config, model.path)
        uses_chat_template(config.suite, model.config, model.path)  # raises if the template is needed and missing
    return {name: replace(model, config=dated(model.config, model.path)) for name, model in models.items()}


def _models_of_run(config: EvalConfig, folder: str) -> dict[str, ScoredModel]:
    run = finished(folder)
    of_run = read_config(run)
    settings: ModelConfig = replace(config.model, name=of_run.model.name)
    if "after" in config.models and not run.model.is_dir():
        raise UserError(f"The run in {folder} has no model (method.save_model=false?). Use models=[before].")
    models = {}
    for when in config.models:
        if when == "before":
            path = find_base(run, fix="Restore it, or use models=[after].")
            models[when] = ScoredModel(path, settings, read_record(run.plan, PlanRecord)["base_sha256"], shared=True)
        elif when == "base":
            models[when] = _base_of_blend(of_run, run, settings)
        else:
            models[when] = ScoredModel(run.model, settings, weights_hash(run.model))
    return models


def _base_of_blend(config: RunConfig, run: RunDir, settings: ModelConfig) -> ScoredModel:
    """The model to which a Half-Reset or an interpolation puts its tuned model back."""
    if config.method.trains:
        raise UserError(
            f"models=[base] is for a Half-Reset or an interpolation. {run.folder} began with models=[before]."
        )
    path = model_folder(resolve_path(str(config.model.base)), "model.base")
    weights = weights_hash(path)
    if weights != read_record(run.plan, PlanRecord)["rounds"][0]["data_sha256"]:
        raise UserError(f"model.base={config.model.base} is not the base of {run.folder} any more. Restore it.")
    return ScoredModel(path, settings, weights, shared=True)


def _record(suite: Suite, model: ScoredModel, files: dict[str, Path], folder: Path) -> Record:
    """The scores of a model on a suite. Files are named relative to `folder`."""
    scores, details = {}, {}
    for name, file in files.items():
        scores[name], settings = read_scores(file)
        items = file.with_suffix(".jsonl")
        details[name] = {
            **settings,
            "rows_sha256": suite.hashes[name],
            "model": _settings(model.config),
            "file": str(file.relative_to(folder)),
            "items": str(items.relative_to(folder)),
        }
    return {
        "path": str(model.path),
        "weights_sha256": model.weights,
        "eval": {suite.config.name: scores},
        "details": details,
        "again": {},
    }


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of a model that its scores depend on."""
    return {key: getattr(config, key) for key in ("dtype", "attention", "chat_template", "thinking", "date")}


def _merge(old: Record, new: Record) -> Record:
    """The new record, with the old one's other benchmarks if the weights are the same."""
    if old.get("weights_sha256") != new["weights_sha256"]:
        return new
    scores = {suite: {**old["eval"][suite], **tasks} for suite, tasks in new["eval"].items()}
    details = {**old["details"], **new["details"]}
    again = old.get("again", {})
    again = {name: again[name] for name in again if details[name]["file"] == old["details"][name]["file"]}
    return {**new, "eval": scores, "details": details, "again": {**again, **new["again"]}}


def _differences(models: dict[str, Record]) -> list[str]:
    """Lines on scores of one table that were computed in different ways, and cannot be compared."""
    values: dict[tuple[str, str], dict[str, list[str]]] = {}  # (setting, benchmark or "") -> value -> rows
    for model, record in models.items():
        for name, details in record["details"].items():
            row = f"{model} {name}"
            of_model = {(key, ""): value for key, value in details.get("model", {}).items()}
            of_benchmark = {(key, name): value for key, value in conditions(details).items()}
            for key, value in {**of_model, **of_benchmark}.items():
                values.setdefault(key, {}).setdefault(json.dumps(value, sort_keys=True), []).append(row)
    lines = []
    for (setting, name), rows in values.items():
        if len(rows) > 1:
            shown = "" if setting in ("settings", "rows_sha256") else ": {}"  # these are long
            ways = "; ".join(", ".join(each) + shown.format(value) for value, each in rows.items())
            lines.append(
                f"not comparable, with different {f'{name} ' if name else ''}{setting.removesuffix('_sha256')}: {ways}"
            )
    return lines


def _again_line(name: str, scores: dict[str, Any], again: dict[str, Any]) -> str:
    """What a second scoring of a model gave."""
    metric, score = next(iter(scores.items()))
    noise = f"±{100 * again['noise']:.1f} points" if is_share(metric, score) else f"±{again['noise']:.2g}"
    return (
        f"{name} scored again: {format_score(metric, again['score'])}; {again['changed']:,} of "
        f"{plural(again['items'], 'item')} differ (noise {noise})"
    )


def table(path: Path) -> str:
    """A file of results as a table with a row for each benchmark and model."""
    results = read_json(path)
    rows = []
    for model, record in results["models"].items():
        for name, scores in record["eval"][results["suite"]].items():
            metric, value = next(iter(scores.items()))
            error, seconds = scores.get(f"{metric}_stderr"), record["details"].get(name, {}).get("seconds")
            rows.append([
                name, model, metric, format_score(metric, value),
                "" if error is None else _error_text(metric, value, error),
                f"{int(scores['items'])}", "" if seconds is None else f"{seconds:.0f}",
            ])  # fmt: skip
    heads = ["benchmark", "model", "metric", "score", "stderr", "items", "seconds"]
    notes = [f"not scored: {reason}" for reason in results["left_out"]]
    notes += _differences(results["models"])
    several = len(results["models"]) > 1
    for model, record in results["models"].items():
        for name, scores in record["eval"][results["suite"]].items():
            notes += notes_on(f"{model} {name}" if several else name, scores, record["details"].get(name, {}))
            if again := record.get("again", {}).get(name):
                notes.append(_again_line(f"{model} {name}" if several else name, scores, again))
    return "\n".join([text_table(heads, rows), *notes, f"results: {path}"])
