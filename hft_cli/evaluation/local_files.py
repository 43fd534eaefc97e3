"""Rows of benchmarks from local files (suite.data_dir), in the shapes of the data sets on the hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError
from hft_cli.evaluation.benchmarks import BENCHMARKS, Row


def available_parts(name: str, data_dir: Path) -> tuple[str, ...]:
    """The parts of a benchmark (such as MMLU's subjects) whose scored rows are in `data_dir`; ("",) if it has none.

    Raises:
        UserError: if the benchmark's folder or files are missing.
    """
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.folder
    patterns = benchmark.files[benchmark.scored_split]
    required = " or ".join(patterns)
    if not folder.is_dir():
        folders = sorted(path.name for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
        problem = f"has no folder {benchmark.folder}" if data_dir.is_dir() else "is not a folder"
        raise UserError(
            f"suite.data_dir={data_dir} {problem}, which {name} needs (it has: {', '.join(folders) or 'no folders'}). "
            f"Put {required} there, or leave {name} out (suite.only=[…])."
        )
    if "*" not in required and _find_file(folder, patterns, "") is not None:
        return benchmark.parts or ("",)
    for pattern in patterns:
        names = sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
        if names:
            before, _, after = pattern.partition("*")
            return tuple(name.removeprefix(before).removesuffix(after) for name in names)
    raise UserError(f"{folder} has no {required}, which {name} needs.")


def files_hash(name: str, data_dir: Path) -> str:
    """SHA-256 over the names and contents of a benchmark's files."""
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.folder
    files = {
        path
        for part in available_parts(name, data_dir)
        for patterns in benchmark.files.values()
        if (path := _find_file(folder, patterns, part)) is not None
    }
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_splits(name: str, part: str, data_dir: Path, examples: int) -> dict[str, list[Row]]:
    """Read one part of a benchmark as split -> rows; a split without a file is left out.

    If a benchmark with `takes_examples_from_scored` has fewer than `examples` training rows, the last rows of the
    scored split become the training split and are not scored. The result is empty if no row to score remains.

    Raises:
        UserError: if a file does not have the expected shape.
    """
    benchmark = BENCHMARKS[name]
    splits: dict[str, list[Row]] = {}
    for split, patterns in benchmark.files.items():
        path = _find_file(data_dir / benchmark.folder, patterns, part)
        if path is None:
            continue
        try:
            splits[split] = benchmark.read_rows(_read_content(path), part)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not have the shape of {name}: {type(error).__name__}: {error}") from None
    scored_rows = splits.get(benchmark.scored_split, [])
    if benchmark.takes_examples_from_scored and len(splits.get("train", ())) < examples:
        splits["train"], splits[benchmark.scored_split] = scored_rows[-examples:], scored_rows[:-examples]
    return splits if splits.get(benchmark.scored_split) else {}


def _find_file(folder: Path, patterns: tuple[str, ...], part: str) -> Path | None:
    names = (pattern.replace("*", part) for pattern in patterns)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_content(path: Path) -> Any:
    """The content of a file: a JSON value, a list of JSON lines, or a list of CSV records."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    extension = path.name.removesuffix(".gz").rpartition(".")[2]
    if extension == "csv":
        return list(csv.reader(io.StringIO(text, newline="")))
    if extension == "jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)
