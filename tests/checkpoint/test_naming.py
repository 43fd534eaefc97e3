"""The layer, the kind and the role of a parameter by its name, for every architecture."""

# ruff: noqa: C408

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, WIDE, config_of, params_of
from model_types import tiny_config
from transformers import AutoConfig

from hft_cli.checkpoint.naming import (
    KINDS,
    Param,
    Position,
    category,
    classify,
    layer_and_matrix,
    make_params,
    parse_rules,
    short_names,
)
from hft_cli.checkpoint.parameters import parameters_from_config
from hft_cli.errors import UserError

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_each_parameter_of_a_layer_gets_its_kind(name: str) -> None:
    params = params_of(name)
    last = [param for param in params if param.layer == 2]
    found = {kind: sorted({param.unit.split(".2.", 1)[1] for param in last if param.kind == kind}) for kind in KINDS}
    attention, feed_forward, norm, router = (sorted(units.split()) for units in ARCHITECTURES[name][2:])
    assert found == {
        "attention": attention, "feed_forward": feed_forward, "norm": norm, "router": router,
        "embedding": [], "head": [], "mixer": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "layer", "kind", "units"),
    [
        ("gpt_oss", 0, "attention", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
        ("mamba", 0, "mixer", "mixer.A_log mixer.conv1d mixer.dt_proj mixer.in_proj mixer.out_proj mixer.x_proj"),
        ("mamba2", 0, "mixer", "mixer.conv1d mixer.in_proj mixer.out_proj"),
        ("lfm2", 0, "mixer", "conv.conv conv.in_proj conv.out_proj"),
        ("lfm2", 1, "mixer", ""),
        ("lfm2", 1, "attention", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"),
        (
            "qwen3_next", 0, "mixer",
            "linear_attn.conv1d linear_attn.in_proj_ba linear_attn.in_proj_qkvz linear_attn.out_proj",
        ),
        ("qwen3_next", 3, "attention", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"),
        ("nemotron_h", 0, "router", ""),
        ("ernie4_5_moe", 1, "router", "mlp.gate"),
        ("afmoe", 1, "router", "mlp.router.gate"),
        ("apertus", 0, "feed_forward", "mlp.up_proj mlp.down_proj"),
        (
            "doge", 0, "norm",
            "input_layernorm post_attention_layernorm input_residual post_attention_residual self_attn.q_norm "
            "self_attn.k_norm",
        ),
        (
            "zamba2", 1, "attention",
            "shared_transformer.self_attn.q_proj shared_transformer.self_attn.k_proj "
            "shared_transformer.self_attn.v_proj shared_transformer.self_attn.o_proj",
        ),
    ],
)  # fmt: skip
def test_layers_of_other_kinds_have_these_units(model_type: str, layer: int, kind: str, units: str) -> None:
    params = [p for p in parameters_from_config(tiny_config(model_type)) if p.layer == layer and p.kind == kind]
    assert {p.unit.split(f".{layer}.", 1)[1] for p in params} == {*units.split()}


def test_a_vector_is_drawn_with_the_largest_matrix_beside_it() -> None:
    units = {p.name: p.unit.split(".0.", 1)[1] for p in parameters_from_config(tiny_config("gpt_oss")) if p.layer == 0}
    assert units["model.layers.0.self_attn.sinks"] == "self_attn.q_proj"
    units = {p.name: p.unit for p in parameters_from_config(tiny_config("mamba2"))}
    for vector in ("A_log", "D", "dt_bias"):
        assert units[f"backbone.layers.0.mixer.{vector}"] == "backbone.layers.0.mixer.in_proj"


def test_no_unit_of_any_model_type_is_a_vector_beside_a_matrix() -> None:
    for model_type in ("rwkv", "diffllama", "zamba", "jetmoe", "deepseek_v4", "falcon_h1", "minimax", "laguna"):
        groups: dict[str, list[Param]] = {}
        for param in parameters_from_config(tiny_config(model_type)):
            if param.layer is not None and param.kind != "norm":
                groups.setdefault(param.unit, []).append(param)
        assert [unit for unit, group in groups.items() if all(param.is_vector for param in group)] == []


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("llama", {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}),
        ("llama tied", {"model.embed_tokens": "embedding", "model.norm": "norm"}),
        ("phi", {"model.embed_tokens": "embedding", "model.final_layernorm": "norm", "lm_head": "head"}),
        ("gpt2", {"transformer.wte": "embedding", "transformer.wpe": "embedding", "transformer.ln_f": "norm"}),
        ("gpt_neox", {"gpt_neox.embed_in": "embedding", "gpt_neox.final_layer_norm": "norm", "lm_head": "head"}),
        (
            "opt",
            {
                "model.decoder.embed_tokens": "embedding",
                "model.decoder.embed_positions": "embedding",
                "model.decoder.final_layer_norm": "norm",
            },
        ),
        ("falcon", {"transformer.word_embeddings": "embedding", "transformer.ln_f": "norm"}),
    ],
)
def test_embeddings_head_and_final_norm_are_outside_the_layers(name: str, outside: dict[str, str]) -> None:
    assert {param.unit: param.kind for param in params_of(name) if param.layer is None} == outside


def test_a_bias_shares_the_unit_of_its_matrix() -> None:
    def unit(name: str) -> str:
        return Param(name, (1,), 0, "attention", (name,)).unit

    assert unit("model.layers.0.self_attn.q_proj.bias") == unit("model.layers.0.self_attn.q_proj.weight")
    assert unit("model.layers.0.mlp.experts.down_proj") == "model.layers.0.mlp.experts.down_proj"
    assert unit("model.layers.0.mlp.experts.down_proj_bias") == "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mamba.B_log",
        "model.layers.0.self_attn.sink",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.x.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_nothing_is_guessed(name: str) -> None:
    with pytest.raises(UserError, match="Cannot place parameter '" + name):
        make_params({name: (4, 4)}, {name: (name,)}, {})


def test_merged_experts_have_three_dimensions_and_their_bias_two() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    assert classify(name, (4, 8, 8)) == classify(f"{name}_bias", (4, 8)) == ("feed_forward", 0)
    assert classify(name, (4, 8)) is None
    assert classify(f"{name}_bias", (4, 8, 8)) is None


def test_unplaced_parameters_are_all_named_with_an_override() -> None:
    shapes = {f"model.layers.{layer}.{name}": (4, 4) for layer in range(12) for name in ("state.A", "state.B.3.weight")}
    shapes |= {"model.extra.weight": (4, 4), "model.layers.0.mlp.up_proj.weight": (4, 4)}
    stored = {name: [name] for name in shapes}
    with pytest.raises(UserError, match=r"'model\.extra\.weight' \(and 24 more\)") as error:
        make_params(shapes, stored, {})
    override = str(error.value).split("'")[3]
    assert override == "model.kinds={model.extra.weight: KIND, state.A: KIND, state.B..*.weight: KIND}"
    parser = pytest.importorskip("hydra.core.override_parser.overrides_parser").OverridesParser.create()
    kinds = parser.parse_override(override).value()
    assert set(kinds) == {"model.extra.weight", "state.A", "state.B..*.weight"}
    kinds = dict.fromkeys(kinds, "mixer") | {"model.extra.weight": "embedding"}
    params = make_params(shapes, stored, kinds)
    assert {(param.kind, param.layer) for param in params if "state" in param.name} == {("mixer", n) for n in range(12)}


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"lm_head": "attention"}, r"'lm_head\.weight' is outside the layers.*Map it to one of: norm, embedding, head"),
        ({"embed_tokens": "mixer"}, "outside the layers, where nothing is drawn, so it cannot be mixer"),
        ({r"q_proj\.bias": "norm"}, r"q_proj\.bias' is norm and .*q_proj\.weight' is attention.*Map both to one kind"),
    ],
)
def test_a_map_that_no_draw_could_follow_is_refused(kinds: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameters_from_config(config_of("llama with biases"), kinds)


def test_a_vision_tower_is_refused() -> None:
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = AutoConfig.for_model("gemma3", text_config=WIDE, vision_config=vision | dict(patch_size=14))
    with pytest.raises(UserError, match=r"vision_tower|multi_modal"):
        parameters_from_config(config)


def test_the_users_map_wins_over_the_patterns() -> None:
    name = "model.layers.7.self_attn.q_norm.weight"
    assert classify(name, (4,)) == ("norm", 7)
    rules = parse_rules({"q_norm": "attention", "norm": "head"})
    assert classify(name, (4,), rules) == ("attention", 7)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"q_proj": "atention"}, "Did you mean 'attention'"),
        ({"q_proj(": "attention"}, "not a regular expression"),
        ({"q_proj": "attention", "qproj": "attention"}, "'qproj' matches no parameter"),
    ],
)
def test_a_mistake_in_the_users_map_is_refused(kinds: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameters_from_config(config_of("llama"), kinds)


@every_architecture
def test_reports_give_each_matrix_the_category_of_its_kind(name: str) -> None:
    for param in params_of(name):
        if param.layer is None:
            assert layer_and_matrix(param.name) is None
            continue
        layer, matrix = layer_and_matrix(param.name) or (None, "")
        assert layer == param.layer
        assert param.unit.endswith(f".{layer}.{matrix}")
        assert category(matrix) == {"router": "feed-forward"}.get(param.kind, param.kind.replace("_", "-"))


@pytest.mark.parametrize(
    ("tensor", "layer", "matrix", "group"),
    [
        ("h.3.attn.c_attn.bias", 3, "attn.c_attn", "attention"),
        ("model.layers.2.block_sparse_moe.experts.7.w2.weight", 2, "block_sparse_moe.experts.7.w2", "feed-forward"),
        ("model.layers.11.input_layernorm.weight", 11, "input_layernorm", "norm"),
        ("backbone.layers.0.mixer.A_log", 0, "mixer.A_log", "mixer"),
    ],
)
def test_a_file_tensor_has_a_layer_a_matrix_and_a_category(tensor: str, layer: int, matrix: str, group: str) -> None:
    assert layer_and_matrix(tensor) == (layer, matrix)
    assert category(matrix) == group


def test_short_names_are_given_where_they_are_unique() -> None:
    matrices = ["self_attn.q_proj", "input_layernorm", "mlp.c_proj", "attn.c_proj", "post_attention_layernorm"]
    assert list(short_names(matrices).values()) == ["q", "input_norm", "mlp.c_proj", "attn.c_proj", "post_attn_norm"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "gpt2", "gpt_neox", "opt", "mixtral", "phi"])
def test_output_projections_are_known(name: str) -> None:
    layer = [param for param in params_of(name) if param.layer == 2]
    writing = (Position.ATTENTION_OUTPUT, Position.FEED_FORWARD_OUTPUT)
    expected = {
        "llama": {"self_attn.o_proj", "mlp.down_proj"},
        "gemma3": {"self_attn.o_proj", "mlp.down_proj"},
        "olmo2": {"self_attn.o_proj", "mlp.down_proj"},
        "gpt2": {"attn.c_proj", "mlp.c_proj"},
        "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
        "opt": {"self_attn.out_proj", "fc2"},
        "mixtral": {"self_attn.o_proj", "mlp.experts.down_proj"},
        "phi": {"self_attn.dense", "mlp.fc2"},
    }
    assert {p.unit.split(".2.")[1] for p in layer if p.position in writing} == expected[name]
    reading = {p.kind for p in layer if p.position in (Position.ATTENTION_INPUT, Position.FEED_FORWARD_INPUT)}
    assert {"attention", "feed_forward"} <= reading


def test_norms_have_their_position_and_what_they_normalize() -> None:
    norms = {p.unit.split(".2.")[1]: p for p in params_of("gemma3") if p.layer == 2 and p.kind == "norm"}
    assert {name: norm.position.name for name, norm in norms.items()} == {
        "input_layernorm": "FIRST_NORM", "post_attention_layernorm": "MIDDLE_NORM",
        "pre_feedforward_layernorm": "MIDDLE_NORM", "post_feedforward_layernorm": "LAST_NORM",
        "self_attn.q_norm": "ATTENTION_INPUT", "self_attn.k_norm": "ATTENTION_INPUT",
    }  # fmt: skip
    assert {name: norm.head_norm for name, norm in norms.items() if norm.head_norm} == {
        "self_attn.q_norm": "q", "self_attn.k_norm": "k",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gated"), [("llama", True), ("phi3", True), ("mixtral", True), ("gpt2", False), ("phi", False)]
)
def test_a_gated_feed_forward_block_is_known(name: str, gated: bool) -> None:
    assert any(param.is_gate for param in params_of(name)) == gated


def test_an_adapter_has_the_position_of_its_matrix() -> None:
    adapter = Param("model.layers.0.mlp.down_proj.lora_A.weight", (4, 8), 0, "feed_forward", ())
    assert adapter.position == Position.FEED_FORWARD_OUTPUT
