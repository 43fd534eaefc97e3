"""Score a model on a suite, for `hft train` and `hft eval`.

Below RUN/eval or OUTPUT_DIR/eval, where WHEN is before, after, round-NN or model:

    WHEN/SUITE/NAME.json        scores of a set of rows, a benchmark or a probe
    WHEN/SUITE/NAME.jsonl       its items, one in a line: `row` is the item's name; its score has the metric's name
    WHEN/SUITE/NAME-KEY.json    the same for `hft eval`; KEY is a hash of everything that the scores depend on
    SUITE.json                  `hft eval`: scores of each model, and how they were computed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from hft_cli.checkpoint.folders import companion_hashes
from hft_cli.config.schema import ModelConfig
from hft_cli.config.settings import FORCED_METRICS
from hft_cli.config.suites import BenchmarkConfig, ProbeConfig
from hft_cli.config.training import GenerationConfig
from hft_cli.evaluation import texts
from hft_cli.evaluation.score_files import (
    add_to_cache,
    cache_folder,
    cache_key,
    copy_from_cache,
    read_scores,
)
from hft_cli.evaluation.suite import Suite, rows_hash, uses_chat_template
from hft_cli.files import hash_values
from hft_cli.launch.environment import gpus
from hft_cli.launch.jobs import HarnessJob, HarnessTask, ProbeJob, RowsJob, RowsTask
from hft_cli.launch.worker import WorkerRun, run_worker
from hft_cli.paths import expanded
from hft_cli.run_dir import RoundDir

logger = logging.getLogger(__name__)

# Of how benchmarks and probes are scored, and of how rows are; with a higher one, earlier scores are not used.
VERSION = 2
ROWS_VERSION = 2


@dataclass(frozen=True)
class ScoredModel:
    """A model to score.

    Attributes:
        weights: hash of its weights; required for `shared` and for keyed file names.
        shared: whether its scores are cached for other runs.
        base: folder of a model; in memory, the parameters in `kept` go back to its values and keep this share of their
            change.
    """

    path: Path
    config: ModelConfig
    weights: str | None = None
    shared: bool = False
    base: str | None = None
    kept: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOutSets:
    """Test sets of the training data (name -> rows and metric), and how answers to them are generated."""

    tasks: Mapping[str, RowsTask] = field(default_factory=dict)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int = 0


@dataclass(frozen=True)
class WorkerOptions:
    """How workers are run: their ranks (one for sets of rows without GPUs), and a function that is called meanwhile."""

    ranks: int = 1
    poll: Callable[[], None] = lambda: None


Files = dict[str, dict[str, Path]]
"""Suite -> name -> file of scores."""


@dataclass(frozen=True)
class _Entry:
    """One thing to score, and what its scores depend on besides the model."""

    suite: str
    name: str
    task: RowsTask | HarnessTask | ProbeConfig
    dependencies: tuple[Any, ...]


def score(
    suite: Suite,
    model: ScoredModel,
    folder: RoundDir,
    tests: HeldOutSets | None = None,
    keyed: bool = False,
    workers: WorkerOptions | None = None,
) -> Files:
    """Score a model on a suite and on test sets. Tasks whose scores are in `folder` are skipped.

    Args:
        keyed: the names of the files contain a hash of what the scores depend on.

    Raises:
        UserError: for a mistake that only a worker could see.
        subprocess.CalledProcessError: if a worker fails.
    """
    tests, workers = tests or HeldOutSets(), workers or WorkerOptions()
    entries = _entries(suite, model, tests)
    if not entries:
        return {}
    identity = model_identity(model)
    files: Files = {}
    by_file: dict[Path, _Entry] = {}
    for entry in entries:
        stem = f"{entry.name}-{hash_values(identity, entry.dependencies)[:12]}" if keyed else entry.name
        file = folder.score(entry.suite, stem)
        files.setdefault(entry.suite, {})[entry.name] = file
        by_file[file] = entry
        file.parent.mkdir(parents=True, exist_ok=True)
    keys: dict[Path, str] = {}
    if model.shared:
        # The batch size changes the last bits of the logits, which may decide between two tokens.
        batch_size = suite.config.batch_size
        keys = {file: cache_key(identity, entry.dependencies, batch_size) for file, entry in by_file.items()}
        if copied := copy_from_cache(keys):
            logger.info("%d of %d scores of the initial model are taken from %s.", copied, len(keys), cache_folder())
    pending = {file: entry for file, entry in by_file.items() if not file.exists()}
    for run in _worker_runs(pending, suite, model, folder, tests, workers.ranks):
        run_worker(run, workers.poll)
    add_to_cache(keys)
    return files


def scores_of(files: Files) -> dict[str, dict[str, Any]]:
    """Suite -> name -> metric -> value, the main metric first."""
    return {
        suite: {name: read_scores(file)[0] for name, file in suite_files.items()}
        for suite, suite_files in files.items()
    }


def _entries(suite: Suite, model: ScoredModel, tests: HeldOutSets) -> list[_Entry]:
    config = suite.config
    entries = [_rows_entry(config.name, name, task, suite.hashes[name], tests) for name, task in suite.tasks.items()]
    entries += [_rows_entry("data", name, task, rows_hash(task), tests) for name, task in tests.tasks.items()]
    if suite.benchmarks or suite.probes:
        chat = uses_chat_template(config, model.config, model.path)
        entries += [_benchmark_entry(suite, name, settings, chat) for name, settings in suite.benchmarks.items()]
        entries += [_probe_entry(suite, name, settings, chat) for name, settings in suite.probes.items()]
    return entries


def _rows_entry(suite: str, name: str, task: RowsTask, rows: str, tests: HeldOutSets) -> _Entry:
    generation = None
    if _generates(task):
        settings = {key: value for key, value in asdict(tests.generation).items() if key != "backend"}
        generation = [settings, tests.seed, *_backend(tests.generation.backend)]
    return _Entry(suite, name, task, ("rows", ROWS_VERSION, task.metric, rows, generation))


def _generates(task: RowsTask) -> bool:
    """Whether the metric of a set of rows compares a generated answer."""
    return task.metric not in (*FORCED_METRICS, texts.METRIC)


def _backend(name: str) -> tuple[str, ...]:
    """What scores depend on besides the settings, if another program than transformers generates the answers."""
    if name == "transformers":
        return ()
    packages = metadata.packages_distributions()[name]  # vLLM for CPUs is another package of the same module
    return (name, *(f"{package} {metadata.version(package)}" for package in sorted(set(packages))))


def _benchmark_entry(suite: Suite, name: str, settings: BenchmarkConfig | None, chat: bool) -> _Entry:
    config = suite.config
    limits = (config.limit, None if settings is None else settings.limit)
    task = HarnessTask(
        name=name,
        settings=None if settings is None else asdict(settings),
        limit=min((limit for limit in limits if limit is not None), default=None),
        chat=chat and (settings is None or settings.chat or config.chat.lower() == "true"),
        out="",  # set when the job is written
    )
    description = {**asdict(task), "settings": {**(task.settings or {}), "source": ""}}
    seed = config.seed if settings is None or settings.temperature else None
    harness = metadata.version("lm-eval")
    versions = (harness, *_backend(config.backend))
    return _Entry(config.name, name, task, ("benchmark", VERSION, description, suite.hashes[name], seed, *versions))


def _probe_entry(suite: Suite, name: str, settings: ProbeConfig, chat: bool) -> _Entry:
    config = suite.config
    description = {
        **asdict(replace(settings, facts="", patterns=None)),  # the contents count, not the paths
        "limit": config.limit,
        "chat": chat,
        "seed": config.seed,
    }
    return _Entry(config.name, name, settings, ("probe", VERSION, description, suite.hashes[name]))


def model_identity(model: ScoredModel) -> dict[str, Any]:
    """What every score depends on: the weights, and the files and settings that say how they are used."""
    template, switches = model.config.chat_template, (model.config.thinking, model.config.date)
    template_file = expanded(template) if template else None
    return {
        "weights": model.weights,
        "files": companion_hashes(model.path),
        "template": template_file.read_text(encoding="utf-8")
        if template_file and template_file.is_file()
        else template,
        "model": [model.config.dtype, model.config.attention, *(each for each in switches if each is not None)],
    }


def _worker_runs(
    pending: Mapping[Path, _Entry],
    suite: Suite,
    model: ScoredModel,
    folder: RoundDir,
    tests: HeldOutSets,
    ranks: int,
) -> Iterator[WorkerRun]:
    """The workers to run one after the other: for sets of rows, for benchmarks and for probes."""
    config, label = suite.config, f"Scoring {folder.folder.name}"
    rows: dict[str, dict[str, dict[str, RowsTask]]] = {}  # by backend: vLLM loads the model for itself
    benchmarks: list[HarnessTask] = []
    probes: dict[str, ProbeConfig] = {}
    probe_files: dict[str, str] = {}
    for file, entry in pending.items():
        if isinstance(entry.task, RowsTask):
            backend = tests.generation.backend if _generates(entry.task) else "transformers"
            rows.setdefault(backend, {}).setdefault(entry.suite, {})[file.stem] = entry.task
        elif isinstance(entry.task, HarnessTask):
            benchmarks.append(replace(entry.task, out=str(file)))
        else:
            probes[entry.name], probe_files[entry.name] = entry.task, str(file)
    values: dict[str, Any] = {"model": model.config, "path": str(model.path), "batch_size": config.batch_size}
    several = ranks if ranks > 1 else None  # None: one process without torchrun
    for backend, tasks in rows.items():
        answers: dict[str, Any] = {"generation": replace(tests.generation, backend=backend), "seed": tests.seed}
        rows_job = RowsJob(**values, **answers, tasks=tasks, base=model.base, kept=dict(model.kept))
        alone = not gpus() or backend == "vllm"  # a CPU is busy with one process; vLLM has one GPU
        yield WorkerRun(rows_job, folder, label, None if alone else several)
    if benchmarks:
        folders: dict[str, Any] = {
            key: None if folder is None else str(expanded(folder).resolve())
            for key, folder in (("data_dir", config.data_dir), ("include_path", config.include_path))
        }
        names = ", ".join(task.name for task in benchmarks)
        options: dict[str, Any] = {"seed": config.seed, "backend": config.backend}
        harness_job = HarnessJob(**values, **folders, **options, todo=tuple(benchmarks))
        yield WorkerRun(harness_job, folder, f"{label}: {names}", None if config.backend == "vllm" else several)
    if probes:
        chat = uses_chat_template(config, model.config, model.path)
        options = {"limit": config.limit, "chat": chat, "seed": config.seed}
        probe_job = ProbeJob(**values, **options, probes=probes, outs=probe_files)
        yield WorkerRun(probe_job, folder, f"{label}: {', '.join(probes)}", several)
