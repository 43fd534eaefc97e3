"""The rows of a round, from one set or several: chats, or preference pairs for DPO."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from hft_cli.config.schema import RunConfig
from hft_cli.data.files import Hub
from hft_cli.data.preferences import read_preferences
from hft_cli.data.rows import chat_of_answer, each_answer, read_chats
from hft_cli.data.sources import Part, Source, ValidationSet, draw_rows, row_counts
from hft_cli.data.store import Rows
from hft_cli.data.turns import Names
from hft_cli.errors import UserError
from hft_cli.paths import resolve_path


@dataclass(frozen=True)
class MixedRows:
    """The rows of a round.

    Attributes:
        rows: those to train on, source by source, each in the order of its file.
        held_out: those that a share for validation splits off.
        parts: what was taken of each source.
    """

    rows: Rows[Any]
    held_out: Rows[Any]
    parts: tuple[Part, ...]


def read_mixed(
    stage: str, sources: Sequence[Source], config: RunConfig, validation: ValidationSet | None = None
) -> MixedRows:
    """Read the rows of a round, for a stage "sft" or "dpo". What is drawn depends on the run's seed and the paths.

    Rows that are equal, and the answers of one chat, are either all trained on or all held out.

    Raises:
        UserError: for a bad row, or if no row is left.
    """
    sets = [read_source(stage, source, config) for source in sources]
    read = list(map(len, sets))
    if config.data.deduplicate:
        sets = _without_repeats(sets)
    counts = row_counts(sources, list(map(len, sets)))
    taken = []
    for source, rows, count in zip(sources, sets, counts, strict=True):
        drawn = draw_rows(len(rows), count, f"{config.seed}\0{source.path}") if rows else []
        taken.append(rows if len(drawn) == len(rows) == count else rows.select(drawn))
    if not any(counts):
        raise UserError(f"No rows are left of {', '.join(source.path for source in sources)}.")
    parts = [
        Part(source.path, size, size - len(rows), count)
        for source, size, rows, count in zip(sources, read, sets, counts, strict=True)
    ]
    rows = Rows.joined(taken)
    if not isinstance(validation, float):
        return MixedRows(rows, rows.select(()), tuple(parts))
    return _split(rows, parts, validation, f"{config.seed}\0validation")


def _split(rows: Rows[Any], parts: Sequence[Part], share: float, key: str) -> MixedRows:
    """The rows of a round without those that are split off for validation."""
    held_out = _held_out(rows, share, key)
    if all(held_out):
        paths = ", ".join(part.path for part in parts)
        raise UserError(f"data.validation={share} leaves no row of {paths} to train on.")
    flags = iter(held_out)
    numbers = [sum(islice(flags, part.taken)) for part in parts]
    return MixedRows(
        rows=rows.select(index for index, out in enumerate(held_out) if not out),
        held_out=rows.select(index for index, out in enumerate(held_out) if out),
        parts=tuple(
            replace(part, taken=part.taken - number, held_out=number)
            for part, number in zip(parts, numbers, strict=True)
        ),
    )


def read_source(stage: str, source: Source, config: RunConfig) -> Rows[Any]:
    """All rows of a source.

    Raises:
        UserError: for a bad row, or if there are no rows.
    """
    path, hub = resolve_path(source.path), Hub(source.subset, source.revision)
    names = Names(source.columns, source.roles, bad_rows=config.data.bad_rows)
    options: dict[str, Any] = {"split": source.split, "max_rows": source.max_rows, "names": names, "hub": hub}
    if stage == "dpo":
        return read_preferences(path, ties=config.dpo.ties, **options).rows
    chats = read_chats(path, format=source.format, **options)
    return each_answer(chats) if config.data.loss == "each_turn" else chats


def validation_rows(stage: str, held_out: Rows[Any], config: RunConfig, validation: ValidationSet) -> Rows[Any]:
    """The rows whose loss is measured in the training of a round: of a set, or those that were held out.

    Raises:
        UserError: for a bad row, or if there are no rows.
    """
    return held_out if isinstance(validation, float) else read_source(stage, validation, config)


def _held_out(rows: Rows[Any], share: float, key: str) -> list[bool]:
    """For each row whether it is held out: at least `share` of the rows and one, drawn by their content."""

    def order(digest: bytes) -> bytes:
        return hashlib.blake2b(key.encode() + digest, digest_size=16).digest()

    digests = list(rows.digests())
    groups = _groups(digests, [chat_of_answer(place) for place in rows.places()])
    first: dict[int, bytes] = {}
    for group, digest in zip(groups, digests, strict=True):
        first[group] = min(first.get(group, digest), digest)
    times, chosen, count = Counter(groups), set(), 0
    for group in sorted(times, key=lambda group: order(first[group])):
        if count >= max(round(share * len(digests)), 1):
            break
        chosen.add(group)
        count += times[group]
    return [group in chosen for group in groups]


def _groups(digests: Sequence[bytes], chats: Sequence[str | None]) -> list[int]:
    """For each row the number of its group: rows that are equal, or answers of one chat (None: a row of its own)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes: dict[bytes | str, int] = {}
    edges = [
        (nodes.setdefault(digest, len(nodes)), nodes.setdefault(chat or digest, len(nodes)))
        for digest, chat in zip(digests, chats, strict=True)
    ]
    starts, ends = zip(*edges, strict=True)
    graph = coo_array(([1] * len(edges), (starts, ends)), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return [int(labels[start]) for start in starts]


def _without_repeats(sets: Iterable[Rows[Any]]) -> list[Rows[Any]]:
    """The sets without rows that equal an earlier row, of the same set or of one before."""
    seen: set[bytes] = set()
    kept = []
    for rows in sets:
        first = []
        for index, digest in enumerate(rows.digests()):
            if digest not in seen:
                seen.add(digest)
                first.append(index)
        kept.append(rows if len(first) == len(rows) else rows.select(first))
    return kept
