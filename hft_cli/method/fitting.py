"""Which selections explain the matrices that a training moved. Pure, standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from hft_cli.checkpoint.naming import Param
from hft_cli.method.units import Unit, group_units

# Those that are tried, the nearest to 1/2 first: many sets of matrices are some share of the whole model.
RATIOS = tuple(sorted((Fraction(n, 100) for n in range(1, 100)), key=lambda ratio: abs(ratio - Fraction(1, 2))))
ROUND_RATIOS = tuple(ratio for ratio in RATIOS if ratio * 20 % 1 == 0)


@dataclass(frozen=True)
class Fit:
    """A level of selection, and the ratios with which one draw can have moved what moved, the nearest to 1/2 first."""

    level: str
    ratios: tuple[float, ...]


def fits(params: Sequence[Param], moved: Collection[str]) -> tuple[Fit, ...]:
    """The levels and ratios of one draw that fit, the narrowest level first; empty if none does.

    A unit has moved if one of its parameters has. What is outside the layers counts for nothing.

    Args:
        moved: names of parameters.
    """
    units = [unit for unit in group_units(params) if unit.layer is not None]
    taken = {unit.name for unit in units if set(unit.params) & set(moved)}
    if len(taken) == len(units):
        return (Fit("all", (1.0,)),)
    if not taken:
        return ()
    found = []
    for level, explains, candidates in (
        ("layer", _by_layer, RATIOS),
        ("category", _by_category, RATIOS),
        ("model", _by_model, ROUND_RATIOS),
    ):
        ratios = tuple(float(ratio) for ratio in candidates if explains(units, taken, ratio))
        if ratios:
            found.append(Fit(level, ratios))
    return tuple(found)


def _by_layer(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> bool:
    """Whole layers moved, or did not."""
    layers = list(_groups(units, "layer"))
    counts = [sum(unit.name in taken for unit in layer) for layer in layers]
    whole = all(count in (0, len(layer)) for count, layer in zip(counts, layers, strict=True))
    return whole and sum(count > 0 for count in counts) in _nearest(len(layers) * ratio)


def _by_category(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> bool:
    """Of each category each layer moved its share, rounded down or up, and all layers together the nearest number."""
    for category in _groups(units, "kind"):
        total = 0
        for group in _groups(category, "layer"):
            count = sum(unit.name in taken for unit in group)
            if count not in (floor(len(group) * ratio), ceil(len(group) * ratio)):
                return False
            total += count
        if total not in _nearest(len(category) * ratio):
            return False
    return True


def _by_model(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> bool:
    return len(taken) in _nearest(len(units) * ratio)


def _nearest(share: Fraction) -> set[int]:
    """The nearest integers: two in a tie, because the second round of a complementary pair rounds down."""
    return {floor(share + Fraction(1, 2)), ceil(share - Fraction(1, 2))}


def _groups(units: Iterable[Unit], attribute: str) -> Iterable[list[Unit]]:
    """The units by the value of an attribute."""
    groups: dict[object, list[Unit]] = {}
    for unit in units:
        groups.setdefault(getattr(unit, attribute), []).append(unit)
    return groups.values()
