"""half_finetune: the draw of the command line on a live model, and models that it must not touch."""

from __future__ import annotations

import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import BASE, composed
from model_types import tiny_config
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import hft_cli
from hft_cli import half_finetune
from hft_cli.checkpoint.conversion import meta_model
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError
from hft_cli.integrations import half
from hft_cli.method.rounds import draws
from hft_cli.method.selection import draw


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


def training(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    "selection", [{}, {"ratio": 0.25, "level": "layer"}, {"head": "freeze", "balance": "elements"}]
)
def test_the_draw_is_that_of_the_command_line(selection):
    overrides = [f"selection.{key}={value}" for key, value in selection.items()]
    config = composed("+method=hft", "data=pocket_two_tasks", *overrides, "seed=5")
    live = model()
    for round, expected in enumerate(draws(config, parameters_from_folder(BASE)), start=1):
        assert half_finetune(live, seed=5, round=round, **selection) == expected
        assert training(live) == set(expected.updated)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3_text", "opt"])
def test_models_without_weights_are_drawn_for(model_type):
    config = tiny_config(model_type)
    on_meta = meta_model(config)
    drawn = half_finetune(on_meta)
    assert drawn == draw(parameters_from_config(config), SelectionConfig(), 1, 42)
    assert training(on_meta) == set(drawn.updated)


def test_the_precision_does_not_matter():
    assert half_finetune(model().bfloat16()) == half_finetune(model())


def test_gradients_of_an_earlier_draw_are_gone():
    live = model()
    half_finetune(live)
    live(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    half_finetune(live, round=2)
    assert all(value.grad is None for value in live.parameters())


def peft_model() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model(), LoraConfig())


def quantized() -> Any:
    live = model()
    live.model.norm.weight = torch.nn.Parameter(torch.zeros(96, dtype=torch.uint8), requires_grad=False)
    return live


def flattened() -> Any:
    live = model()
    live.model.norm.weight = type("FlatParameter", (torch.nn.Parameter,), {})(torch.zeros(96))
    return live


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (peft_model, "has adapters of PEFT"),
        (lambda: torch.compile(model()), "is compiled: call half_finetune on the model that you give to torch.compile"),
        (lambda: type("Parallel", (DistributedDataParallel,), {"__init__": wrap})(model()), "is in a Parallel"),
        (lambda: torch.nn.DataParallel(model()), "is in a DataParallel: call half_finetune before that is made"),
        (quantized, "is quantized, and integers cannot be trained"),
        (flattened, "wrapped by FSDP1"),
    ],
)  # fmt: skip
def test_a_model_with_something_around_it_is_refused(make, message):
    wrapped = make()
    before = training(wrapped)
    with pytest.raises(UserError, match=message):
        half_finetune(wrapped)
    assert training(wrapped) == before


def wrap(self: Any, module: Any) -> None:
    torch.nn.Module.__init__(self)
    self.module = module


def test_a_living_optimizer_is_refused_and_a_dead_one_not():
    live = model()
    optimizer = torch.optim.AdamW(live.parameters())
    with pytest.raises(UserError, match=r"has an optimizer already \(AdamW\)"):
        half_finetune(live)
    assert len(training(live)) == 39
    del optimizer
    half_finetune(live)
    torch.optim.SGD(model().parameters(), lr=1)  # of another model
    half_finetune(live, round=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ration": 0.5}, "Unknown setting 'ration'. Did you mean 'ratio'"),
        ({"ratio": 2.0}, "ratio=2.0 must be in"),
        ({"level": "categry"}, "Did you mean 'category'"),
        ({"level": "importance"}, "needs rows"),
        ({"level": "names"}, "give both level=names and names"),
        ({"round": 0}, "rounds are counted from 1"),
        ({"seed": -1}, "seed"),
        ({"seed": 4.5}, "seed=4.5 is not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"seed": "42"}, "seed='42' is not a whole number"),
        ({"round": 1.5}, "round=1.5 is not a whole number"),
        ({"kinds": ["q"]}, r"kinds=\['q'\] is not a dict"),
        ({"level": "names", "names": "q_proj"}, r"names='q_proj' is not a list. Write names=\['q_proj'\]"),
        ({"ratio": "0.5"}, "ratio=0.5 is not a number"),
        ({"embeddings": False}, "Unknown embeddings 'False'"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(settings, message):
    live = model()
    with pytest.raises(UserError, match=message) as error:
        half_finetune(live, **settings)
    assert "\n" not in str(error.value)
    assert len(training(live)) == 39


def test_a_path_is_no_model():
    with pytest.raises(UserError, match="The model is a PosixPath"):
        half_finetune(BASE)


def test_names_that_are_unknown_can_be_given_kinds():
    live = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"mix": torch.nn.Linear(2, 2)})])})
    with pytest.raises(UserError, match=r"model\.kinds"):
        half_finetune(live)
    assert half_finetune(live, kinds={"mix": "attention"}, ratio=1.0).updated == (
        "blocks.0.mix.bias", "blocks.0.mix.weight",
    )  # fmt: skip


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(half).failed == 0


def test_the_import_is_light():
    code = (
        "import sys, hft_cli; heavy = {'torch', 'transformers', 'trl', 'hydra', 'omegaconf'}; "
        "assert not heavy & sys.modules.keys(); hft_cli.half_finetune; "
        "assert not {'trl', 'deepspeed', 'hydra', 'omegaconf', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_exported_exists():
    for name in hft_cli.__all__:
        assert getattr(hft_cli, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'halffinetune'"):
        hft_cli.__getattr__("halffinetune")


def test_a_partitioned_model_has_the_same_draw():
    whole, parted = model(), model()
    for value in parted.parameters():  # as deepspeed.zero.Init leaves them
        value.ds_shape, value.data = value.shape, torch.empty(0)
    assert half_finetune(parted) == half_finetune(whole)
