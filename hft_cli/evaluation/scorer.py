"""What a suite asks for, checked, and the scores of a model on it: for `hft train` (runner) and `hft eval` (below).

Below RUN/eval or OUTPUT_DIR/eval, where WHEN is before, after, round-NN, or model:

    WHEN/SUITE/NAME.json        scores of a set of rows, a benchmark or a probe; of the last two how they were had, too
    WHEN/SUITE/NAME.jsonl       its items, one a line: `row` is its name, and its score stands under the metric's name
    WHEN/SUITE/NAME-KEY.json    the same of `hft eval`; KEY is the hash of all that the scores hang on
    SUITE.json                  of `hft eval`: the scores of each model, and how they were had
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import COMPANION_SUFFIXES
from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import ProbeConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.evaluation import score_cache
from hft_cli.evaluation.suite import Suite, _rows, uses_template
from hft_cli.files import read_json
from hft_cli.launch.jobs import HarnessJob, HarnessTask, ProbeJob, RowsJob, RowsTask
from hft_cli.launch.worker import WorkerRun, run_worker
from hft_cli.run_dir import RoundDir

logger = logging.getLogger(__name__)

VERSION = 2  # of how benchmarks and probes are scored: a higher one scores anew


@dataclass(frozen=True)
class ScoredModel:
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
    what: RowsTask | HarnessTask | ProbeConfig
    hangs_on: tuple[Any, ...]


Files = dict[str, dict[str, Path]]  # suite -> name -> file of scores


def score(
    asked: Suite,
    model: ScoredModel,
    folder: RoundDir,
    *,
    tests: Mapping[str, RowsTask] | None = None,
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
        keys = {files[c.suite, c.name]: score_cache.key(identity, c.hangs_on, asked.suite.batch_size) for c in cells}
        if taken := score_cache.take(keys):
            logger.info(
                f"The start has been scored before: {taken} of {len(cells)} tasks taken from {score_cache.kept()}."
            )
    new = [(cell, files[cell.suite, cell.name]) for cell in cells if not files[cell.suite, cell.name].exists()]
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    _score_rows(new, asked, model, folder, generation or GenerationConfig(), seed, meanwhile)
    _score_benchmarks(new, asked, model, folder, ranks, meanwhile)
    _score_probes(new, asked, model, folder, ranks, meanwhile)
    score_cache.add(keys)
    found: Files = {}
    for (suite_name, name), file in files.items():
        found.setdefault(suite_name, {})[name] = file
    return found


def scores_of(files: Files) -> dict[str, dict[str, Any]]:
    """Suite -> name -> metric -> value, its own metric first."""
    return {suite: {name: read(file)[0] for name, file in own.items()} for suite, own in files.items()}


def read(file: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """A file's scores, and how they were had; the latter is empty for a set of rows."""
    one: dict[str, Any] = read_json(file)
    return (one["scores"], {key: one[key] for key in one if key != "scores"}) if "scores" in one else (one, {})


def _cells(asked: Suite, model: ScoredModel, tests: Mapping[str, RowsTask], generated: list[Any]) -> list[_Cell]:
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
        todo = HarnessTask(name, settings, limit, chat, "")
        how = {**asdict(todo), "settings": {**(settings or {}), "source": ""}}
        cells.append(_Cell(suite.name, name, todo, ("benchmark", VERSION, how, asked.rows[name], seed, harness)))
    for name, one in asked.probes.items():
        without = replace(one, facts="", patterns=None)  # what is there counts, and not where
        how = {**asdict(without), "limit": suite.limit, "chat": template, "seed": suite.seed}
        cells.append(_Cell(suite.name, name, one, ("probe", VERSION, how, asked.rows[name])))
    return cells


def _identity(model: ScoredModel) -> dict[str, Any]:
    """What any score hangs on: the weights, and all beside them that says how they are used."""
    template = model.config.chat_template
    own = Path(template).expanduser() if template else None
    return {
        "weights": model.weights,
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(model.path.iterdir())
            if path.is_file() and path.suffix in COMPANION_SUFFIXES
        },
        "template": own.read_text() if own and own.is_file() else template,
        "model": [model.config.dtype, model.config.attention],
    }


def _score_rows(
    new: list[tuple[_Cell, Path]],
    asked: Suite,
    model: ScoredModel,
    folder: RoundDir,
    generation: GenerationConfig,
    seed: int,
    meanwhile: Callable[[], None],
) -> None:
    tasks: dict[str, dict[str, RowsTask]] = {}
    for cell, file in new:
        if isinstance(cell.what, RowsTask):
            tasks.setdefault(cell.suite, {})[file.stem] = cell.what
    if not tasks:
        return
    job = RowsJob(
        model=model.config,
        path=str(model.path),
        tasks=tasks,
        batch_size=asked.suite.batch_size,
        generation=generation,
        seed=seed,
        base=model.base,
        reset=model.reset,
    )
    run_worker(WorkerRun(job, folder, f"Scoring {folder.folder.name}"), meanwhile)


def _score_benchmarks(
    new: list[tuple[_Cell, Path]],
    asked: Suite,
    model: ScoredModel,
    folder: RoundDir,
    ranks: int,
    meanwhile: Callable[[], None],
) -> None:
    todo = [replace(cell.what, out=str(file)) for cell, file in new if isinstance(cell.what, HarnessTask)]
    if not todo:
        return
    data_dir = asked.suite.data_dir
    job = HarnessJob(
        model=model.config,
        path=str(model.path),
        todo=tuple(todo),
        data_dir=None if data_dir is None else str(Path(data_dir).expanduser().resolve()),
        batch_size=asked.suite.batch_size,
        seed=asked.suite.seed,
    )
    label = f"Scoring {folder.folder.name}: {', '.join(one.name for one in todo)}"
    run_worker(WorkerRun(job, folder, label, ranks if ranks > 1 else None), meanwhile)


def _score_probes(
    new: list[tuple[_Cell, Path]],
    asked: Suite,
    model: ScoredModel,
    folder: RoundDir,
    ranks: int,
    meanwhile: Callable[[], None],
) -> None:
    probes = {cell.name: (cell.what, file) for cell, file in new if isinstance(cell.what, ProbeConfig)}
    if not probes:
        return
    job = ProbeJob(
        model=model.config,
        path=str(model.path),
        probes={name: config for name, (config, _) in probes.items()},
        outs={name: str(file) for name, (_, file) in probes.items()},
        limit=asked.suite.limit,
        chat=uses_template(asked.suite, model.config, model.path),
        batch_size=asked.suite.batch_size,
        seed=asked.suite.seed,
    )
    label = f"Scoring {folder.folder.name}: {', '.join(probes)}"
    run_worker(WorkerRun(job, folder, label, ranks if ranks > 1 else None), meanwhile)


def _hash(*parts: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
