"""Which matrices a round updates: (parameters, config, round, seed) -> Draw. Pure, standard library only.

Source: HFT (Hui et al., ACL 2025), section 3. A random choice sorts the units of a group by a hash of (seed, round,
name) and takes the first k. There is no generator state: every rank, Python version and order of the parameters gives
the same draw, and every subset of a group is equally likely.

To add a strategy, write one function and add one row to STRATEGIES at the foot of this file.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import combinations
from math import floor
from typing import Any

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError, choose
from hft_cli.method.units import Order, Unit, count_elements, group_key, group_units, layer_key, score_order, size_order


@dataclass(frozen=True)
class Draw:
    """The selection of one round. `updated` and `frozen` together are all parameters of the model.

    Attributes:
        round: number of the round, from 1.
        seed: seed of the draw.
        level: the strategy, a key of STRATEGIES, or "lora".
        ratio: the share of the units to update, as configured.
        updated: names of the updated parameters, sorted.
        frozen: names of the frozen parameters, sorted.
        matrices_reached: share of the units in the transformer layers that is updated.
        elements_reached: share of the elements in the transformer layers that is updated.
        updated_elements: number of updated elements in the whole model, embeddings and head included.
        total_elements: number of elements of the model.
        sha256: hash of the updated names (`names_hash`).
    """

    round: int
    seed: int
    level: str
    ratio: float
    updated: tuple[str, ...]
    frozen: tuple[str, ...]
    matrices_reached: float
    elements_reached: float
    updated_elements: int
    total_elements: int
    sha256: str

    @property
    def updated_fraction(self) -> float:
        """Share of all elements of the model that is updated."""
        return self.updated_elements / self.total_elements

    def as_dict(self) -> dict[str, object]:
        """The record of the draw in draws.json."""
        return {**asdict(self), "updated_fraction": self.updated_fraction}


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 (hex) of the sorted names, one on each line."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


Importance = Mapping[str, float]  # unit -> how much it matters


def draw(
    params: Sequence[Param], config: SelectionConfig, round: int, seed: int, importance: Importance | None = None
) -> Draw:
    """Draw the parameters that round number `round` (from 1) updates.

    The strategy `config.level` selects among the units in the transformer layers. Embeddings, head and final norm are
    updated or frozen as configured; the paper updates them, and freezing them lowered its scores (section 5).

    Args:
        importance: for level=importance. Without it the largest matrices are taken, for a plan.

    Raises:
        UserError: if the model has no transformer layers, or cannot satisfy the configuration.
    """
    units = group_units(params)
    in_layers = [unit for unit in units if unit.layer is not None]
    if not in_layers:
        raise UserError("The model has no transformer layers to select from. Map its parameters by model.kinds.")
    if config.head == "freeze" and config.embeddings == "update" and not any(unit.kind == "head" for unit in units):
        raise UserError(
            "selection.head=freeze contradicts selection.embeddings=update: this model ties its head to its "
            "embeddings. Set both to the same value."
        )
    selected = [name for unit in _select(in_layers, config, round, seed, importance) for name in unit.params]
    updated = {*selected, *_updated_outside_layers(units, config)}
    shares = _shares(params, updated, selected)
    return Draw(round=round, seed=seed, level=config.level, ratio=config.ratio, **shares)


def lora_draw(params: Sequence[Param], config: SelectionConfig, round: int, seed: int) -> Draw:
    """The parameters that LoRA adapts: weight matrices of attention and feed-forward, no biases, norms or experts."""
    adapted = {p.name for p in params if p.kind in ("attention", "feed_forward") and len(p.shape) == 2}
    if not adapted:
        raise UserError("method=lora finds no attention or feed-forward matrices. Map parameters by model.kinds.")
    return Draw(round=round, seed=seed, level="lora", ratio=config.ratio, **_shares(params, adapted, adapted))


def union_draw(params: Sequence[Param], draws: Sequence[Draw]) -> Draw:
    """What any of several rounds updates, as a draw of the last of them."""
    last, updated = draws[-1], {name for each in draws for name in each.updated}
    selected = [param.name for param in params if param.layer is not None and param.name in updated]
    return replace(last, **_shares(params, updated, selected))


def _shares(params: Sequence[Param], updated: Collection[str], selected: Collection[str]) -> dict[str, Any]:
    """The fields of a Draw that follow from names: all updated ones, and those that count towards the ratio."""
    in_layers = [p for p in params if p.layer is not None]
    names = set(selected)
    counted = [p for p in params if p.name in names]
    return {
        "updated": tuple(sorted(updated)),
        "frozen": tuple(sorted(p.name for p in params if p.name not in updated)),
        "matrices_reached": len({p.unit for p in counted}) / len({p.unit for p in in_layers}),
        "elements_reached": sum(p.elements for p in counted) / sum(p.elements for p in in_layers),
        "updated_elements": sum(p.elements for p in params if p.name in updated),
        "total_elements": sum(p.elements for p in params),
        "sha256": names_hash(updated),
    }


def heaviest_draw(params: Sequence[Param], config: SelectionConfig) -> tuple[str, ...]:
    """Names of parameters with at least as many elements as any draw updates, whatever its round and seed.

    With balance=matrices this is a draw, whose order is by size. With balance=elements a draw misses its share by at
    most half of its largest unit; the result is the largest units that together exceed that bound.
    """
    draw(params, config, 1, 0)  # raises if the configuration cannot be satisfied
    units = group_units(params)
    in_layers = [unit for unit in units if unit.layer is not None]
    if config.balance == "matrices" or config.level in UNDRAWN:
        selected = STRATEGIES[config.level](in_layers, config, size_order(in_layers, _ratio(config)))
    else:
        kinds = sorted({unit.kind for unit in in_layers}) if config.level == "category" else [None]
        groups = ([unit for unit in in_layers if kind in (unit.kind, None)] for kind in kinds)
        selected = [unit for group in groups for unit in _largest_beyond_bound(group, config)]
    names = {name for unit in selected for name in unit.params}
    return tuple(sorted(names | _updated_outside_layers(units, config)))


def _largest_beyond_bound(group: Sequence[Unit], config: SelectionConfig) -> list[Unit]:
    """The largest units of a group that together have more elements than any draw with balance=elements."""
    sizes: Counter[object] = Counter()
    for unit in group:
        sizes[unit.layer if config.level == "layer" else unit.name] += unit.elements
    remaining = count_elements(group) * _ratio(config) + Fraction(max(sizes.values()), 2)
    largest = []
    for unit in sorted(group, key=lambda unit: -unit.elements):
        if remaining <= 0:
            break
        largest.append(unit)
        remaining -= unit.elements
    return largest


def _select(
    in_layers: Sequence[Unit], config: SelectionConfig, round: int, seed: int, importance: Importance | None
) -> Iterable[Unit]:
    """The units in the layers that a round updates."""
    strategy = STRATEGIES[choose("selection.level", config.level, STRATEGIES)]
    if config.level == "importance":
        return strategy(in_layers, config, _importance_order(in_layers, config, importance))
    order = Order(seed, round, config.redraw)
    if order.is_complement and config.balance == "elements":
        # Reversing the order does not balance the other half, so the second round of a pair takes the complement.
        if config.ratio != 0.5:
            raise UserError("selection.redraw=complementary with selection.balance=elements needs selection.ratio=0.5.")
        first_round = {unit.name for unit in strategy(in_layers, config, Order(seed, round - 1, config.redraw))}
        return [unit for unit in in_layers if unit.name not in first_round]
    if config.redraw == "balanced":
        counts: Counter[str] = Counter()
        for earlier in range(1, round):
            # The list is complete before any unit of it is counted, because the order reads the counts.
            for unit in list(strategy(in_layers, config, Order(seed, earlier, config.redraw, counts))):
                counts[unit.name] += 1
                counts[group_key(unit.kind, unit.layer)] += 1
                counts[layer_key(unit.layer)] = counts[unit.name]  # all units of a whole layer have one count
        order = Order(seed, round, config.redraw, counts)
    return strategy(in_layers, config, order)


def _importance_order(in_layers: Sequence[Unit], config: SelectionConfig, importance: Importance | None) -> Order:
    """The order by importance; by size without one."""
    if importance is None:
        return size_order(in_layers, _ratio(config))
    if missing := [unit.name for unit in in_layers if unit.name not in importance]:
        raise UserError(f"There is no importance of {missing[0]}: was it measured on another model?")
    return score_order(in_layers, importance, config.importance_update == "most")


def _updated_outside_layers(units: Iterable[Unit], config: SelectionConfig) -> set[str]:
    """Names of the parameters outside the transformer layers that the configuration updates."""
    settings = {"embedding": config.embeddings, "head": config.head}
    outside = (unit for unit in units if unit.layer is None)
    return {p for unit in outside if settings.get(unit.kind, config.final_norm) == "update" for p in unit.params}


def _ratio(config: SelectionConfig) -> Fraction:
    """The ratio as the decimal that the user typed: 0.3 is 3/10, not the nearest binary float."""
    return Fraction(str(config.ratio))


def _first(group: Sequence[Unit], count: int, order: Order) -> list[Unit]:
    """The first `count` units in the order."""
    by_name = {unit.name: unit for unit in group}
    return [by_name[name] for name in order(by_name)[:count]]


def _greedy(ordered: Iterable[Unit], target: Fraction) -> list[Unit]:
    """Go through the units in order; take a unit if it brings the number of elements nearer to the target."""
    taken: list[Unit] = []
    total = 0
    for unit in ordered:
        if abs(total + unit.elements - target) < abs(total - target):
            taken.append(unit)
            total += unit.elements
    return taken


def _all(in_layers: Sequence[Unit], config: SelectionConfig, order: Order) -> Sequence[Unit]:
    """Every unit (full fine-tuning)."""
    return in_layers


def _category(in_layers: Sequence[Unit], config: SelectionConfig, order: Order) -> Sequence[Unit]:
    """Units of each category (attention, feed-forward, norm, router) in each layer: the paper's strategy (section 3).

    Of the k units of a layer, floor(k r) or ceil(k r) are taken, such that the sum over all layers is the integer
    nearest to the share r. The layers that take the larger number are drawn as well.
    """
    selected: list[Unit] = []
    for kind in sorted({unit.kind for unit in in_layers}):
        layers: dict[str, list[Unit]] = {}
        for unit in in_layers:
            if unit.kind == kind:
                layers.setdefault(group_key(kind, unit.layer), []).append(unit)
        take = _category_by_elements if config.balance == "elements" else _category_by_matrices
        selected += take(layers, _ratio(config), order)
    return selected


def _category_by_matrices(layers: Mapping[str, list[Unit]], ratio: Fraction, order: Order) -> list[Unit]:
    """The units of one category. `layers` maps the group key of each layer to its units."""
    counts = {key: floor(len(group) * ratio) for key, group in layers.items()}
    total = order.nearest(sum(len(group) for group in layers.values()) * ratio)
    rounded_down = [key for key, group in layers.items() if len(group) * ratio % 1]
    for key in order(rounded_down)[: total - sum(counts.values())]:
        counts[key] += 1
    return [unit for key, group in layers.items() for unit in _first(group, counts[key], order)]


def _category_by_elements(layers: Mapping[str, list[Unit]], ratio: Fraction, order: Order) -> list[Unit]:
    """The units of one category: in each layer the subset with the number of elements nearest to the target.

    The difference that remains in a layer is added to the target of the next one, in a drawn order of the layers (error
    diffusion). The draw decides between subsets that are equally near.
    """
    selected: list[Unit] = []
    target = Fraction(0)
    for key in order(layers):
        group = layers[key]
        target += count_elements(group) * ratio
        if len(group) > MAX_ENUMERATED_UNITS:
            nearest = _greedy(_first(group, len(group), order), target)
        else:
            nearest = _nearest_subset(group, target, order)
        selected += nearest
        target -= count_elements(nearest)
    return selected


MAX_ENUMERATED_UNITS = 12  # 4,096 subsets; larger groups are filled greedily


def _nearest_subset(group: Sequence[Unit], target: Fraction, order: Order) -> list[Unit]:
    subsets = {
        "\0".join(sorted(unit.name for unit in subset)): subset
        for size in range(len(group) + 1)
        for subset in combinations(group, size)
    }
    distances = {key: abs(count_elements(subset) - target) for key, subset in subsets.items()}
    least = min(distances.values())
    ties = [key for key, distance in distances.items() if distance == least]
    return list(subsets[order(ties)[0]])


def _layer(in_layers: Sequence[Unit], config: SelectionConfig, order: Order) -> Sequence[Unit]:
    """Whole layers (an ablation of the paper)."""
    layers: dict[str, list[Unit]] = {}
    for unit in in_layers:
        layers.setdefault(layer_key(unit.layer), []).append(unit)
    if config.balance == "elements":
        whole = [Unit(key, None, "layer", count_elements(layers[key]), ()) for key in order(layers)]
        keys = [unit.name for unit in _greedy(whole, count_elements(in_layers) * _ratio(config))]
    else:
        keys = order(layers)[: order.nearest(len(layers) * _ratio(config))]
    return [unit for key in keys for unit in layers[key]]


def _model(in_layers: Sequence[Unit], config: SelectionConfig, order: Order) -> Sequence[Unit]:
    """Matrices of the whole model, regardless of layer and category (an ablation of the paper)."""
    if config.balance == "elements":
        return _greedy(_first(in_layers, len(in_layers), order), count_elements(in_layers) * _ratio(config))
    return _first(in_layers, order.nearest(len(in_layers) * _ratio(config)), order)


def _names(in_layers: Sequence[Unit], config: SelectionConfig, order: Order) -> Sequence[Unit]:
    """The units that selection.names names, in every round.

    Raises:
        UserError: for a pattern that finds nothing.
    """
    named: set[str] = set()
    for pattern in config.names:
        found = {unit.name for unit in in_layers if any(re.search(pattern, name) for name in unit.params)}
        if not found:
            raise UserError(
                f"selection.names: {pattern!r} finds no parameter in the layers, whose names are such as "
                f"{in_layers[0].params[0]}. Embeddings, head and final norm have keys of their own."
            )
        named |= found
    return [unit for unit in in_layers if unit.name in named]


UNDRAWN = ("all", "names")  # levels that draw nothing: ratio, balance and redraw have no effect

# selection.level -> (units in the layers, config, order of the round) -> the units that the round updates. "importance"
# is the paper's strategy with another order.
STRATEGIES: dict[str, Callable[[Sequence[Unit], SelectionConfig, Order], Iterable[Unit]]] = {
    "all": _all,
    "category": _category,
    "importance": _category,
    "layer": _layer,
    "model": _model,
    "names": _names,
}
