"""Rows -> a data set, on all cores, kept in the cache by rows, tokenizer, template and settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hft_cli.data.store import Rows, cache_folder, key_of, made

BATCH = 1000  # rows tokenized at a time: enough for the threads of the tokenizer, few enough to hold with offsets

PARALLEL = 4 * BATCH  # rows from which on further processes are worth their start

Columns = dict[str, list[Any]]


def prepare(
    rows: Sequence[Any], work: Callable[[Sequence[Any], Sequence[str]], Columns], features: Any, where: str, *facts: Any
) -> Any:
    """A `datasets.Dataset` of what `work` makes of the rows, one row for each.

    Args:
        rows: if they are `Rows`, the result is found in the cache or put there, and not held in memory.
        work: (rows of a batch, their names in errors) -> columns. It is sent to other processes.
        features: of `datasets`, the types of the columns.
        where: the name of the rows in errors, if they are not `Rows`, which know their files and lines.
        facts: all that the result depends on besides the rows.

    Raises:
        UserError: from `work`.
    """
    import datasets

    if not isinstance(rows, Rows):
        parts = []
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            columns = work(batch, [f"{where}, example {start + number}" for number in range(1, len(batch) + 1)])
            parts.append(datasets.Dataset.from_dict(columns, features=features))
        return datasets.concatenate_datasets(parts)

    def make(folder: Path) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        numbers = datasets.Dataset.from_dict({"number": range(len(rows))})
        numbers.map(
            _Batches(rows, work),
            batched=True,
            batch_size=BATCH,
            remove_columns=["number"],
            features=features,
            desc="tokenizing",
            num_proc=cores if len(rows) >= PARALLEL else None,
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=folder.name.replace(".", "-"),  # otherwise all rows are hashed
        )

    key = key_of(rows.sha256(), *facts, [version(name) for name in ("transformers", "tokenizers", "jinja2")])
    folder = made(cache_folder() / "tokens" / key, make)
    files = sorted(folder.glob("*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


@dataclass(frozen=True)
class _Batches:
    """Work on the rows whose numbers are given."""

    rows: Rows[Any]
    work: Callable[[Sequence[Any], Sequence[str]], Columns]

    def __call__(self, batch: dict[str, list[int]]) -> Columns:
        part = self.rows.select(batch["number"])
        return self.work(list(part), list(part.places()))


def tokenizer_key(tokenizer: Any) -> str:
    """A hash of all that a tokenizer does to a text, and of its chat templates."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = repr((type(tokenizer).__name__, backend, special, str(tokenizer.chat_template)))
    return hashlib.sha256(text.encode()).hexdigest()
