"""Files of scores: written by workers, read by the parent, and cached for all runs that start from the same model.

NAME.json holds the scores of a task, for benchmarks and probes with details of how they were computed. NAME.jsonl
beside it holds the items, one in a line.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import fsum, isclose
from operator import mul
from pathlib import Path
from typing import Any

from hft_cli.files import finite, hash_values, read_json, write_json, write_text
from hft_cli.launch.environment import environment
from hft_cli.paths import user_cache
from hft_cli.text import plural

logger = logging.getLogger(__name__)


def write_scores(file: Path, scores: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
    """Write the items, then the scores: a task whose scores exist is complete."""
    lines = (json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
    write_text(file.with_suffix(".jsonl"), "".join(lines))
    write_json(file, scores)


def read_scores(file: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Metric -> value, and the details of how the scores were computed; no details for a set of rows."""
    values: dict[str, Any] = read_json(file)
    if "scores" not in values:
        return values, {}
    return values["scores"], {key: value for key, value in values.items() if key != "scores"}


def read_items(path: Path | None, metric: str) -> dict[Any, tuple[float, str]]:
    """Row -> its score, and its part: the task of a benchmark, the relation of a probe, else "".

    Empty if there is no such file, or if a line of it is broken.
    """
    if path is None:
        return {}
    try:
        # Not by splitlines: a text may hold U+0085, U+2028 or U+2029, at which that would divide a line.
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        parts = [str(line.get("task", line.get("relation", ""))) for line in lines]
        return {line.get("row", i): (finite(line[metric]), parts[i]) for i, line in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def weights_of(parts: Sequence[str], scores: Iterable[tuple[Sequence[float], float]]) -> list[float] | None:
    """The weights of items in the mean that a score is; None without items, or if no such mean is the score.

    Args:
        parts: of each item.
        scores: of each model, the scores of the items and their mean, which is that over items or over parts.
    """
    sizes, scores = Counter(parts), list(scores)
    for weights in ([1.0] * len(parts), [1 / sizes[part] for part in parts]):
        if weights and all(
            isclose(fsum(map(mul, values, weights)) / fsum(weights), score, rel_tol=1e-6, abs_tol=1e-9)
            for values, score in scores
        ):
            return weights
    return None


def conditions(details: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores of a task must have in common to be compared, besides settings of the model."""
    found = {key: details[key] for key in ("rows_sha256", "chat", "limit", "settings") if key in details}
    if isinstance(found.get("settings"), Mapping):  # the content of files counts, which has a hash, not their place
        unequal = ("facts", "patterns", "source")
        found["settings"] = {key: value for key, value in found["settings"].items() if key not in unequal}
    return found


def notes_on(name: str, scores: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """What one must know to read a score: rows that were left out or cut, parts without rows, other levels."""
    both, notes = {**scores, **details}, []
    if long := both.get("items_too_long"):
        rows = int(long + both["items"])
        notes.append(f"{name}: {long} of {plural(rows, 'row')} have no score, because the model takes no more tokens.")
    if cut := both.get("prompts_cut"):
        notes.append(f"{name}: {plural(cut, 'prompt')} lost the start, because the model takes no more tokens.")
    if unfinished := both.get("reasoning_unfinished"):
        answers = plural(unfinished, "answer")
        notes.append(f"{name}: {answers} ended within the reasoning and count as wrong (generation.max_new_tokens).")
    if missing := details.get("tasks_without_rows"):
        parts = max(len(details.get("tasks", ())), 1)
        notes.append(f"{name}: {parts} of {parts + len(missing)} tasks have rows in suite.data_dir.")
    if "commonest" in scores:
        other = f", {scores['other_subject']:.1%} when asked about another subject" if "other_subject" in scores else ""
        notes.append(
            f"{name}: {scores['chance']:.1%} by drawing an answer, {scores['commonest']:.1%} by naming each relation's "
            f"commonest object{other}."
        )
    return notes


def cache_folder() -> Path:
    """The folder of the cached scores."""
    return user_cache() / "scores"


def cache_key(*dependencies: Any) -> str:
    """The name of scores in the cache: a hash of plain values, and of versions and hardware of this machine."""
    machine = {name: value for name, value in environment().items() if name in ("gpus", "packages", "hft")}
    return hash_values(*dependencies, machine)


def copy_from_cache(keys: Mapping[Path, str]) -> int:
    """Copy cached scores to those files that do not exist, and return how many were copied."""
    copied = 0
    for file, key in keys.items():
        cached = cache_folder() / f"{key}.json"
        if cached.exists() and not file.exists():
            _copy(cached, file)
            copied += 1
    return copied


def add_to_cache(keys: Mapping[Path, str]) -> None:
    """Copy files of scores to the cache, each under its key. A cache that cannot be written costs time only."""
    for file, key in keys.items():
        cached = cache_folder() / f"{key}.json"
        try:
            if not cached.exists():
                _copy(file, cached)
        except OSError as error:
            logger.warning(
                f"Scores are not kept for other runs: {cache_folder()} cannot be written ({error.strerror}). Set "
                "XDG_CACHE_HOME to a folder that can be written."
            )
            return


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target.with_suffix(".jsonl"), source.with_suffix(".jsonl").read_text(encoding="utf-8"))
    write_json(target, read_json(source))
