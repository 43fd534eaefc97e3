"""`hft eval`: score a run's models, or any model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import model_folder, weights_hash
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import EvalConfig, read_config
from hft_cli.config.validate import check_eval
from hft_cli.errors import UserError
from hft_cli.evaluation.scorer import ScoredModel, read, score
from hft_cli.evaluation.suite import read_suite, uses_template
from hft_cli.files import read_json, write_json
from hft_cli.launch.environment import gpus
from hft_cli.launch.worker import hold_lock
from hft_cli.paths import resolve_path
from hft_cli.plan.preflight import check_device
from hft_cli.run_dir import RoundDir, finished
from hft_cli.runner.tracking import log_scores, require_tracker


def run_eval(config: EvalConfig) -> Path:
    """Do all that `hft eval` was asked for and return the file of results. What is scored already is not scored again.

    Results of earlier commands on the same weights stay in the file beside the new ones.

    Raises:
        UserError: for a mistake in the config, the run or the files, before anything is scored.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
    """
    check_eval(config)
    require_tracker(config.tracking)
    asked = read_suite(config.suite)
    name = config.suite.name
    if not asked.rows:
        raise UserError(
            f"suite={name} has nothing to score{': ' if asked.left_out else ''}{'; '.join(asked.left_out)}. Use "
            "suite=general, knowledge, quick, probe or pocket, or suite=harness suite.harness=[TASK,…]."
        )
    models = _models(config)
    for model in models.values():
        check_device(
            config.engine, gpus(), sum(p.elements for p in parameters_from_folder(model.path, config.model.kinds))
        )
    folder = Path(config.run or config.output_dir).expanduser() / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    with hold_lock(folder / ".lock"):
        results: dict[str, Any] = read_json(file)["models"] if file.exists() else {}
        for when, model in models.items():
            files = score(asked, model, RoundDir(folder / when), ranks=config.engine.num_processes, keyed=True)[name]
            scores, details = {}, {}
            for one, kept in files.items():
                scores[one], how = read(kept)
                items = kept.with_suffix(".jsonl").relative_to(folder)
                details[one] = {**how, "file": str(kept.relative_to(folder)), "items": str(items)}
            before = results.get(when, {})
            if before.get("weights_sha256") == model.weights:
                scores = {**before["eval"][name], **scores}
                details = {**before["details"], **details}
            results[when] = {
                "path": str(model.path),
                "weights_sha256": model.weights,
                "eval": {name: scores},
                "details": details,
            }
        write_json(file, {"suite": name, "left_out": asked.left_out, "models": results})
    for when in models:
        log_scores(
            config.tracking, folder.parent, f"{when} {name}", results[when]["eval"], {"path": results[when]["path"]}
        )
    return file


def _models(config: EvalConfig) -> dict[str, ScoredModel]:
    """What to score, by the name of its folder: after and before of a run, or the model alone."""
    found: dict[str, ScoredModel] = {}
    if config.run is None:
        path = model_folder(resolve_path(config.model.path))
        found["model"] = ScoredModel(path, config.model, weights_hash(path))
    else:
        run = finished(config.run)
        sealed = read_config(run).model
        own = replace(config.model, name=sealed.name)
        if "after" in config.models and not run.model.is_dir():
            raise UserError(f"The run in {config.run} has no model (method.save_model=false?). Use models=[before].")
        for when in config.models:
            path = run.model if when == "after" else model_folder(resolve_path(sealed.path))
            found[when] = ScoredModel(path, own, weights_hash(path), shared=when == "before")
        if "before" in found and found["before"].weights != read_json(run.plan)["base_sha256"]:
            raise UserError(
                f"The weights in {found['before'].path} have changed since the run in {config.run} began with them. "
                "Restore them, or use models=[after]."
            )
    for model in found.values():
        uses_template(config.suite, model.config, model.path)
    return found


def table(path: Path) -> str:
    """A file of results as a table: a row for each benchmark and model."""
    results = read_json(path)
    rows = []
    for model, one in results["models"].items():
        for name, scores in one["eval"][results["suite"]].items():
            metric, value = next(iter(scores.items()))
            error = scores.get(f"{metric}_stderr")
            details = one["details"].get(name, {})
            rows.append(
                (
                    name,
                    model,
                    metric,
                    f"{100 * value:.1f}",
                    "" if error is None else f"±{100 * error:.1f}",
                    f"{int(scores['items'])}",
                    f"{details['seconds']:.0f}" if "seconds" in details else "",
                )
            )
    heads = ("benchmark", "model", "metric", "score", "stderr", "items", "seconds")
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    notes = [f"not scored: {text}" for text in results["left_out"]]
    return "\n".join([line.rstrip() for line in lines] + notes + [f"results: {path}"])
