"""The selection core: what every draw of every strategy must be, by property and without torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError
from hft_cli.method.selection import STRATEGIES, draw, heaviest_draw, lora_draw
from hft_cli.method.units import group_units


def model(layers: int, matrices: dict[str, tuple[str, tuple[int, ...]]], bias: bool = False, tied: bool = False):
    """Parameters of a made-up model: matrices maps a name within the layer to its kind and shape."""
    params = [("embed.weight", (64, 8), None, "embedding"), ("norm.weight", (8,), None, "norm")]
    if not tied:
        params.append(("head.weight", (64, 8), None, "head"))
    for layer in range(layers):
        for name, (kind, shape) in matrices.items():
            params.append((f"layers.{layer}.{name}.weight", shape, layer, kind))
            if bias and kind != "norm":
                params.append((f"layers.{layer}.{name}.bias", shape[:1], layer, kind))
    return [Param(name, shape, layer, kind, (name,)) for name, shape, layer, kind in params]


SQUARE, WIDE = (8, 8), (24, 8)
NORMS = {"norm1": ("norm", (8,)), "norm2": ("norm", (8,))}
LLAMA = {
    **dict.fromkeys("qkvo", ("attention", SQUARE)),
    **dict.fromkeys(("gate", "up", "down"), ("feed_forward", WIDE)),
    **NORMS,
}
GROUPED = LLAMA | {"k": ("attention", (2, 8)), "v": ("attention", (2, 8))}
FUSED = {"qkv": ("attention", WIDE), "o": ("attention", SQUARE), "gate_up": ("feed_forward", (48, 8)),
         "down": ("feed_forward", WIDE), **NORMS}  # fmt: skip
GEMMA = LLAMA | {"norm3": ("norm", (8,)), "norm4": ("norm", (8,)), "q_norm": ("norm", (4,))}
EXPERTS = {**dict.fromkeys("qkvo", ("attention", SQUARE)), "router": ("router", (4, 8)),
           "experts.gate_up": ("feed_forward", (4, 48, 8)), "experts.down": ("feed_forward", (4, 8, 24)),
           **NORMS}  # fmt: skip
ARCHITECTURES = {"llama": LLAMA, "grouped": GROUPED, "fused": FUSED, "gemma": GEMMA, "experts": EXPERTS}

architectures = st.builds(
    lambda name, layers, bias, tied: model(layers, ARCHITECTURES[name], bias, tied),
    st.sampled_from(sorted(ARCHITECTURES)),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
ratios = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]), st.floats(0, 1).map(lambda x: round(x, 3)))
seeds = st.integers(0, 10**9)
configs = st.builds(
    SelectionConfig,
    level=st.sampled_from(["all", "category", "layer", "model"]),
    ratio=ratios,
    redraw=st.sampled_from(["independent", "fixed"]),
    balance=st.sampled_from(["matrices", "elements"]),
    embeddings=st.just("update"),
    final_norm=st.sampled_from(["update", "freeze"]),
)


@given(architectures, configs, st.integers(1, 20), seeds)
@settings(max_examples=150, deadline=None)
def test_a_draw_splits_the_parameters_by_whole_units(params, config, round, seed):
    drawn = draw(params, config, round, seed)
    assert sorted(drawn.updated + drawn.frozen) == sorted(p.name for p in params)
    for unit in group_units(params):
        assert len({name in drawn.updated for name in unit.params}) == 1


@given(architectures, ratios, st.integers(1, 9), seeds, st.sampled_from(["independent", "complementary", "fixed"]))
@settings(max_examples=150, deadline=None)
def test_category_reaches_the_ratio_to_within_one_matrix(params, ratio, round, seed, redraw):
    drawn = draw(params, SelectionConfig(ratio=ratio, redraw=redraw), round, seed)
    exact = Fraction(str(ratio))
    updated, size = Counter(), Counter()
    for unit in group_units(params):
        if unit.layer is not None:
            size[unit.kind, unit.layer] += 1
            updated[unit.kind, unit.layer] += unit.params[0] in drawn.updated
    for kind in {kind for kind, _ in size}:
        layers = [key for key in size if key[0] == kind]
        for key in layers:
            assert abs(updated[key] - size[key] * exact) < 1
        whole = sum(size[key] for key in layers) * exact
        assert abs(sum(updated[key] for key in layers) - whole) <= Fraction(1, 2)


@given(st.integers(1, 16).map(lambda n: 2 * n), seeds, st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_half_of_llama_has_exactly_the_counts_of_the_paper(layers, seed, round):
    drawn = draw(model(layers, LLAMA), SelectionConfig(), round, seed)
    per_layer = defaultdict(Counter)
    for unit in group_units(model(layers, LLAMA)):
        per_layer[unit.layer][unit.kind] += unit.params[0] in drawn.updated
    blocks = [per_layer[layer] for layer in range(layers)]
    assert all(block["attention"] == 2 and block["norm"] == 1 for block in blocks)
    assert Counter(block["feed_forward"] for block in blocks) == {1: layers // 2, 2: layers // 2}
    assert drawn.matrices_reached == 0.5
    assert {"embed.weight", "head.weight", "norm.weight"} <= set(drawn.updated)


@given(architectures, seeds, st.sampled_from(["layer", "model"]), ratios)
@settings(max_examples=80, deadline=None)
def test_layer_and_model_take_the_nearest_number(params, seed, level, ratio):
    drawn = draw(params, SelectionConfig(level=level, ratio=ratio), 1, seed)
    groups = defaultdict(set)
    for unit in group_units(params):
        if unit.layer is not None:
            groups[unit.layer if level == "layer" else unit.name].add(unit.params[0] in drawn.updated)
    assert all(len(states) == 1 for states in groups.values())
    chosen = sum(states == {True} for states in groups.values())
    assert abs(chosen - len(groups) * Fraction(str(ratio))) <= Fraction(1, 2)


@given(architectures, ratios, seeds, st.sampled_from(["category", "layer", "model"]))
@settings(max_examples=100, deadline=None)
def test_balancing_elements_comes_within_one_unit_of_the_ratio(params, ratio, seed, level):
    drawn = draw(params, SelectionConfig(level=level, ratio=ratio, balance="elements"), 1, seed)
    inside = [u for u in group_units(params) if u.layer is not None]
    whole = sum(u.elements for u in inside)
    groups = defaultdict(int)
    for unit in inside:
        groups[unit.layer if level == "layer" else unit.name] += unit.elements
    kinds = len({u.kind for u in inside}) if level == "category" else 1  # each category is balanced by itself
    assert abs(drawn.elements_reached - ratio) * whole <= max(groups.values()) * kinds + 1e-6


def test_grouped_attention_needs_balanced_elements_for_half():
    params = model(8, GROUPED)
    by_matrices = {draw(params, SelectionConfig(), 1, seed).elements_reached for seed in range(30)}
    by_elements = {draw(params, SelectionConfig(balance="elements"), 1, seed).elements_reached for seed in range(30)}
    assert len(by_matrices) > 5
    assert by_elements == {0.5}


@given(architectures, seeds, st.sampled_from(["category", "layer", "model"]), st.sampled_from(["matrices", "elements"]))
@settings(max_examples=60, deadline=None)
def test_ratio_1_updates_all_and_ratio_0_nothing_in_the_layers(params, seed, level, balance):
    everything = draw(params, SelectionConfig(level="all"), 1, seed)
    assert draw(params, SelectionConfig(level=level, ratio=1, balance=balance), 1, seed).sha256 == everything.sha256
    nothing = draw(params, SelectionConfig(level=level, ratio=0, balance=balance), 1, seed)
    assert {p.name for p in params if p.layer is None} == set(nothing.updated)


@given(architectures, configs, st.integers(1, 9), seeds, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_parameters_does_not_matter(params, config, round, seed, random):
    shuffled = list(params)
    random.shuffle(shuffled)
    assert draw(shuffled, config, round, seed).sha256 == draw(params, config, round, seed).sha256


def test_a_draw_is_the_same_in_another_process():
    here = draw(model(4, LLAMA), SelectionConfig(), 3, 7).sha256
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}; from test_selection import *;"
        "print(draw(model(4, LLAMA), SelectionConfig(), 3, 7).sha256)"
    )
    for hash_seed in ("0", "1"):
        there = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert there.stdout.strip() == here


# SHA-256 (first 16 digits) of the updated names under seeds 0, 42 and 2025, by (level, balance, redraw, round, ratio).
# A draw of a published seed never changes: do not edit these values.
PUBLISHED_DRAWS = {
    ("all", "matrices", "independent", 1, 0.5): "6054421e265a671b 6054421e265a671b 6054421e265a671b",
    ("category", "matrices", "independent", 1, 0.5): "a0c0b7e2a73f0d4f 5dc7e1f33c629968 7c8bf240b3292937",
    ("category", "matrices", "independent", 2, 0.3): "6910b234082a0343 d00a63771214e721 113731dc4e6d92ed",
    ("category", "elements", "independent", 1, 0.5): "3d6524031e9e4a91 af3a39ffca804e60 d28ba26073c24861",
    ("category", "matrices", "fixed", 2, 0.5): "a0c0b7e2a73f0d4f 5dc7e1f33c629968 7c8bf240b3292937",
    ("category", "matrices", "complementary", 2, 0.5): "551f81b99e95a573 ffbcaf72c7fcebf5 0eefc0b031ad6ad0",
    ("category", "elements", "complementary", 2, 0.5): "86ec9ac1b8ce9100 9860024b69459706 b86a41773cf160b1",
    ("category", "matrices", "balanced", 3, 0.5): "ffddcafe108d7e9b 9587a8eecd48c257 897f9c28202f1031",
    ("layer", "matrices", "independent", 1, 0.5): "45df92cfadbb2af4 1eeb1fc43186e6ea daf799c91bf862d4",
    ("layer", "matrices", "independent", 2, 0.3): "8678a07127d34444 2a838760c07cc94c 928f55f600b81474",
    ("layer", "elements", "independent", 1, 0.5): "44e0f4adfa6884e4 2a838760c07cc94c 928f55f600b81474",
    ("layer", "matrices", "fixed", 2, 0.5): "45df92cfadbb2af4 1eeb1fc43186e6ea daf799c91bf862d4",
    ("layer", "matrices", "complementary", 2, 0.5): "f8c46a6969fe1cb9 eae566cadf054854 afffee5e3afb804c",
    ("layer", "elements", "complementary", 2, 0.5): "c520e25acd79e8cc 222ee02d7e3ed8d9 8274bb4ee31b968e",
    ("layer", "matrices", "balanced", 3, 0.5): "1eeb1fc43186e6ea daf799c91bf862d4 45df92cfadbb2af4",
    ("model", "matrices", "independent", 1, 0.5): "0f9e29bbeef52753 7322cdbb089a33dc 97b03639d2aa4777",
    ("model", "matrices", "independent", 2, 0.3): "7362e0799968f225 cba8135884cf3c68 c5df1273628e4bd7",
    ("model", "elements", "independent", 1, 0.5): "16bde97d63df057b 15cb7e5e0fa6fd56 8bf72bf5ad6d69e0",
    ("model", "matrices", "fixed", 2, 0.5): "0f9e29bbeef52753 7322cdbb089a33dc 97b03639d2aa4777",
    ("model", "matrices", "complementary", 2, 0.5): "5a0800b28cca011a 7194b4b832a043a3 6fccb6f62eed0f28",
    ("model", "elements", "complementary", 2, 0.5): "7c6f51434eeb3f38 c3b67af4d36a1789 435dd3c96a24de43",
    ("model", "matrices", "balanced", 3, 0.5): "aa36a3e7c04c21b6 936429a5d225cc50 80ad92372c69deee",
}  # fmt: skip
PUBLISHED_LORA = "f5bf4c0b2939f839"
PUBLISHED_RECORD = "e19a18b32df0b1ef35367ca7354e0fa460a2544a21b72676302b8e8263c70d6f"
PUBLISHED_LORA_RECORD = "f1124ea446e084f0a48c2adaed1cbf8248ffbe0be051ddde42bd5e7b4ced0bc5"


@pytest.mark.versions
@pytest.mark.parametrize("setting", PUBLISHED_DRAWS, ids=lambda setting: " ".join(map(str, setting)))
def test_a_seed_gives_the_draw_that_was_published(setting):
    level, balance, redraw, round, ratio = setting
    config = SelectionConfig(level=level, balance=balance, redraw=redraw, ratio=ratio)
    hashes = [draw(model(5, GROUPED, bias=True), config, round, seed).sha256[:16] for seed in (0, 42, 2025)]
    assert hashes == PUBLISHED_DRAWS[setting].split()


def test_every_strategy_has_published_draws():
    assert {setting[0] for setting in PUBLISHED_DRAWS} == {*STRATEGIES} - {"names", "importance"}  # which draw nothing


@given(architectures, st.integers(1, 4), st.integers(0, 10).map(lambda tenth: tenth / 10), st.randoms())
def test_importance_takes_the_least_of_each_category_and_layer(params, round, ratio, random):
    units = [unit for unit in group_units(params) if unit.layer is not None]
    scores = {unit.name: random.random() for unit in units}
    least, most = (
        draw(params, SelectionConfig(level="importance", ratio=ratio, importance_update=which), round, 7, scores)
        for which in ("least", "most")
    )
    by_chance = draw(params, SelectionConfig(ratio=ratio), round, 7)
    assert least.matrices_reached == most.matrices_reached == by_chance.matrices_reached
    for key in {(unit.kind, unit.layer) for unit in units}:
        group = [unit for unit in units if (unit.kind, unit.layer) == key]
        for chosen, sign in ((least, 1), (most, -1)):
            taken = [sign * scores[unit.name] for unit in group if unit.params[0] in chosen.updated]
            left = [sign * scores[unit.name] for unit in group if unit.params[0] in chosen.frozen]
            assert not (taken and left) or max(taken) <= min(left)
            assert abs(len(taken) - len(group) * ratio) < 1
    assert draw(params, SelectionConfig(level="importance", ratio=ratio), 1, 99, scores).updated == least.updated


def test_importance_of_another_model_is_refused():
    with pytest.raises(UserError, match=r"no importance of .*: was it measured on another model"):
        draw(model(2, GROUPED), SelectionConfig(level="importance"), 1, 0, {"layers.0.q": 1.0})


@given(architectures, seeds, st.integers(1, 4))
def test_named_matrices_are_updated_in_every_round(params, seed, round):
    outside = {"embeddings": "freeze", "head": "freeze", "final_norm": "freeze"}
    config = SelectionConfig(level="names", names=["norm1", r"layers\.0\."], **outside)
    updated = set(draw(params, config, round, seed).updated)
    assert updated == {p.name for p in params if "norm1" in p.name or "layers.0." in p.name}
    assert set(heaviest_draw(params, config)) == updated


def test_a_name_that_finds_nothing_is_refused():
    config = SelectionConfig(level="names", names=["norm1", "embed"])
    with pytest.raises(UserError, match=r"selection\.names: 'embed' finds no parameter in the layers, .* own"):
        draw(model(2, GROUPED), config, 1, 0)


def test_the_record_of_a_draw_in_the_ledger_never_changes():
    params = model(5, GROUPED, bias=True)
    lora = lora_draw(params, SelectionConfig(), 1, 42)
    assert lora.sha256[:16] == PUBLISHED_LORA
    for drawn, digest in (
        (draw(params, SelectionConfig(ratio=0.3), 2, 42), PUBLISHED_RECORD),
        (lora, PUBLISHED_LORA_RECORD),
    ):
        assert hashlib.sha256(json.dumps(drawn.as_dict()).encode()).hexdigest() == digest


def test_every_subset_of_a_group_is_equally_likely():
    params = model(2, LLAMA)
    pairs, triples = Counter(), Counter()
    for seed in range(2000):
        updated = set(draw(params, SelectionConfig(), 1, seed).updated)
        pairs[tuple(n for n in "qkvo" if f"layers.0.{n}.weight" in updated)] += 1
        triples[tuple(n for n in ("gate", "up", "down") if f"layers.0.{n}.weight" in updated)] += 1
    assert len(pairs) == comb(4, 2)
    assert len(triples) == comb(3, 1) + comb(3, 2)
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-4
    assert stats.chisquare(list(triples.values())).pvalue > 1e-4


def test_draws_of_different_rounds_are_independent():
    params = model(2, LLAMA)
    table = [[0] * 6 for _ in range(6)]
    subsets: dict[tuple[str, ...], int] = {}
    for seed in range(2000):
        both = []
        for round in (1, 2):
            updated = set(draw(params, SelectionConfig(), round, seed).updated)
            subset = tuple(n for n in "qkvo" if f"layers.0.{n}.weight" in updated)
            both.append(subsets.setdefault(subset, len(subsets)))
        table[both[0]][both[1]] += 1
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("level", ["category", "layer", "model"])
@pytest.mark.parametrize("balance", ["matrices", "elements"])
def test_complementary_rounds_update_every_matrix_once_in_pairs(level, balance):
    config = SelectionConfig(level=level, redraw="complementary", balance=balance)
    params = model(4, LLAMA if balance == "matrices" else GROUPED)
    inside = {p.name for p in params if p.layer is not None}
    for seed in range(20):
        first, second, third = ({*draw(params, config, r, seed).updated} & inside for r in (1, 2, 3))
        assert first | second == inside
        assert not first & second
        assert third != first or level == "layer"


@given(architectures, ratios, seeds, st.sampled_from(["category", "layer", "model"]), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_balanced_rounds_update_a_group_equally_often(params, ratio, seed, level, rounds):
    config = SelectionConfig(level=level, ratio=ratio, redraw="balanced")
    updated = [set(draw(params, config, round, seed).updated) for round in range(1, rounds + 1)]
    counts = defaultdict(set)
    for unit in group_units(params):
        if unit.layer is not None:
            group = (unit.kind, unit.layer) if level == "category" else level
            counts[group].add(sum(unit.params[0] in names for names in updated))
    assert all(max(group) - min(group) <= 1 for group in counts.values())


def test_balanced_rounds_of_llama_start_like_independent_ones():
    params, config = model(4, LLAMA), SelectionConfig(redraw="balanced")
    updated = [set(draw(params, config, round, 3).updated) for round in range(1, 8)]
    counts = {sum(u.params[0] in names for names in updated) for u in group_units(params) if u.layer is not None}
    assert counts == {3, 4}
    assert updated[0] == set(draw(params, SelectionConfig(), 1, 3).updated)


def test_fixed_repeats_the_first_round_and_independent_does_not():
    params = model(8, LLAMA)
    fixed, free = SelectionConfig(redraw="fixed"), SelectionConfig()
    assert len({draw(params, fixed, round, 1).sha256 for round in range(1, 6)}) == 1
    assert len({draw(params, free, round, 1).sha256 for round in range(1, 6)}) == 5
    assert draw(params, fixed, 1, 1).sha256 == draw(params, free, 1, 1).sha256


@pytest.mark.parametrize(("key", "name"), [("embeddings", "embed"), ("head", "head"), ("final_norm", "norm")])
@pytest.mark.parametrize("level", ["all", "category", "layer", "model"])
def test_embeddings_head_and_final_norm_follow_their_keys(key, name, level):
    params = model(4, LLAMA)
    assert f"{name}.weight" in draw(params, SelectionConfig(level=level), 1, 0).updated
    assert f"{name}.weight" in draw(params, SelectionConfig(level=level, **{key: "freeze"}), 1, 0).frozen


def test_freezing_only_a_tied_head_is_refused():
    with pytest.raises(UserError, match=r"ties its head to its embeddings\. Set both to the same"):
        draw(model(4, LLAMA, tied=True), SelectionConfig(head="freeze"), 1, 0)


def test_the_numbers_of_the_ledger_follow_from_the_names():
    params = model(6, GROUPED, bias=True)
    drawn = draw(params, SelectionConfig(ratio=0.3), 2, 5)
    sizes = {p.name: p.elements for p in params}
    assert drawn.total_elements == sum(sizes.values())
    assert drawn.updated_elements == sum(sizes[name] for name in drawn.updated)
    inside = [u for u in group_units(params) if u.layer is not None]
    assert drawn.matrices_reached == sum(u.params[0] in drawn.updated for u in inside) / len(inside)


@given(architectures, configs, seeds, st.integers(1, 4), st.sampled_from(["independent", "complementary"]))
@settings(max_examples=80, deadline=None)
def test_no_draw_has_more_elements_than_the_heaviest(params, config, seed, round, redraw):
    config = replace(config, redraw=redraw)
    try:
        drawn = draw(params, config, round, seed)
    except UserError:  # complementary by elements is for ratio 0.5
        return
    heaviest = set(heaviest_draw(params, config))
    assert sum(p.elements for p in params if p.name in heaviest) >= drawn.updated_elements
    if config.balance == "matrices" and redraw == "independent":  # the same number of matrices: it is a draw
        units = group_units(params)
        assert sum(u.params[0] in heaviest for u in units) == sum(u.params[0] in drawn.updated for u in units)


def test_the_heaviest_draw_has_the_large_attention_matrices():
    heaviest = heaviest_draw(model(4, GROUPED), SelectionConfig(ratio=0.5))
    assert {name.split(".")[2] for name in heaviest if name.split(".")[-2] in "qkvo"} == {"q", "o"}
