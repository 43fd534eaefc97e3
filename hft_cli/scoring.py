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
    """A model to score. `name`: after, before or model, the folder of its results."""

    name: str
    config: ModelConfig
    path: Path


def run_eval(config: EvalConfig) -> Path:
    """Score what the config asks for and return the file of results. What is scored already is not scored again.

    Raises:
        UserError: for a mistake in the config, the run or the files, before anything is scored.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
    """
    suite = config.suite
    asked = _check(config)
    data_dir = None if suite.data_dir is None else Path(suite.data_dir).expanduser()
    models = _models(config)
    chats = {model.name: _chat(suite.chat, model) for model in models}
    folder = Path(config.run or config.output_dir).expanduser() / "eval" / suite.name
    files = {
        name: benchmarks.data_hash(name, data_dir) if data_dir is not None and name in BENCHMARKS else "hub"
        for name in [*asked, *suite.harness]
    }
    exact = {name: content_hash(read_chats(locate(place), split="test")) for name, place in _wanted_tasks(config)}
    probes, left_out = _probes(config, data_dir)

    results: dict[str, Any] = {"suite": suite.name, "data_dir": suite.data_dir, "left_out": left_out, "models": {}}
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
        todo: dict[str, Todo] = {}
        for name in [*asked, *suite.harness]:
            own = asked.get(name)
            limits = [limit for limit in (suite.limit, own.limit if own else None) if limit is not None]
            chat = chats[model.name] and not (suite.chat.lower() == "auto" and own is not None and not own.chat)
            limit = min(limits, default=None)
            # batch_size is not in the key: it changes a score in the last digits at most.
            key = _key(known, asdict(own) if own else None, limit, chat, files[name], metadata.version("lm-eval"))
            todo[name] = Todo(
                name, asdict(own) if own else None, limit, chat, str(place / f"{_plain(name)}-{key}.json")
            )
        new = tuple(one for one in todo.values() if not Path(one.out).exists())
        if new:
            work = place / "harness"
            job = HarnessJob(
                model=model.config,
                path=str(model.path),
                todo=new,
                data_dir=None if data_dir is None else str(data_dir.resolve()),
                batch_size=suite.batch_size,
                seed=config.seed,
            )
            _start(job, work, "hft_cli.harness", config, f"{model.name}: {', '.join(one.name for one in new)}")
        outs = {name: Path(one.out) for name, one in todo.items()}

        probed = {
            name: place
            / f"{_plain(name)}-ranking-{_key(known, asdict(own), suite.limit, chats[model.name], digest)}.json"
            for name, (own, digest) in probes.items()
        }
        new_probes = {name: probes[name][0] for name, out in probed.items() if not out.exists()}
        if new_probes:
            job_of_probe = ProbeJob(
                model=model.config,
                path=str(model.path),
                probes=new_probes,
                outs={name: str(probed[name]) for name in new_probes},
                limit=suite.limit,
                chat=chats[model.name],
                batch_size=suite.batch_size,
                seed=config.seed,
            )
            _start(job_of_probe, place / "probe", "hft_cli.probe", config, f"{model.name}: {', '.join(new_probes)}")
        outs |= {f"{name}_ranking": out for name, out in probed.items()}

        scores = _exact_match(config, model, place, known, exact)
        details: dict[str, Any] = {}
        for name, out in outs.items():
            one = read_json(out)
            scores[name] = one.pop("scores")
            details[name] = one | {"file": str(out.relative_to(folder)), "items": str(out.with_suffix(".jsonl").name)}
        results["models"][model.name] = {
            "path": str(model.path),
            "weights_sha256": known["weights_sha256"],
            "eval": {suite.name: scores},
            "details": details,
        }
    results |= {
        "settings": {name: asdict(own) for name, own in asked.items()},
        "limit": suite.limit,
        "lm_eval": metadata.version("lm-eval") if asked or suite.harness else None,
    }
    write_json(folder / "results.json", results)
    return folder / "results.json"


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


def _check(config: EvalConfig) -> dict[str, BenchmarkConfig]:
    """The benchmarks that are asked for, with their settings, or a UserError for what cannot work."""
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
    asked = {
        name: benchmarks.settings(name, values)
        for name, values in suite.benchmarks.items()
        if name in suite.only or not suite.only
    }
    if (asked or suite.harness) and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"suite={suite.name} needs lm-evaluation-harness, which is not installed: pip install 'hft-cli[eval]'"
        )
    runs_code = [name for name in asked if BENCHMARKS[name].runs_code]
    if runs_code and not suite.allow_code:
        raise UserError(
            f"{runs_code[0]} runs programs that the model writes. Set suite.allow_code=true if you accept that (what "
            "it limits: hft_cli/sandbox.py), or leave it out: "
            f"suite.only=[{','.join(name for name in asked if name not in runs_code)}]"
        )
    if suite.data_dir is not None:
        for name in asked:
            benchmarks.parts(name, Path(suite.data_dir).expanduser())
    return asked


def _wanted_tasks(config: EvalConfig) -> list[tuple[str, str]]:
    return [
        (name, place)
        for name, place in config.suite.tasks.items()
        if name in config.suite.only or not config.suite.only
    ]


def _probes(config: EvalConfig, data_dir: Path | None) -> tuple[dict[str, tuple[ProbeConfig, str]], list[str]]:
    """The probes that are asked for, each with the hash of its files, and what is left out for want of files."""
    found, left_out = {}, []
    for name, values in config.suite.probe.items():
        if config.suite.only and name not in config.suite.only:
            continue
        own = probe.settings(name, values, data_dir)
        if own is None:
            left_out.append(f"{name}, whose files are looked for in suite.data_dir, which is not set")
            continue
        if not probe.read(own):
            raise UserError(f"There is no fact in {own.facts} with a pattern that ends in its object.")
        found[name] = (own, probe.data_hash(own))
    return found, left_out


def _models(config: EvalConfig) -> list[_Scored]:
    if config.run is None:
        return [_Scored("model", config.model, fetch(locate(config.model.path)))]
    run = finished(config.run)
    sealed = read_config(run).model
    for name in config.models:
        choose("models", name, ("after", "before"))
    if "after" in config.models and not run.model.is_dir():
        raise UserError(f"The run in {config.run} has no model (method.save_model=false?). Use models=[before].")
    paths = {"after": run.model, "before": fetch(locate(sealed.path))}
    return [_Scored(name, replace(config.model, name=sealed.name), paths[name]) for name in config.models]


def _chat(asked: str, model: _Scored) -> bool:
    """Whether prompts go through the chat template; without loading the tokenizer."""
    settings = model.path / "tokenizer_config.json"
    has = model.config.chat_template is not None or (model.path / "chat_template.jinja").exists()
    has = has or (settings.exists() and bool(read_json(settings).get("chat_template")))
    if asked.lower() == "true" and not has:
        raise UserError(
            f"suite.chat=true, but {model.path} has no chat template. Set model.chat_template=tulu|plain|PATH."
        )
    return has and asked.lower() != "false"


# -------------------------------------------------------------------------------------------------------------- work


def _start(job: HarnessJob | ProbeJob, folder: Path, module: str, config: EvalConfig, label: str) -> None:
    """Run a worker on a job, by as many ranks as the engine has."""
    folder.mkdir(parents=True, exist_ok=True)
    job.write(folder / "job.json")
    ranks = config.engine.num_processes
    several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    _work([sys.executable, "-m", *several, module, str(folder / "job.json")], RoundDir(folder), f"Scoring {label}")


def _exact_match(
    config: EvalConfig, model: _Scored, place: Path, known: dict[str, Any], exact: dict[str, str]
) -> dict[str, Any]:
    """Scores of the suite's sets of rows by exact match, as hft train has them."""
    tasks = dict(_wanted_tasks(config))
    if not tasks:
        return {}
    folder = RoundDir(place / f"exact_match-{_key(known, exact)}")
    out = folder.folder / "scores.json"
    if not out.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        Job(
            model=model.config,
            path=str(model.path),
            tasks={config.suite.name: {name: Task(path) for name, path in tasks.items()}},
            batch_size=config.suite.batch_size,
            generation=config.generation,
            seed=config.seed,
            out=str(out),
        ).write(folder.folder / "job.json")
        label = f"Scoring {model.name}: {', '.join(tasks)}"
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
