"""The units of a model, and the order in which a draw takes them. Pure, standard library only.

A random order sorts names by a hash of (seed, round, name). There is no generator state: every rank, Python version and
order of the parameters gives the same order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from hft_cli.checkpoint.naming import Param


@dataclass(frozen=True)
class Unit:
    """A matrix with its bias, which is frozen or updated as a whole.

    Attributes:
        name: the parameter name without `.weight` or `.bias`.
        layer: index of the transformer layer; None outside the layers.
        kind: the category, one of `checkpoint.naming.KINDS`.
        elements: number of elements of all its parameters.
        params: names of its parameters.
    """

    name: str
    layer: int | None
    kind: str
    elements: int
    params: tuple[str, ...]


def group_units(params: Iterable[Param]) -> tuple[Unit, ...]:
    """Group parameters into units, in the order in which the units first appear."""
    groups: dict[str, list[Param]] = {}
    for param in params:
        groups.setdefault(param.unit, []).append(param)
    return tuple(
        Unit(name, group[0].layer, group[0].kind, sum(p.elements for p in group), tuple(p.name for p in group))
        for name, group in groups.items()
    )


def count_elements(units: Iterable[Unit]) -> int:
    return sum(unit.elements for unit in units)


@dataclass(frozen=True)
class Order:
    """A random order of names for one round.

    redraw=fixed: every round has the order of round 1. redraw=complementary: rounds form pairs, and the second one
    reverses the order of the first, so that the units that were frozen come first. redraw=balanced: the units that
    earlier rounds updated least (`counts`) come first, in random order among equals.
    """

    seed: int
    round: int
    redraw: str
    counts: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, names: Iterable[str]) -> list[str]:
        first_of_pair = self.round - self.is_complement
        hash_round = {"fixed": 1, "complementary": first_of_pair}.get(self.redraw, self.round)

        def key(name: str) -> tuple[int, bytes]:
            text = f"{self.seed}\0{hash_round}\0{name}"
            return self.counts.get(name, 0), hashlib.blake2b(text.encode(), digest_size=16).digest()

        return sorted(names, key=key, reverse=self.is_complement)

    @property
    def is_complement(self) -> bool:
        """Whether this is the second round of a complementary pair."""
        return self.redraw == "complementary" and self.round % 2 == 0

    def nearest(self, share: Fraction) -> int:
        """The integer nearest to `share`; a tie rounds up, in the second round of a complementary pair down."""
        half = Fraction(1, 2)
        return -floor(half - share) if self.is_complement else floor(share + half)


@dataclass(frozen=True)
class _SizeOrder(Order):
    """The order by size, largest first, instead of a random one."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: -self.sizes[name])


def size_order(in_layers: Iterable[Unit], ratio: Fraction) -> _SizeOrder:
    """The order by size of units, of whole layers, and of the groups that may take one unit more than the others."""
    sizes: Counter[str] = Counter()
    groups: dict[str, list[int]] = {}
    for unit in in_layers:
        sizes[unit.name] += unit.elements
        sizes[layer_key(unit.layer)] += unit.elements
        groups.setdefault(group_key(unit.kind, unit.layer), []).append(unit.elements)
    for key, group in groups.items():  # the size of the unit that the group would take next
        sizes[key] = [*sorted(group, reverse=True), 0][floor(len(group) * ratio)]
    return _SizeOrder(0, 1, "independent", sizes=sizes)


@dataclass(frozen=True)
class _ScoreOrder(Order):
    """The order by a score, the least first; with `most` the greatest."""

    scores: Mapping[str, float] = field(default_factory=dict)
    most: bool = False

    def __call__(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (-self.scores[name] if self.most else self.scores[name], name))


def score_order(in_layers: Iterable[Unit], scores: Mapping[str, float], most: bool) -> _ScoreOrder:
    """The order by the scores of units, and of the groups that may take one unit more by their mean.

    Raises:
        KeyError: for a unit without a score.
    """
    groups: dict[str, list[float]] = {}
    for unit in in_layers:
        groups.setdefault(group_key(unit.kind, unit.layer), []).append(scores[unit.name])
    means = {key: sum(group) / len(group) for key, group in groups.items()}
    return _ScoreOrder(0, 1, "independent", scores={**scores, **means}, most=most)


def layer_key(layer: int | None) -> str:
    """The name under which an order sorts a whole layer."""
    return f"layer\0{layer}"


def group_key(kind: str, layer: int | None) -> str:
    """The name under which an order sorts the units of one category in one layer."""
    return f"{kind}\0{layer}"
