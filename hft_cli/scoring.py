"""What a suite asks for, checked, and the scores of a model on it: for `hft train` (runner) and `hft eval` (below).

Below RUN/eval or OUTPUT_DIR/eval, where WHEN is before, after, round-NN, or model:

    WHEN/SUITE/NAME.json        scores of a set of rows, a benchmark or a probe; of the last two how they were had, too
    WHEN/SUITE/NAME.jsonl       its items, one a line: `row` is its name, and its score stands under the metric's name
    WHEN/SUITE/NAME-KEY.json    the same of `hft eval`; KEY is the hash of all that the scores hang on
    SUITE.json                  of `hft eval`: the scores of each model, and how they were had
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from hft_cli import benchmarks, known, probe
from hft_cli.benchmarks import BENCHMARKS, BenchmarkConfig
from hft_cli.data import content_hash, read_chats
from hft_cli.harness import HarnessJob, Todo
from hft_cli.layout import from_folder
from hft_cli.preflight import check_device, gpus
from hft_cli.probe import ProbeConfig, ProbeJob
from hft_cli.run_dir import Job, RoundDir, Task, finished, read_config, read_json, write_json
from hft_cli.schema import EvalConfig, GenerationConfig, ModelConfig, SuiteConfig, UserError, check_eval, choose, locate
from hft_cli.tracking import log_scores, require
from hft_cli.weights import NOT_WEIGHTS, fetch, weights_hash
from hft_cli.workers import alone, say, work

VERSION = 2  # of how benchmarks and probes are scored: a higher one scores anew


@dataclass(frozen=True)
class Asked:
    """A suite, checked: what it scores by name, and the hash of each one's rows ("hub" where they come from there)."""

    suite: SuiteConfig
    tasks: dict[str, Task]  # sets of rows, by exact match
    benchmarks: dict[str, BenchmarkConfig | None]  # None: a task by the harness's name
    probes: dict[str, ProbeConfig]
    rows: dict[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """A model to score. `weights`: their hash, needed for `shared` (its scores are kept for other runs) and keys.

    With `reset` these parameters are put back to the model at `base`, in memory only.
    """

    path: Path
    config: ModelConfig
    weights: str | None = None
    shared: bool = False
    base: str | None = None
    reset: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Cell:
    """One thing to score, and what its scores hang on besides the model. A Todo's `out` is not set yet."""

    suite: str
    name: str
    what: Task | Todo | ProbeConfig
    hangs_on: tuple[Any, ...]


Files = dict[str, dict[str, Path]]  # suite -> name -> file of scores


# ----------------------------------------------------------------------------------------------------------- a suite


def read_suite(suite: SuiteConfig) -> Asked:
    """A suite with its settings checked and its files found and read.

    Raises:
        UserError: for what is missing or cannot work, before anything is scored.
    """
    names = [*suite.tasks, *suite.benchmarks, *suite.probe, *suite.harness]
    for name in suite.only:
        choose(f"benchmark of suite={suite.name}", name, names)
    if suite.data_dir is not None and suite.harness:
        raise UserError(
            f"suite.harness={suite.harness} names tasks whose rows come from the hub: leave out suite.data_dir."
        )
    own = {name: benchmarks.settings(name, suite.benchmarks[name]) for name in _wanted(suite, suite.benchmarks)}
    harness = _wanted(suite, suite.harness)
    if (own or harness) and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"suite={suite.name} needs lm-evaluation-harness, which is not installed: pip install 'hft-cli[eval]'"
        )
    runs_code = [name for name in own if BENCHMARKS[name].runs_code]
    if runs_code and not suite.allow_code:
        others = [name for name in _wanted(suite, names) if name not in runs_code]
        raise UserError(
            f"{runs_code[0]} runs programs that the model writes. Set suite.allow_code=true if you accept that (what "
            f"it limits: hft_cli/sandbox.py), or leave it out: suite.only=[{','.join(others)}]"
        )
    data_dir = None if suite.data_dir is None else Path(suite.data_dir).expanduser()
    probes, left_out = {}, []
    for name in _wanted(suite, suite.probe):
        found = probe.settings(name, suite.probe[name], data_dir)
        if found is None:
            left_out.append(f"{name}, whose files are looked for in suite.data_dir, which is not set")
            continue
        if not probe.read(found):
            raise UserError(f"There is no fact in {found.facts} with a pattern that ends in its object.")
        probes[f"{name}_ranking"] = found  # beside a set of rows of the same name
    tasks = {name: Task(suite.tasks[name]) for name in _wanted(suite, suite.tasks)}
    return Asked(
        suite=suite,
        tasks=tasks,
        benchmarks={**own, **dict.fromkeys(harness)},
        probes=probes,
        rows={
            **{name: _rows(task) for name, task in tasks.items()},
            **{name: "hub" if data_dir is None else benchmarks.data_hash(name, data_dir) for name in own},
            **dict.fromkeys(harness, "hub"),
            **{name: probe.data_hash(config) for name, config in probes.items()},
        },
        left_out=tuple(left_out),
    )


def _wanted(suite: SuiteConfig, names: Iterable[str]) -> list[str]:
    return [name for name in names if not suite.only or name in suite.only]


def _rows(task: Task) -> str:
    return content_hash(read_chats(locate(task.path), format=task.format, split="test"))


def uses_template(suite: SuiteConfig, model: ModelConfig, folder: Path) -> bool:
    """Whether prompts of benchmarks go through the model's chat template, told without loading the tokenizer.

    Raises:
        UserError: if they should, and there is none.
    """
    asked, settings = suite.chat.lower(), folder / "tokenizer_config.json"
    has = model.chat_template is not None or (folder / "chat_template.jinja").exists()
    has = has or (settings.exists() and bool(read_json(settings).get("chat_template")))
    if asked == "true" and not has:
        raise UserError(f"suite.chat=true, but {folder} has no chat template. Set model.chat_template=tulu|plain|PATH.")
    return has and asked != "false"


# ------------------------------------------------------------------------------------------------------------ scores


def score(
    asked: Asked,
    model: Scored,
    folder: RoundDir,
    *,
    tests: Mapping[str, Task] | None = None,
    generation: GenerationConfig | None = None,
    seed: int = 0,
    ranks: int = 1,
    keyed: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Files:
    """Score a model on a suite and on test sets of its data; what is in `folder` already is not scored again.

    `generation` and `seed` are of answers to the test sets. With `keyed` the files' names tell what they hang on.
    `meanwhile` is called all the time.
    """
    cells = _cells(asked, model, tests or {}, [asdict(generation or GenerationConfig()), seed])
    if not cells:
        return {}
    identity = _identity(model)
    files = {
        (cell.suite, cell.name): folder.score(
            cell.suite, f"{cell.name}-{_hash(identity, cell.hangs_on)[:12]}" if keyed else cell.name
        )
        for cell in cells
    }
    keys = {}
    if model.shared:
        # batch_size may tip a tie
        keys = {files[c.suite, c.name]: known.key(identity, c.hangs_on, asked.suite.batch_size) for c in cells}
        if taken := known.take(keys):
            say(f"The start has been scored before: {taken} of {len(cells)} tasks taken from {known.kept()}.")
    new = [(cell, files[cell.suite, cell.name]) for cell in cells if not files[cell.suite, cell.name].exists()]
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    _score_rows(new, asked, model, folder, generation or GenerationConfig(), seed, meanwhile)
    _score_benchmarks(new, asked, model, folder, ranks, meanwhile)
    _score_probes(new, asked, model, folder, ranks, meanwhile)
    known.add(keys)
    found: Files = {}
    for (suite_name, name), file in files.items():
        found.setdefault(suite_name, {})[name] = file
    return found


def scores_of(files: Files) -> dict[str, dict[str, Any]]:
    """Suite -> name -> metric -> value, its own metric first."""
    return {suite: {name: _read(file)[0] for name, file in own.items()} for suite, own in files.items()}


def _read(file: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """A file's scores, and how they were had; the latter is empty for a set of rows."""
    one: dict[str, Any] = read_json(file)
    return (one["scores"], {key: one[key] for key in one if key != "scores"}) if "scores" in one else (one, {})


def _cells(asked: Asked, model: Scored, tests: Mapping[str, Task], generated: list[Any]) -> list[_Cell]:
    suite = asked.suite
    cells: list[_Cell] = []
    for where, name, task in (
        *((suite.name, name, task) for name, task in asked.tasks.items()),
        *(("data", name, task) for name, task in tests.items()),
    ):
        rows = asked.rows[name] if where != "data" else _rows(task)
        answers = generated if task.metric != "exact_match" else None
        cells.append(_Cell(where, name, task, ("rows", task.metric, rows, answers)))
    if not (asked.benchmarks or asked.probes):
        return cells
    template = uses_template(suite, model.config, model.path)
    for name, own in asked.benchmarks.items():
        limits = (suite.limit, None if own is None else own.limit)
        limit = min((most for most in limits if most is not None), default=None)
        chat = template and (own is None or own.chat or suite.chat.lower() == "true")
        settings = None if own is None else asdict(own)
        seed = suite.seed if own is None or own.temperature else None
        harness = metadata.version("lm-eval")
        todo = Todo(name, settings, limit, chat, "")
        how = {**asdict(todo), "settings": {**(settings or {}), "source": ""}}
        cells.append(_Cell(suite.name, name, todo, ("benchmark", VERSION, how, asked.rows[name], seed, harness)))
    for name, one in asked.probes.items():
        without = replace(one, facts="", patterns=None)  # what is there counts, and not where
        how = {**asdict(without), "limit": suite.limit, "chat": template, "seed": suite.seed}
        cells.append(_Cell(suite.name, name, one, ("probe", VERSION, how, asked.rows[name])))
    return cells


def _identity(model: Scored) -> dict[str, Any]:
    """What any score hangs on: the weights, and all beside them that says how they are used."""
    template = model.config.chat_template
    own = Path(template).expanduser() if template else None
    return {
        "weights": model.weights,
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(model.path.iterdir())
            if path.is_file() and path.suffix in NOT_WEIGHTS
        },
        "template": own.read_text() if own and own.is_file() else template,
        "model": [model.config.dtype, model.config.attention],
    }


def _score_rows(
    new: list[tuple[_Cell, Path]],
    asked: Asked,
    model: Scored,
    folder: RoundDir,
    generation: GenerationConfig,
    seed: int,
    meanwhile: Callable[[], None],
) -> None:
    tasks: dict[str, dict[str, Task]] = {}
    for cell, file in new:
        if isinstance(cell.what, Task):
            tasks.setdefault(cell.suite, {})[file.stem] = cell.what
    if not tasks:
        return
    Job(
        model=model.config,
        path=str(model.path),
        tasks=tasks,
        batch_size=asked.suite.batch_size,
        generation=generation,
        seed=seed,
        base=model.base,
        reset=model.reset,
    ).write(folder.folder / "job.json")
    work("hft_cli.evaluate", folder.folder / "job.json", folder, f"Scoring {folder.folder.name}", send=meanwhile)


def _score_benchmarks(
    new: list[tuple[_Cell, Path]],
    asked: Asked,
    model: Scored,
    folder: RoundDir,
    ranks: int,
    meanwhile: Callable[[], None],
) -> None:
    todo = [replace(cell.what, out=str(file)) for cell, file in new if isinstance(cell.what, Todo)]
    if not todo:
        return
    data_dir = asked.suite.data_dir
    HarnessJob(
        model=model.config,
        path=str(model.path),
        todo=tuple(todo),
        data_dir=None if data_dir is None else str(Path(data_dir).expanduser().resolve()),
        batch_size=asked.suite.batch_size,
        seed=asked.suite.seed,
    ).write(folder.folder / "harness.json")
    label = f"Scoring {folder.folder.name}: {', '.join(one.name for one in todo)}"
    work("hft_cli.harness", folder.folder / "harness.json", folder, label, ranks if ranks > 1 else None, meanwhile)


def _score_probes(
    new: list[tuple[_Cell, Path]],
    asked: Asked,
    model: Scored,
    folder: RoundDir,
    ranks: int,
    meanwhile: Callable[[], None],
) -> None:
    probes = {cell.name: (cell.what, file) for cell, file in new if isinstance(cell.what, ProbeConfig)}
    if not probes:
        return
    ProbeJob(
        model=model.config,
        path=str(model.path),
        probes={name: config for name, (config, _) in probes.items()},
        outs={name: str(file) for name, (_, file) in probes.items()},
        limit=asked.suite.limit,
        chat=uses_template(asked.suite, model.config, model.path),
        batch_size=asked.suite.batch_size,
        seed=asked.suite.seed,
    ).write(folder.folder / "probe.json")
    label = f"Scoring {folder.folder.name}: {', '.join(probes)}"
    work("hft_cli.probe", folder.folder / "probe.json", folder, label, ranks if ranks > 1 else None, meanwhile)


def _hash(*parts: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- hft eval


def run_eval(config: EvalConfig) -> Path:
    """Do all that `hft eval` was asked for and return the file of results. What is scored already is not scored again.

    Results of earlier commands on the same weights stay in the file beside the new ones.

    Raises:
        UserError: for a mistake in the config, the run or the files, before anything is scored.
        subprocess.CalledProcessError: if a worker fails; its log is named on stderr.
    """
    check_eval(config)
    require(config.tracking)
    asked = read_suite(config.suite)
    name = config.suite.name
    if not asked.rows:
        raise UserError(
            f"suite={name} has nothing to score{': ' if asked.left_out else ''}{'; '.join(asked.left_out)}. Use "
            "suite=general, knowledge, quick, probe or pocket, or suite=harness suite.harness=[TASK,…]."
        )
    models = _models(config)
    for model in models.values():
        check_device(config.engine, gpus(), sum(p.elements for p in from_folder(model.path, config.model.kinds)))
    folder = Path(config.run or config.output_dir).expanduser() / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    with alone(folder / ".lock"):
        results: dict[str, Any] = read_json(file)["models"] if file.exists() else {}
        for when, model in models.items():
            files = score(asked, model, RoundDir(folder / when), ranks=config.engine.num_processes, keyed=True)[name]
            scores, details = {}, {}
            for one, kept in files.items():
                scores[one], how = _read(kept)
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


def _models(config: EvalConfig) -> dict[str, Scored]:
    """What to score, by the name of its folder: after and before of a run, or the model alone."""
    found: dict[str, Scored] = {}
    if config.run is None:
        path = fetch(locate(config.model.path))
        found["model"] = Scored(path, config.model, weights_hash(path))
    else:
        run = finished(config.run)
        sealed = read_config(run).model
        own = replace(config.model, name=sealed.name)
        if "after" in config.models and not run.model.is_dir():
            raise UserError(f"The run in {config.run} has no model (method.save_model=false?). Use models=[before].")
        for when in config.models:
            path = run.model if when == "after" else fetch(locate(sealed.path))
            found[when] = Scored(path, own, weights_hash(path), shared=when == "before")
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
