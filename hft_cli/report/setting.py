"""The setting of a run: its configuration without seeds and folders. Runs of one setting are repetitions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.config.settings import REQUIRED, WITHOUT_TRAINING, leaves
from hft_cli.errors import UserError
from hft_cli.files import flatten, hash_values, read_json
from hft_cli.method.selection import UNDRAWN
from hft_cli.report.runs import RunRow
from hft_cli.run_dir import RunDir

# Keys of config.yaml in which the runs of one setting may differ.
IGNORED_KEYS = (
    "seed",
    "selection.seed",
    "output_dir",
    "resume",
    "model.date",
    "train.save_every",
    "train.save_minutes",
    "train.save_limit",
    "train.log_every",
)


def setting_of(run: RunDir, row: RunRow, results: Mapping[str, Any]) -> dict[str, str]:
    """The setting as text by flat key, without the keys that have no effect on this run.

    `data.sha256` is a hash of the rows: one path may name other rows in another folder, or after it was edited.

    A key that is younger than the run has its default, so that runs of two versions are of one setting.
    What results.json says goes before config.yaml, and is enough if that file is missing or broken.
    """
    written = {key: str(value) for key, value in flatten(_numbered(_read_yaml(run.config))).items()}
    values = (_defaults() if written else {}) | written
    values |= {
        "method.name": row.method, "selection.level": row.level, "selection.ratio": f"{row.ratio:g}",
        "train.learning_rate": f"{row.learning_rate}", "model.name": str(results.get("model")),
        "data.name": str(results.get("data")), "continual.name": row.continual, "data.sha256": _rows_hash(run),
    }  # fmt: skip
    unused = re.compile("|".join(_unused_keys(row, values.get("method.stages", ""))))
    return {key: value for key, value in values.items() if key not in IGNORED_KEYS and not unused.match(key)}


def _rows_hash(run: RunDir) -> str:
    """A hash of the rows of a run, of what does not depend on its seed; empty if plan.json does not say.

    These are the test rows, how many rows each file has, and the training rows of a round that takes a whole file.
    """
    try:
        rounds = [_rows_of_round(record) for record in read_json(run.plan)["rounds"]]
    except (UserError, KeyError, TypeError, AttributeError):
        return ""
    return hash_values(rounds)[:12] if any(any(each) for each in rounds) else ""


def _rows_of_round(record: Mapping[str, Any]) -> list[Any]:
    parts = record.get("parts", ())
    whole = [part["taken"] == part["read"] - part["repeats"] and not part["held_out"] for part in parts] == [True]
    return [record.get("test_sha256"), [part["read"] for part in parts], record["data_sha256"] if whole else None]


@cache
def _defaults() -> dict[str, str]:
    """Every key that has a default, as text."""
    defaults = ((key, value) for key, _, value in leaves(RunConfig) if value != REQUIRED)
    return {key: str(value) for key, value in defaults if not isinstance(value, dict)}


def _numbered(value: Any) -> Any:
    """The value with lists of objects (data.mix) as objects by number: what differs in one of them has a key."""
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(number): _numbered(item) for number, item in enumerate(value)}
    return value


def _unused_keys(row: RunRow, stages: str) -> list[str]:
    """Patterns of the keys that have no effect: the ratio where everything is updated, GEM's keys without GEM."""
    patterns = [r"continual\.score_unseen$"]
    patterns += [rf"continual\.{name}_" for name in ("replay", "gem") if name not in row.continual]
    if not row.anchor:
        patterns.append(r"anchor\.")
    if row.method != "lora":
        patterns.append(r"lora\.")
    if row.level != "importance":
        patterns.append(r"selection\.importance_")
    if row.level in UNDRAWN:
        patterns.append(r"selection\.(ratio|balance|redraw)$")
    if row.method in WITHOUT_TRAINING:
        patterns.append(r"train\.")
    if "dpo" not in stages:
        patterns.append(r"dpo\.")
    return patterns


def _read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file; empty if it is missing or broken."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is compiled in
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
