"""`hft eval`: check what is asked, start a worker for what is not scored yet, and put the results together.

Below a run, or output_dir:

    eval/SUITE/results.json         the scores of each model: suite -> task -> metric -> value, and how they were had
    eval/SUITE/WHEN/NAME-KEY.json   one benchmark's scores; KEY is the hash of all that they hang on
    eval/SUITE/WHEN/NAME-KEY.jsonl  its items, one a line
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from hft_cli import benchmarks, probe
from hft_cli.benchmarks import BENCHMARKS, BenchmarkConfig
from hft_cli.data import content_hash, read_chats
from hft_cli.harness import HarnessJob, Todo
from hft_cli.probe import ProbeConfig, ProbeJob
from hft_cli.run_dir import Job, RoundDir, Task, finished, read_config, read_json, write_json
from hft_cli.runner import _work
from hft_cli.schema import EvalConfig, ModelConfig, UserError, choose, locate
from hft_cli.weights import fetch, weights_hash

VERSION = 1  # of what is kept: a higher one scores anew


@dataclass(frozen=True)
class _Scored:
    """A model to score. `name`: after, before or model, the folder of its results; `chat`: if it has a template."""

    name: str
    config: ModelConfig
    path: Path
    chat: bool


@dataclass(frozen=True)
class _Asked:
    """What is to be scored: each thing by name, with its settings and the hash of its rows."""

    benchmarks: dict[str, tuple[BenchmarkConfig | None, str]]  # None: a task by the harness's name
    probes: dict[str, tuple[ProbeConfig, str]]
    tasks: dict[str, tuple[str, str]]  # sets of rows, by exact match
    left_out: tuple[str, ...]


def run_eval(config: EvalConfig) -> Path:
    """Score what the config asks for and return the file of results. What is scored already is not scored again.

    Results of earlier commands on the same weights stay in the file beside the new ones.

    Raises:
        UserError: for a mistake in the config, the run or the files, before anything is scored.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
    """
    asked = _check(config)
    models = _models(config)
    folder = Path(config.run or config.output_dir).expanduser() / "eval" / config.suite.name
    file = folder / "results.json"
    earlier = read_json(file)["models"] if file.exists() else {}
    results: dict[str, Any] = dict(earlier)
    for model in models:
        known = {
            "version": VERSION,
            "weights_sha256": weights_hash(model.path),
            "files_sha256": _files_hash(model.path),
            "model": {**asdict(model.config), "name": None, "path": None},
            "seed": config.seed,
        }
        place = folder / model.name
        place.mkdir(parents=True, exist_ok=True)
        scores = _exact_match(config, asked, model, place, known)
        details: dict[str, Any] = {}
        for name, out in {
            **_harness(config, asked, model, place, known),
            **_rankings(config, asked, model, place, known),
        }.items():
            one = read_json(out)
            scores[name] = one.pop("scores")
            details[name] = one | {"file": out.name, "items": out.with_suffix(".jsonl").name}
        before = earlier.get(model.name, {})
        if before.get("weights_sha256") == known["weights_sha256"]:
            scores = {**before["eval"][config.suite.name], **scores}
            details = {**before["details"], **details}
        results[model.name] = {
            "path": str(model.path),
            "weights_sha256": known["weights_sha256"],
            "eval": {config.suite.name: scores},
            "details": details,
        }
    write_json(file, {"suite": config.suite.name, "left_out": asked.left_out, "models": results})
    return file


def table(path: Path) -> str:
    """A results file as a table: a row for each benchmark and model."""
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


# ------------------------------------------------------------------------------------------------------------ checks


def _check(config: EvalConfig) -> _Asked:
    """What is asked for, with its settings and files found, or a UserError for what cannot work."""
    suite = config.suite
    names = [*suite.tasks, *suite.benchmarks, *suite.probe, *suite.harness]
    if not names:
        raise UserError(
            f"suite={suite.name} has nothing to score. Use suite=general, knowledge, quick, probe or pocket, or "
            "suite=harness suite.harness=[TASK,…]."
        )
    for path, value, low in (
        ("suite.limit", suite.limit, 1),
        ("suite.batch_size", suite.batch_size, 1),
        ("engine.num_processes", config.engine.num_processes, 1),
        ("seed", config.seed, 0),
    ):
        if value is not None and not value >= low:
            raise UserError(f"{path}={value} is too small: it must be at least {low}.")
    choose("suite.chat", suite.chat.lower(), ("auto", "true", "false"))
    choose("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    for name in suite.only:
        choose(f"benchmark of suite={suite.name}", name, names)
    if suite.data_dir is not None and suite.harness:
        raise UserError(
            f"suite.harness={suite.harness} names tasks whose rows come from the hub: leave out suite.data_dir."
        )
    own = {name: benchmarks.settings(name, suite.benchmarks[name]) for name in _wanted(config, suite.benchmarks)}
    harness = _wanted(config, suite.harness)
    if (own or harness) and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"suite={suite.name} needs lm-evaluation-harness, which is not installed: pip install 'hft-cli[eval]'"
        )
    runs_code = [name for name in own if BENCHMARKS[name].runs_code]
    if runs_code and not suite.allow_code:
        raise UserError(
            f"{runs_code[0]} runs programs that the model writes. Set suite.allow_code=true if you accept that (what "
            "it limits: hft_cli/sandbox.py), or leave it out: "
            f"suite.only=[{','.join(name for name in own if name not in runs_code)}]"
        )
    data_dir = None if suite.data_dir is None else Path(suite.data_dir).expanduser()
    probes, left_out = {}, []
    for name in _wanted(config, suite.probe):
        found = probe.settings(name, suite.probe[name], data_dir)
        if found is None:
            left_out.append(f"{name}, whose files are looked for in suite.data_dir, which is not set")
            continue
        if not probe.read(found):
            raise UserError(f"There is no fact in {found.facts} with a pattern that ends in its object.")
        probes[name] = (found, probe.data_hash(found))
    hashes = {name: "hub" if data_dir is None else benchmarks.data_hash(name, data_dir) for name in own}
    return _Asked(
        benchmarks={name: (one, hashes[name]) for name, one in own.items()} | dict.fromkeys(harness, (None, "hub")),
        probes=probes,
        tasks={
            name: (suite.tasks[name], content_hash(read_chats(locate(suite.tasks[name]), split="test")))
            for name in _wanted(config, suite.tasks)
        },
        left_out=tuple(left_out),
    )


def _wanted(config: EvalConfig, names: Iterable[str]) -> list[str]:
    return [name for name in names if not config.suite.only or name in config.suite.only]


def _models(config: EvalConfig) -> list[_Scored]:
    if config.run is None:
        path = fetch(locate(config.model.path))
        return [_Scored("model", config.model, path, _chat(config, path))]
    run = finished(config.run)
    sealed = read_config(run).model
    for name in config.models:
        choose("models", name, ("after", "before"))
    if "after" in config.models and not run.model.is_dir():
        raise UserError(f"The run in {config.run} has no model (method.save_model=false?). Use models=[before].")
    paths = {"after": run.model, "before": fetch(locate(sealed.path))}
    own = replace(config.model, name=sealed.name)
    return [_Scored(name, own, paths[name], _chat(config, paths[name])) for name in config.models]


def _chat(config: EvalConfig, folder: Path) -> bool:
    """Whether prompts go through the chat template; without loading the tokenizer."""
    asked, settings = config.suite.chat.lower(), folder / "tokenizer_config.json"
    has = config.model.chat_template is not None or (folder / "chat_template.jinja").exists()
    has = has or (settings.exists() and bool(read_json(settings).get("chat_template")))
    if asked == "true" and not has:
        raise UserError(f"suite.chat=true, but {folder} has no chat template. Set model.chat_template=tulu|plain|PATH.")
    return has and asked != "false"


# -------------------------------------------------------------------------------------------------------------- work


def _harness(config: EvalConfig, asked: _Asked, model: _Scored, place: Path, known: dict[str, Any]) -> dict[str, Path]:
    """Benchmark -> its file of scores, after scoring those that have none."""
    suite = config.suite
    todo: dict[str, Todo] = {}
    for name, (own, rows) in asked.benchmarks.items():
        limits = (suite.limit, None if own is None else own.limit)
        limit = min((most for most in limits if most is not None), default=None)
        chat = model.chat and (own is None or own.chat or suite.chat.lower() == "true")
        settings = None if own is None else asdict(own)
        # batch_size is not in the key: it changes a score in the last digits at most.
        key = _key(known, settings, limit, chat, rows, metadata.version("lm-eval"))
        todo[name] = Todo(name, settings, limit, chat, str(place / f"{_plain(name)}-{key}.json"))
    new = tuple(one for one in todo.values() if not Path(one.out).exists())
    if new:
        job = HarnessJob(
            model=model.config,
            path=str(model.path),
            todo=new,
            data_dir=None if suite.data_dir is None else str(Path(suite.data_dir).expanduser().resolve()),
            batch_size=suite.batch_size,
            seed=config.seed,
        )
        _start(job, place / "harness", "hft_cli.harness", config, f"{model.name}: {', '.join(one.name for one in new)}")
    return {name: Path(one.out) for name, one in todo.items()}


def _rankings(config: EvalConfig, asked: _Asked, model: _Scored, place: Path, known: dict[str, Any]) -> dict[str, Path]:
    """Probe -> its file of scores, after scoring those that have none."""
    outs = {}
    for name, (own, rows) in asked.probes.items():
        key = _key(known, asdict(replace(own, facts="", patterns=None)), config.suite.limit, model.chat, rows)
        outs[name] = place / f"{_plain(name)}_ranking-{key}.json"
    new = [name for name, out in outs.items() if not out.exists()]
    if new:
        job = ProbeJob(
            model=model.config,
            path=str(model.path),
            probes={name: asked.probes[name][0] for name in new},
            outs={name: str(outs[name]) for name in new},
            limit=config.suite.limit,
            chat=model.chat,
            batch_size=config.suite.batch_size,
            seed=config.seed,
        )
        _start(job, place / "probe", "hft_cli.probe", config, f"{model.name}: {', '.join(new)}")
    return {f"{name}_ranking": out for name, out in outs.items()}


def _start(job: HarnessJob | ProbeJob, folder: Path, module: str, config: EvalConfig, label: str) -> None:
    """Run a worker on a job, by as many ranks as the engine has."""
    folder.mkdir(parents=True, exist_ok=True)
    job.write(folder / "job.json")
    ranks = config.engine.num_processes
    several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    _work([sys.executable, "-m", *several, module, str(folder / "job.json")], RoundDir(folder), f"Scoring {label}")


def _exact_match(
    config: EvalConfig, asked: _Asked, model: _Scored, place: Path, known: dict[str, Any]
) -> dict[str, Any]:
    """Scores of the suite's sets of rows by exact match, as hft train has them. suite.limit is not for these."""
    if not asked.tasks:
        return {}
    folder = RoundDir(place / f"exact_match-{_key(known, {name: rows for name, (_, rows) in asked.tasks.items()})}")
    out = folder.folder / "scores.json"
    if not out.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        Job(
            model=model.config,
            path=str(model.path),
            tasks={config.suite.name: {name: Task(path) for name, (path, _) in asked.tasks.items()}},
            batch_size=config.suite.batch_size,
            generation=config.generation,
            seed=config.seed,
            out=str(out),
        ).write(folder.folder / "job.json")
        label = f"Scoring {model.name}: {', '.join(asked.tasks)}"
        _work([sys.executable, "-m", "hft_cli.evaluate", str(folder.folder / "job.json")], folder, label)
    scores: dict[str, Any] = read_json(out)[config.suite.name]
    return scores


def _key(*parts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _files_hash(folder: Path) -> str:
    """SHA-256 over what a model's folder holds besides the weights: tokenizer, template, configuration."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file():
            digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _plain(name: str) -> str:
    return name.replace(os.sep, "_")
