"""Rows -> a data set, on all cores, kept in the cache by rows, tokenizer, template and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hft_cli.data.bad_rows import BadRows
from hft_cli.data.store import Rows, cache_folder, key_of, made
from hft_cli.errors import UserError

BATCH = 1000  # rows tokenized at a time: enough for the threads of the tokenizer, few enough to hold with offsets

PARALLEL = 4 * BATCH  # rows from which on further processes are worth their start

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Work:
    """What is done with rows, on which everything but the rows depends.

    Attributes:
        function: (rows of a batch, their names in errors) -> columns, one value for each row. It is sent to other
            processes. A UserError that begins with the name of a row says that the row is bad.
        features: of `datasets`, the types of the columns.
        key: all that the result depends on besides the rows.
        where: the name of the rows in errors, if they are not `Rows`, which know their files and lines.
        bad_rows: a value of `data.bad_rows`.
    """

    function: Callable[[Sequence[Any], Sequence[str]], Columns]
    features: Any
    key: Sequence[Any]
    where: str
    bad_rows: str = "stop"

    def columns(self, rows: Sequence[Any], places: Sequence[str], bad: BadRows) -> Columns:
        """The columns of a batch, without its bad rows, which are added to `bad`."""
        try:
            return self.function(rows, places)
        except UserError as error:
            if len(rows) == 1:
                if not str(error).startswith(places[0]):
                    raise  # of the template, not of the row
                bad.add(places[0], error)
                return {name: [] for name in self.features}
        parts = [self.columns([row], [place], bad) for row, place in zip(rows, places, strict=True)]
        return {name: [value for part in parts for value in part[name]] for name in self.features}


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
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        places = [f"{work.where}, example {start + number}" for number in range(1, len(batch) + 1)]
        parts.append(datasets.Dataset.from_dict(work.columns(batch, places, bad), features=work.features))
    return datasets.concatenate_datasets(parts)


def _in_cache(rows: Rows[Any], work: Work, bad: BadRows) -> Any:
    import datasets

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
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
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
        part, bad = self.rows.select(batch["number"]), BadRows()
        places = list(part.places())
        columns = self.work.columns(list(part), places, bad)
        if bad.rows:
            number = dict(zip(places, batch["number"], strict=True))
            with (self.folder / f"bad-{os.getpid()}.jsonl").open("a") as file:
                file.writelines(json.dumps([number[place], reason]) + "\n" for place, reason in bad.rows)
        return columns


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that a tokenizer does to a text, and of its chat templates."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = repr((type(tokenizer).__name__, backend, special, str(tokenizer.chat_template)))
    return hashlib.sha256(text.encode()).hexdigest()
