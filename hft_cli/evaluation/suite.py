"""A suite, read and checked: which sets of rows, benchmarks and probes it scores."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import BenchmarkConfig, ProbeConfig, SuiteConfig
from hft_cli.data.model_template import stored_template
from hft_cli.data.rows import read_chats
from hft_cli.errors import UserError, choose
from hft_cli.evaluation import local_files, probe, texts
from hft_cli.evaluation.benchmarks import BENCHMARKS, benchmark_settings
from hft_cli.evaluation.vllm_engine import check_backend
from hft_cli.launch.jobs import RowsTask
from hft_cli.paths import expanded, resolve_path


@dataclass(frozen=True)
class Suite:
    """A checked suite.

    Attributes:
        config: its settings.
        tasks: name -> set of rows, scored by exact match, or of texts.
        benchmarks: name -> settings; None for a task of lm-evaluation-harness without settings of ours.
        probes: name -> settings with resolved paths.
        hashes: name -> hash of the rows; "hub" if the rows come from there.
        left_out: what is not scored, and why.
    """

    config: SuiteConfig
    tasks: dict[str, RowsTask]
    benchmarks: dict[str, BenchmarkConfig | None]
    probes: dict[str, ProbeConfig]
    hashes: dict[str, str]
    left_out: tuple[str, ...]


def read_suite(config: SuiteConfig) -> Suite:
    """Check the settings of a suite, and find and read its files.

    Raises:
        UserError: for a missing file or package, or a setting that cannot work.
    """
    names = [*config.tasks, *config.text, *config.benchmarks, *config.probe, *config.harness]
    for name in config.only:
        choose(f"benchmark of suite={config.name}", name, names)
    if config.data_dir is not None and config.harness:
        raise UserError(
            f"suite.harness={config.harness} names tasks whose rows come from the hub: leave out suite.data_dir."
        )
    benchmarks = {
        name: benchmark_settings(name, config.benchmarks[name]) for name in _wanted(config, config.benchmarks)
    }
    harness = _wanted(config, config.harness)
    if (benchmarks or harness) and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"suite={config.name} needs lm-evaluation-harness, which is not installed: pip install 'hft-cli[eval]'"
        )
    if benchmarks or harness:
        check_backend("suite.backend", config.backend)
    _check_code(config, benchmarks, names)
    data_dir = None if config.data_dir is None else expanded(config.data_dir)
    probes, left_out = _read_probes(config, data_dir)
    if both := sorted(config.tasks.keys() & config.text.keys()):
        raise UserError(f"suite.tasks and suite.text both have {both[0]}: give another name to one of them.")
    tasks = {name: RowsTask(config.tasks[name], special_tokens="text") for name in _wanted(config, config.tasks)}
    tasks |= {name: RowsTask(config.text[name], texts.METRIC) for name in _wanted(config, config.text)}
    return Suite(
        config=config,
        tasks=tasks,
        benchmarks={**benchmarks, **dict.fromkeys(harness)},
        probes=probes,
        hashes={
            **{name: rows_hash(task) for name, task in tasks.items()},
            **{name: "hub" if data_dir is None else local_files.files_hash(name, data_dir) for name in benchmarks},
            **dict.fromkeys(harness, _task_files_hash(config.include_path)),
            **{name: probe.files_hash(settings) for name, settings in probes.items()},
        },
        left_out=left_out,
    )


def _task_files_hash(include_path: str | None) -> str:
    """Hash of all files in suite.include_path, task files and rows; "hub" without one.

    Raises:
        UserError: if there is no such folder, or it has no task file.
    """
    if include_path is None:
        return "hub"
    folder = expanded(include_path)
    if not folder.is_dir():
        raise UserError(f"suite.include_path={include_path} is no folder.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if not any(path.suffix in (".yaml", ".yml") for path in files):
        raise UserError(f"suite.include_path={include_path} has no task file (.yaml) of lm-evaluation-harness.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _wanted(config: SuiteConfig, names: Iterable[str]) -> list[str]:
    return [name for name in names if not config.only or name in config.only]


def _check_code(config: SuiteConfig, benchmarks: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a benchmark that runs programs of the model without the user's consent."""
    runs_code = [name for name in benchmarks if BENCHMARKS[name].runs_code]
    allowed = config.allow_code.lower()
    if runs_code and allowed == "true" and os.getuid() == 0:
        raise UserError(
            f"{runs_code[0]} runs programs that the model writes, and you are root. Start hft as another user, or set "
            "suite.allow_code=root if nothing on this machine is worth protecting (in a container, for example)."
        )
    if runs_code and allowed == "false":
        others = [name for name in _wanted(config, names) if name not in runs_code]
        raise UserError(
            f"{runs_code[0]} runs programs that the model writes. Set suite.allow_code=true if you accept that (for "
            f"the limits see hft_cli/evaluation/README.md), or leave it out: suite.only=[{','.join(others)}]"
        )


def _read_probes(config: SuiteConfig, data_dir: Path | None) -> tuple[dict[str, ProbeConfig], tuple[str, ...]]:
    """The probes, and what is left out."""
    probes, left_out = {}, []
    for name in _wanted(config, config.probe):
        settings = probe.probe_settings(name, config.probe[name], data_dir)
        if settings is None:
            left_out.append(f"{name}, whose files are looked for in suite.data_dir, which is not set")
            continue
        if not probe.read_relations(settings):
            raise UserError(f"There is no fact in {settings.facts} with a pattern that ends in its object.")
        probes[f"{name}_ranking"] = settings  # a set of rows may have the same name
    return probes, tuple(left_out)


def rows_hash(task: RowsTask) -> str:
    """SHA-256 of the rows of a task."""
    if task.metric == texts.METRIC:
        return hashlib.sha256("\0".join(texts.read_texts(resolve_path(task.path), task.hub)).encode()).hexdigest()
    return read_chats(resolve_path(task.path), format=task.format, split="test", hub=task.hub).sha256()


def uses_chat_template(suite: SuiteConfig, model: ModelConfig, folder: Path) -> bool:
    """Whether prompts of benchmarks go through the model's chat template. Does not load the tokenizer.

    Raises:
        UserError: for suite.chat=true and a model without a chat template.
    """
    choice, has_template = suite.chat.lower(), bool(stored_template(model, folder))
    if choice == "true" and not has_template:
        raise UserError(f"suite.chat=true, but {folder} has no chat template. Set model.chat_template=tulu|plain|PATH.")
    return has_template and choice != "false"
