"""Maps of layers by matrices."""

from __future__ import annotations

from hft_cli.report.figures.heatmaps import Heatmap, draw_maps, heatmaps, layer_map

LAYER = "model.layers"


def test_matrices_are_in_the_order_of_the_layer():
    names = ("input_layernorm", "mlp.down_proj", "mlp.gate_proj", "self_attn.v_proj", "self_attn.q_proj")
    heatmap = layer_map("t", {f"{LAYER}.{layer}.{name}.weight": layer for layer in (10, 2) for name in names})
    assert heatmap.columns == ("q", "v", "gate", "down", "input_norm")
    assert heatmap.rows == ("2", "10")
    assert heatmap.cells == ((2,) * 5, (10,) * 5)


def test_a_bias_belongs_to_its_matrix():
    q, up = f"{LAYER}.0.self_attn.q_proj", f"{LAYER}.1.mlp.up_proj"
    values = {f"{q}.bias": 1.0, f"{q}.weight": 2.0, f"{up}.weight": 3.0, f"{up}.bias": 4.0, "head": 5.0}
    assert layer_map("t", values).cells == ((2.0, None), (None, 3.0))


def test_wide_maps_have_no_numbers():
    for columns, texts in ((24, 24), (25, 0)):
        names = tuple(map(str, range(columns)))
        axes = heatmaps([Heatmap("t", ("0",), names, ((1.0,) * columns,))], "Score", ".0f").axes[0]
        assert len(axes.texts) == texts


def test_a_map_without_updates_has_no_dots():
    (axes,) = draw_maps([Heatmap("t", ("0",), ("q",), ((0.0,),))]).axes
    assert not axes.lines
    assert axes.get_ylabel() == "Layer"
