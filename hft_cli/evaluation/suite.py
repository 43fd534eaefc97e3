"""A suite, read and checked: which rows, benchmarks and probes it scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import BenchmarkConfig, ProbeConfig, SuiteConfig
from hft_cli.data.rows import content_hash, read_chats
from hft_cli.errors import UserError, choose
from hft_cli.evaluation import benchmarks, probe
from hft_cli.evaluation.benchmarks import BENCHMARKS
from hft_cli.files import read_json
from hft_cli.launch.jobs import RowsTask
from hft_cli.paths import resolve_path


@dataclass(frozen=True)
class Suite:
    """A suite, checked: what it scores by name, and the hash of each one's rows ("hub" where they come from there)."""

    suite: SuiteConfig
    tasks: dict[str, RowsTask]  # sets of rows, by exact match
    benchmarks: dict[str, BenchmarkConfig | None]  # None: a task by the harness's name
    probes: dict[str, ProbeConfig]
    rows: dict[str, str]
    left_out: tuple[str, ...]


def read_suite(suite: SuiteConfig) -> Suite:
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
    tasks = {name: RowsTask(suite.tasks[name]) for name in _wanted(suite, suite.tasks)}
    return Suite(
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


def _rows(task: RowsTask) -> str:
    return content_hash(read_chats(resolve_path(task.path), format=task.format, split="test"))


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
