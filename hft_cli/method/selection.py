"""Which matrices a round updates: (parameters, config, round, seed) -> Draw. Pure, standard library only.

Source: HFT (ACL 2025), section 3. A random choice is made by ordering the units of a group by a hash of (seed, round,
name) and taking the first k. There is no generator state, so every rank, Python version and order of the parameters
gives the same draw, and every subset of a group is equally likely.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import combinations
from math import floor

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError, choose


@dataclass(frozen=True)
class Unit:
    """A matrix with its bias: what is frozen or updated as a whole.

    `layer` is None outside the transformer layers; `elements` counts the numbers in all its tensors.
    """

    name: str
    layer: int | None
    kind: str
    elements: int
    params: tuple[str, ...]


@dataclass(frozen=True)
class Draw:
    """One round's selection. `updated` and `frozen` hold parameter names, sorted; they part all of the model's.

    `matrices_reached` and `elements_reached` are the shares updated among the units that the ratio is about (those in
    the transformer layers); `updated_fraction` is the share of all the model's elements, embeddings and head included.
    `sha256` is the hash of the updated names, one a line, sorted.
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
        return self.updated_elements / self.total_elements

    def as_dict(self) -> dict[str, object]:
        """The draw as it stands in draws.json."""
        return {**asdict(self), "updated_fraction": self.updated_fraction}


def group_units(params: Iterable[Param]) -> tuple[Unit, ...]:
    """Group parameters into units (a weight with its bias), in the order in which they first appear."""
    groups: dict[str, list[Param]] = {}
    for param in params:
        groups.setdefault(param.unit, []).append(param)
    return tuple(
        Unit(name, ps[0].layer, ps[0].kind, sum(p.elements for p in ps), tuple(p.name for p in ps))
        for name, ps in groups.items()
    )


def names_hash(names: Iterable[str]) -> str:
    """SHA-256 of the names, sorted, one a line."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def draw(params: Sequence[Param], config: SelectionConfig, round: int, seed: int) -> Draw:
    """Choose what round number `round` (from 1) updates, under the draw's `seed`.

    Units in the transformer layers are chosen by `config.level`; embeddings, head and the final norm are updated or
    frozen as the config says (the paper updates them; freezing them lowered its scores, section 5).

    Raises:
        UserError: if the model has no transformer layers, or the config cannot be met on this model.
    """
    everything = group_units(params)
    inside = [u for u in everything if u.layer is not None]
    if not inside:
        raise UserError("The model has no transformer layers to select from. Map them by model.kinds.")
    if config.head == "freeze" and config.embeddings == "update" and not any(u.kind == "head" for u in everything):
        raise UserError(
            "selection.head=freeze cannot hold with selection.embeddings=update: this model ties its head to its "
            "embeddings. Set both to the same."
        )
    chosen = {u.name for u in _chosen(inside, config, round, seed)}
    chosen |= {u.name for u in everything if u.layer is None and _outside(u.kind, config) == "update"}

    updated = [u for u in everything if u.name in chosen]
    names = tuple(sorted(p for u in updated for p in u.params))
    inside_updated = [u for u in inside if u.name in chosen]
    return Draw(
        round=round,
        seed=seed,
        level=config.level,
        ratio=config.ratio,
        updated=names,
        frozen=tuple(sorted(p for u in everything if u.name not in chosen for p in u.params)),
        matrices_reached=len(inside_updated) / len(inside),
        elements_reached=_elements(inside_updated) / _elements(inside),
        updated_elements=_elements(updated),
        total_elements=_elements(everything),
        sha256=names_hash(names),
    )


def heaviest_draw(params: Sequence[Param], config: SelectionConfig) -> tuple[str, ...]:
    """Names of parameters with at least as many elements as any draw has, whatever its round and seed: the worst draw.

    With balance=matrices it is a draw, the one whose order is by size. With balance=elements a draw misses its share by
    at most half of its largest unit, and what is returned is the largest units that are more than that.

    Raises:
        UserError: if the config cannot be met on this model.
    """
    draw(params, config, 1, 0)  # refuses what cannot be met
    everything = group_units(params)
    inside = [u for u in everything if u.layer is not None]
    if config.balance == "matrices" or config.level == "all":
        chosen = list(STRATEGIES[config.level](inside, config, _by_size(inside, _exact(config))))
    else:
        chosen = []
        for kind in sorted({u.kind for u in inside}) if config.level == "category" else [None]:
            group = [u for u in inside if kind in (u.kind, None)]
            sizes = [u.elements for u in group]
            if config.level == "layer":
                sizes = [_elements(u for u in group if u.layer == layer) for layer in {u.layer for u in group}]
            most = _elements(group) * _exact(config) + Fraction(max(sizes), 2)
            for u in sorted(group, key=lambda u: -u.elements):
                if most > 0:
                    chosen.append(u)
                    most -= u.elements
    names = {u.name for u in chosen}
    names |= {u.name for u in everything if u.layer is None and _outside(u.kind, config) == "update"}
    return tuple(sorted(p for u in everything if u.name in names for p in u.params))


def lora_draw(params: Sequence[Param], config: SelectionConfig, round: int, seed: int) -> Draw:
    """What LoRA changes: the weight matrices of attention and feed-forward, without biases, norms and experts.

    Raises:
        UserError: if there are none.
    """
    chosen = [p for p in params if p.kind in ("attention", "feed_forward") and len(p.shape) == 2]
    if not chosen:
        raise UserError("continual=lora finds no matrices of attention or feed-forward in this model.")
    names = {p.name for p in chosen}
    inside = [p for p in params if p.layer is not None]
    elements = sum(p.elements for p in chosen)
    matrices = {p.unit for p in inside}
    return Draw(
        round=round,
        seed=seed,
        level="lora",
        ratio=config.ratio,
        updated=tuple(sorted(names)),
        frozen=tuple(sorted(p.name for p in params if p.name not in names)),
        matrices_reached=len({p.unit for p in chosen}) / len(matrices),
        elements_reached=elements / sum(p.elements for p in inside),
        updated_elements=elements,
        total_elements=sum(p.elements for p in params),
        sha256=names_hash(names),
    )


def _chosen(inside: Sequence[Unit], config: SelectionConfig, round: int, seed: int) -> Iterable[Unit]:
    """The units in the layers that a round updates."""
    strategy = STRATEGIES[choose("selection.level", config.level, STRATEGIES)]
    order = _Order(seed, round, config.redraw)
    if order.second and config.balance == "elements":
        # Reversing the order does not balance the other half, so the pair's second round is the complement itself.
        if config.ratio != 0.5:
            raise UserError("selection.redraw=complementary with selection.balance=elements needs selection.ratio=0.5.")
        first = {u.name for u in strategy(inside, config, _Order(seed, round - 1, config.redraw))}
        return [u for u in inside if u.name not in first]
    if config.redraw == "balanced":
        counts: Counter[str] = Counter()
        for earlier in range(1, round):
            # All of a draw before any of it is counted: the order reads the counts.
            for unit in list(strategy(inside, config, _Order(seed, earlier, config.redraw, counts))):
                counts[unit.name] += 1
                counts[f"{unit.kind}\0{unit.layer}"] += 1
                counts[f"layer\0{unit.layer}"] = counts[unit.name]  # of whole layers all units have the same
        order = _Order(seed, round, config.redraw, counts)
    return strategy(inside, config, order)


def _outside(kind: str, config: SelectionConfig) -> str:
    return {"embedding": config.embeddings, "head": config.head}.get(kind, config.final_norm)


def _elements(group: Iterable[Unit]) -> int:
    return sum(u.elements for u in group)


@dataclass(frozen=True)
class _Order:
    """A random order of names for one round.

    With redraw=fixed every round has round 1's order. With redraw=complementary rounds go in pairs and the second has
    the first's order reversed, so that "the first k" become the last k: what was frozen goes first. With
    redraw=balanced what earlier rounds updated least (`counts`) goes first, and among equals the draw decides.
    """

    seed: int
    round: int
    redraw: str
    counts: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, names: Iterable[str]) -> list[str]:
        turn = {"fixed": 1, "complementary": self.round - self.second}.get(self.redraw, self.round)

        def key(name: str) -> tuple[int, bytes]:
            return self.counts.get(name, 0), hashlib.blake2b(
                f"{self.seed}\0{turn}\0{name}".encode(), digest_size=16
            ).digest()

        return sorted(names, key=key, reverse=self.second)

    @property
    def second(self) -> bool:
        """Whether this is the second round of a complementary pair."""
        return self.redraw == "complementary" and self.round % 2 == 0


@dataclass(frozen=True)
class _BySize(_Order):
    """The largest first, in place of a drawn order."""

    sizes: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: -self.sizes[name])


def _by_size(inside: Iterable[Unit], ratio: Fraction) -> _BySize:
    """For units, for layers, and for the layers that may take one unit of a kind more than the others."""
    sizes: Counter[str] = Counter()
    groups: dict[str, list[int]] = {}
    for unit in inside:
        sizes[unit.name] += unit.elements
        sizes[f"layer\0{unit.layer}"] += unit.elements
        groups.setdefault(f"{unit.kind}\0{unit.layer}", []).append(unit.elements)
    for name, group in groups.items():  # what a layer would take next, after those that it has anyway
        sizes[name] = [*sorted(group, reverse=True), 0][floor(len(group) * ratio)]
    return _BySize(0, 1, "independent", sizes=sizes)


def _nearest(share: Fraction, order: _Order) -> int:
    """The nearest integer; a tie goes up, and down in the second round of a complementary pair."""
    half = Fraction(1, 2)
    return -floor(half - share) if order.second else floor(share + half)


def _exact(config: SelectionConfig) -> Fraction:
    """The ratio as the decimal that the user typed: 0.3 is 3/10, not the nearest binary float."""
    return Fraction(str(config.ratio))


def _all(inside: Sequence[Unit], config: SelectionConfig, order: _Order) -> Sequence[Unit]:
    return inside


def _category(inside: Sequence[Unit], config: SelectionConfig, order: _Order) -> Sequence[Unit]:
    """Within each category (attention, feed-forward, norm, router) of each layer: the paper's own (section 3).

    Of a layer's k units, floor(k r) or ceil(k r) are taken, so that over all layers the sum is the nearest integer to
    the share; which layers take the larger number is drawn too.
    """
    chosen: list[Unit] = []
    for kind in sorted({u.kind for u in inside}):
        layers: dict[int, list[Unit]] = {}
        for unit in inside:
            if unit.kind == kind and unit.layer is not None:
                layers.setdefault(unit.layer, []).append(unit)
        if config.balance == "elements":
            chosen += _balanced_layers(kind, layers, config, order)
            continue
        ratio = _exact(config)
        quota = {layer: floor(len(group) * ratio) for layer, group in layers.items()}
        left = _nearest(sum(len(group) for group in layers.values()) * ratio, order) - sum(quota.values())
        open_layers = {f"{kind}\0{layer}": layer for layer, group in layers.items() if len(group) * ratio % 1}
        for name in order(open_layers)[:left]:
            quota[open_layers[name]] += 1
        for layer, group in layers.items():
            chosen += _first(group, quota[layer], order)
    return chosen


def _balanced_layers(
    kind: str, layers: dict[int, list[Unit]], config: SelectionConfig, order: _Order
) -> Iterable[Unit]:
    """Per layer the subset whose number of elements is nearest to the share still owed, ties broken by the draw.

    What one layer misses is carried to the next, in a drawn order of layers: error diffusion.
    """
    chosen: list[Unit] = []
    owed = Fraction(0)
    names = {f"{kind}\0{layer}": layer for layer in layers}
    for name in order(names):
        group = layers[names[name]]
        owed += _elements(group) * _exact(config)
        if len(group) > MOST_UNITS_TO_ENUMERATE:
            best = _greedy(_first(group, len(group), order), owed)
        else:
            subsets = {
                "\0".join(sorted(u.name for u in subset)): subset
                for size in range(len(group) + 1)
                for subset in combinations(group, size)
            }
            gap = min(abs(_elements(s) - owed) for s in subsets.values())
            ties = [key for key, s in subsets.items() if abs(_elements(s) - owed) == gap]
            best = list(subsets[order(ties)[0]])
        chosen += best
        owed -= _elements(best)
    return chosen


MOST_UNITS_TO_ENUMERATE = 12  # 4,096 subsets; a larger group is filled greedily


def _layer(inside: Sequence[Unit], config: SelectionConfig, order: _Order) -> Sequence[Unit]:
    """Whole layers (the paper's ablation of the selection level)."""
    layers: dict[str, list[Unit]] = {}
    for unit in inside:
        layers.setdefault(f"layer\0{unit.layer}", []).append(unit)
    if config.balance == "elements":
        wholes = [Unit(n, None, "layer", _elements(layers[n]), ()) for n in order(layers)]
        names = [w.name for w in _greedy(wholes, _elements(inside) * _exact(config))]
    else:
        names = order(layers)[: _nearest(len(layers) * _exact(config), order)]
    return [u for name in names for u in layers[name]]


def _model(inside: Sequence[Unit], config: SelectionConfig, order: _Order) -> Sequence[Unit]:
    """Matrices from the whole model, without regard to layer or category (the paper's ablation)."""
    if config.balance == "elements":
        return _greedy(_first(inside, len(inside), order), _elements(inside) * _exact(config))
    return _first(inside, _nearest(len(inside) * _exact(config), order), order)


def _first(group: Sequence[Unit], count: int, order: _Order) -> list[Unit]:
    by_name = {u.name: u for u in group}
    return [by_name[name] for name in order(by_name)[:count]]


def _greedy(ordered: Iterable[Unit], target: Fraction) -> list[Unit]:
    """Go through the drawn order and take a unit whenever that brings the number of elements nearer to the target."""
    chosen: list[Unit] = []
    total = 0
    for unit in ordered:
        if abs(total + unit.elements - target) < abs(total - target):
            chosen.append(unit)
            total += unit.elements
    return chosen


# Adding a strategy is one function above and one row here.
STRATEGIES: dict[str, Callable[[Sequence[Unit], SelectionConfig, _Order], Iterable[Unit]]] = {
    "all": _all,
    "category": _category,
    "layer": _layer,
    "model": _model,
}
