"""Which selections explain the matrices that a training moved. Pure, standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from hft_cli.checkpoint.naming import Param
from hft_cli.method.units import Unit, group_units

# Those that are tried, the nearest to 1/2 first. Many sets of matrices are some share of the whole model.
RATIOS = tuple(sorted((Fraction(n, 100) for n in range(1, 100)), key=lambda ratio: abs(ratio - Fraction(1, 2))))
ROUND_RATIOS = tuple(ratio for ratio in RATIOS if ratio * 20 % 1 == 0)
# In bfloat16 a norm may keep all its values while it is trained; a matrix does not.
MAY_KEEP = "norm"


@dataclass(frozen=True)
class Fit:
    """A level of selection with which one draw can have moved what moved.

    Attributes:
        ratios: with which it can, the nearest to 1/2 first; with all of them the fewest drawn norms have not moved.
        unmoved: number of drawn norms that have not moved.
    """

    level: str
    ratios: tuple[float, ...]
    unmoved: int = 0


def fits(params: Sequence[Param], moved: Collection[str]) -> tuple[Fit, ...]:
    """The levels of one draw that fit, the narrowest first; empty if none does.

    A unit has moved if one of its parameters has. All that moved is drawn, and all that is drawn moved, but norms, of
    which at least half moved. What is outside the layers counts for nothing.

    Args:
        moved: names of parameters.
    """
    units = [unit for unit in group_units(params) if unit.layer is not None]
    taken = {unit.name for unit in units if set(unit.params) & set(moved)}
    still = [unit for unit in units if unit.name not in taken]
    if not taken:
        return ()
    if all(unit.kind == MAY_KEEP for unit in still):
        return (Fit("all", (1.0,), len(still)),)
    moved_norms = sum(unit.kind == MAY_KEEP and unit.name in taken for unit in units)
    found = []
    for level, unmoved_with, candidates in (
        ("layer", _by_layer, RATIOS),
        ("category", _by_category, RATIOS),
        ("model", _by_model, ROUND_RATIOS),
    ):
        unmoved = {ratio: unmoved_with(units, taken, ratio) for ratio in candidates}
        known = {ratio: count for ratio, count in unmoved.items() if count is not None and count <= moved_norms}
        if known:
            fewest = min(known.values())
            found.append(Fit(level, tuple(float(ratio) for ratio in known if known[ratio] == fewest), fewest))
    return tuple(found)


def _by_layer(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> int | None:
    """The number of drawn norms that have not moved, if whole layers are drawn; None if that cannot be."""
    layers = list(_groups(units, "layer"))
    touched = [layer for layer in layers if any(unit.name in taken for unit in layer)]
    still = [unit for layer in touched for unit in layer if unit.name not in taken]
    if len(touched) not in _nearest(len(layers) * ratio) or any(unit.kind != MAY_KEEP for unit in still):
        return None
    return len(still)


def _by_category(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> int | None:
    """The same if of each category each layer draws its share, rounded down or up, and all layers the nearest."""
    unmoved = 0
    for category in _groups(units, "kind"):
        least = moved = 0
        for group in _groups(category, "layer"):
            count = sum(unit.name in taken for unit in group)
            if count > ceil(len(group) * ratio):
                return None
            least += max(count, floor(len(group) * ratio))
            moved += count
        totals = [total for total in _nearest(len(category) * ratio) if total >= least]
        if not totals or (min(totals) > moved and category[0].kind != MAY_KEEP):
            return None
        unmoved += min(totals) - moved
    return unmoved


def _by_model(units: Sequence[Unit], taken: Collection[str], ratio: Fraction) -> int | None:
    """The same if the nearest number of units is drawn from the whole model."""
    norms = sum(unit.kind == MAY_KEEP and unit.name not in taken for unit in units)
    totals = [total for total in _nearest(len(units) * ratio) if len(taken) <= total <= len(taken) + norms]
    return min(totals) - len(taken) if totals else None


def _nearest(share: Fraction) -> set[int]:
    """The nearest integers: two in a tie, because the second round of a complementary pair rounds down."""
    return {floor(share + Fraction(1, 2)), ceil(share - Fraction(1, 2))}


def _groups(units: Iterable[Unit], attribute: str) -> Iterable[list[Unit]]:
    """The units by the value of an attribute."""
    groups: dict[object, list[Unit]] = {}
    for unit in units:
        groups.setdefault(getattr(unit, attribute), []).append(unit)
    return groups.values()
