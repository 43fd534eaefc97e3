"""Where the rows of a round come from, and how many of each set it takes. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """Training rows of one set, and which of them a round takes: all, or one of `fraction`, `at_most`, `rows`, `share`.

    Attributes:
        path: a file, a folder or a hub name; see `rows.read_chats`.
        split: of a folder or a hub data set.
        subset, revision: of a hub data set: its configuration, and a commit, branch or tag.
        format: the shape of the rows; see `rows.read_chats`.
        max_rows: the largest number of rows that is read, from the start of the set; None reads all.
        columns, roles: what the set calls things; see `turns.Names`.
        fraction: of its rows, drawn, at least one row.
        at_most: rows that are drawn, or all if there are fewer.
        rows: rows that are drawn. A set with fewer rows is repeated.
        share: of the rows of the round, in (0, 1]. A set with fewer rows is repeated.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    format: str = "auto"
    max_rows: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    fraction: float = 1.0
    at_most: int | None = None
    rows: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Part:
    """What a round takes of one source.

    Attributes:
        path: of the source.
        read: rows of the source, without bad ones.
        repeats: rows that `data.deduplicate` leaves out, because they equal an earlier row of the round's sources.
        taken: rows that the round trains on.
        held_out: rows that are split off for validation.
    """

    path: str
    read: int
    repeats: int
    taken: int
    held_out: int = 0

    def text(self) -> str:
        """The part in a few words."""
        repeats = f" without {self.repeats:,} repeats" if self.repeats else ""
        return f"{self.taken:,} of {self.read:,} rows{repeats} of {self.path}"


# The rows whose loss is measured in training: of a set, or a share that is split off from those of the round.
ValidationSet = Source | float


def row_counts(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """The number of rows that a round takes of each source.

    Sources with a `share` are added to the others so that they have that share of the whole. If all have one, the round
    is the largest for which no row must be repeated; the shares then add up to 1.

    Args:
        sizes: the number of rows that each source has.
    """
    counts = [
        0 if each.share is not None else _own_count(each, size) for each, size in zip(sources, sizes, strict=True)
    ]
    shares = [each.share or 0.0 for each in sources]
    if any(each.share is None for each in sources):
        whole = sum(counts) / (1 - sum(shares))
    else:
        whole = min((size / share for size, share in zip(sizes, shares, strict=True)), default=0.0)
    return [
        max(round(whole * share), 1) if share and size else count
        for count, share, size in zip(counts, shares, sizes, strict=True)
    ]


def _own_count(source: Source, size: int) -> int:
    if source.rows is not None:
        return source.rows if size else 0
    count = round(source.fraction * size) if source.at_most is None else source.at_most
    return min(max(count, 1), size)


def draw_rows(rows: int, count: int, key: str) -> list[int]:
    """Draw `count` of the indices 0 to `rows` - 1 uniformly, in ascending order.

    If there are fewer, each is drawn as often as any other, or once more. As in `method.selection`, the indices are
    sorted by a hash, so that the draw depends on `key` alone.
    """

    def order(index: int) -> bytes:
        return hashlib.blake2b(f"{key}\0{index}".encode(), digest_size=16).digest()

    times, rest = divmod(count, rows)
    drawn = sorted(range(rows), key=order)[:rest] if rest else []
    return sorted([*list(range(rows)) * times, *drawn])
