"""What is trained: places in the forward pass, the head, adapters; shapes of every architecture."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, config_of, params_of
from workloads import PARAMS, SHAPES, fft, train

from hft_cli.config.training import LoraConfig
from hft_cli.plan.flops import flops
from hft_cli.plan.memory import memory
from hft_cli.plan.workload import Setup, Workload, lora_adapters, model_shape

SETUP = Setup(2, 2, "bfloat16", 1, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_planned(name):
    config = config_of(name).to_dict()
    params = params_of(name)
    shape = model_shape(config.get("text_config") or config, params)
    for stage in (None, 1, 2, 3):
        setup = Setup(stage, 2 if stage else 1, "bfloat16", rows=2, length=64)
        work = Workload(params, frozenset(p.name for p in params), shape, setup)
        needed = memory(work)
        assert min(vars(needed).values()) >= 0
        assert needed.activations > 0
        assert flops(work, 8, 64).total > 0


def test_a_mixture_has_experts_and_grouped_heads():
    shape = SHAPES["mixtral"]
    assert (shape.experts, shape.experts_used, shape.kv_heads, shape.gated) == (4, 2, 2, True)


@pytest.mark.parametrize(
    ("trained", "place"),
    [
        ("model.embed_tokens.weight", (-1, 0)),
        ("model.layers.3.input_layernorm.weight", (3, 0)),
        ("model.layers.3.self_attn.o_proj.weight", (3, 2)),
        ("model.layers.4.mlp.down_proj.weight", (4, 5)),
        ("model.norm.weight", (5, 0)),
        ("lm_head.weight", (6, 0)),
    ],
)
def test_the_backward_pass_ends_at_the_lowest_trained_parameter(trained, place):
    assert train("llama", [trained, "lm_head.weight"], SETUP).lowest == place


def test_a_tied_embedding_is_the_head():
    assert fft("llama with a tied head", SETUP).head.name == "model.embed_tokens.weight"
    assert fft("llama", SETUP).head.name == "lm_head.weight"


def test_lora_trains_its_adapters_alone():
    matrices = [p for p in PARAMS["llama"] if p.kind in ("attention", "feed_forward")]
    adapters = lora_adapters(PARAMS["llama"], {p.name for p in matrices}, LoraConfig(rank=4))
    elements = sum(p.elements for p in adapters)
    assert elements == sum(4 * sum(p.shape) for p in matrices)
    lengths = lora_adapters(PARAMS["llama"], {p.name for p in matrices}, LoraConfig(rank=4, dora=True))
    assert sum(p.elements for p in lengths) == elements + sum(p.shape[0] for p in matrices)
    work = Workload(PARAMS["llama"] + adapters, frozenset(p.name for p in adapters), SHAPES["llama"], SETUP)
    assert memory(work).optimizer == pytest.approx(8 * elements / 2, rel=1e-3)
    operations = flops(work, 4, 8)
    assert operations.weights < 0.2 * operations.forward
