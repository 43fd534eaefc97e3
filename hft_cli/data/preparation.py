"""Rows -> a data set, on all cores, kept in the cache by rows, tokenizer, template and settings."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hft_cli.data.bad_rows import BadRow, BadRows, reason_of, try_rows
from hft_cli.data.encoding import BATCH, batches
from hft_cli.data.store import Rows, cache_folder, key_of, made

PARALLEL = 4 * BATCH  # rows from which on further processes are worth their start

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Work:
    """What is done with rows, on which everything but the rows depends.

    Attributes:
        function: (rows of a batch, their names in errors) -> a result for each. It is sent to other processes. A
            UserError that begins with the name of a row says that the row is bad.
        columns: results -> columns, one value for each.
        features: of `datasets`, the types of the columns.
        key: all that the result depends on besides the rows.
        where: the name of the rows in errors, if they are not `Rows`, which know their files and lines.
        bad_rows: a value of `data.bad_rows`.
    """

    function: Callable[[Sequence[Any], Sequence[str]], Sequence[Any]]
    columns: Callable[[Sequence[Any]], Columns]
    features: Any
    key: Sequence[Any]
    where: str
    bad_rows: str = "stop"

    def __call__(self, rows: Sequence[Any], places: Sequence[str]) -> tuple[Columns, list[tuple[int, str]]]:
        """The columns of a batch without its bad rows; and these, by their index, with the reason."""
        results = try_rows(self.function, rows, places)
        bad = [(i, reason_of(places[i], each.error)) for i, each in enumerate(results) if isinstance(each, BadRow)]
        return self.columns([each for each in results if not isinstance(each, BadRow)]), bad


def prepare(rows: Sequence[Any], work: Work) -> tuple[Any, list[tuple[str, str]]]:
    """A `datasets.Dataset` of what `work` makes of the rows, one row for each, and place and reason of the bad rows.

    If the rows are `Rows`, the result is found in the cache or put there, and not held in memory.

    Raises:
        UserError: from `work`, or for bad rows.
    """
    bad = BadRows()
    dataset = _in_cache(rows, work, bad) if isinstance(rows, Rows) else _in_memory(rows, work, bad)
    bad.refuse(work.bad_rows, len(rows), work.where)
    return dataset, bad.rows


def _in_memory(rows: Sequence[Any], work: Work, bad: BadRows) -> Any:
    import datasets

    parts = []
    for batch, places in batches(rows, work.where):
        columns, bad_rows = work(batch, places)
        parts.append(datasets.Dataset.from_dict(columns, features=work.features))
        for index, reason in bad_rows:
            bad.add(places[index], reason)
    return datasets.concatenate_datasets(parts)


def _in_cache(rows: Rows[Any], work: Work, bad: BadRows) -> Any:
    import datasets

    if not sys.stderr.isatty():  # a log, or the text for another program
        datasets.disable_progress_bars()

    def make(folder: Path) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        numbers = datasets.Dataset.from_dict({"number": range(len(rows))})
        numbers.map(
            _Batches(rows, work, folder),
            batched=True,
            batch_size=BATCH,
            remove_columns=["number"],
            features=work.features,
            desc="tokenizing",
            num_proc=cores if len(rows) >= PARALLEL else None,
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=folder.name.replace(".", "-"),  # otherwise all rows are hashed
        )

    key = key_of(rows.sha256(), *work.key, [version(name) for name in ("transformers", "tokenizers", "jinja2")])
    folder = made(cache_folder() / "tokens" / key, make)
    places = list(rows.places()) if (files := sorted(folder.glob("bad-*.jsonl"))) else []
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for number, reason in sorted(lines):
        bad.add(places[number], reason)
    parts = [datasets.Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
    return datasets.concatenate_datasets(parts)


@dataclass(frozen=True)
class _Batches:
    """Work on the rows whose numbers are given. Bad rows are written into a file of the process."""

    rows: Rows[Any]
    work: Work
    folder: Path

    def __call__(self, batch: dict[str, list[int]]) -> Columns:
        part = self.rows.select(batch["number"])
        columns, bad_rows = self.work(list(part), list(part.places()))
        if bad_rows:
            with (self.folder / f"bad-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([batch["number"][index], reason]) + "\n" for index, reason in bad_rows)
        return columns


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that a tokenizer does to a text, and of its chat templates."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = repr((type(tokenizer).__name__, backend, special, str(tokenizer.chat_template)))
    return hashlib.sha256(text.encode()).hexdigest()
