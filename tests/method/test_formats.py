"""A draw in the terms of other programs, each read here by the rules of that program's code.

Those rules are of axolotl 0.19.0, ms-swift 4.6.0, LLaMA-Factory 0.9.5 and PEFT 0.21.2.
"""

from __future__ import annotations

import json
import re
import shlex

import pytest
import yaml
from helpers import BASE
from model_types import tiny_config

from hft_cli.checkpoint.naming import Param
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.errors import UserError
from hft_cli.method.formats import FORMATS
from hft_cli.method.selection import Draw, draw

MODELS = ["llama", "gpt2", "mixtral", "qwen2", "opt"]


def params_of(model_type: str) -> tuple[Param, ...]:
    if model_type == "pocket":
        return parameters_from_folder(BASE)
    config = tiny_config(model_type)
    config.num_hidden_layers = 12
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 12
    return parameters_from_config(config)


def drawn(params: tuple[Param, ...], **selection: object) -> Draw:
    return draw(params, SelectionConfig(**selection), 1, 42)


def by_axolotl(text: str, names: list[str]) -> set[str]:
    """Periods are literal unless a plus follows, and a pattern matches from the start."""
    patterns = [re.compile(re.sub(r"\.(?!\+)", "\\.", each)) for each in yaml.safe_load(text)["unfrozen_parameters"]]
    return {name for name in names if any(pattern.match(name) for pattern in patterns)}


def by_swift(text: str, names: list[str]) -> set[str]:
    """All parameters are frozen by the ratio, then those in which the expression is found are trained."""
    words = shlex.split(text)
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert (options["--tuner_type"], options["--freeze_parameters_ratio"]) == ("full", "1.0")
    pattern = re.compile(options["--trainable_parameters_regex"])
    return {name for name in names if pattern.search(name)}


def by_llamafactory(text: str, names: list[str], layers: int) -> set[str]:
    """What has ".LAYER.BLOCK" or the name of an extra module in its name is trained."""
    settings = yaml.safe_load(text)
    count = settings["freeze_trainable_layers"]
    numbers = range(max(0, layers - count), layers) if count > 0 else range(min(-count, layers))
    blocks = settings["freeze_trainable_modules"].split(",")
    texts = [f".{number}.{'' if block == 'all' else block}" for number in numbers for block in blocks]
    texts += settings["freeze_extra_modules"].split(",") if "freeze_extra_modules" in settings else []
    return {name for name in names if any(part in name for part in texts)}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("selection", [{}, {"level": "layer"}, {"level": "all"}, {"ratio": 0.1, "head": "freeze"}])
def test_axolotl_and_swift_train_exactly_the_draw(model_type, selection):
    params = params_of(model_type)
    if model_type in ("gpt2", "opt") and "head" in selection:
        selection = {**selection, "embeddings": "freeze"}  # they are tied
    names, expected = [param.name for param in params], drawn(params, **selection)
    assert by_axolotl(FORMATS["axolotl"](expected, params), names) == set(expected.updated)
    assert by_swift(FORMATS["swift"](expected, params), names) == set(expected.updated)
    assert set(FORMATS["names"](expected, params).split("\n")) == set(expected.updated)
    assert json.loads(FORMATS["json"](expected, params))["rounds"][0]["updated"] == list(expected.updated)


@pytest.mark.parametrize(
    "selection",
    [
        {"level": "all"},
        {"level": "names", "names": ["self_attn"], "final_norm": "freeze"},
        {"level": "names", "names": [r"layers\.[0-4]\."], "final_norm": "freeze"},
        {"level": "names", "names": [r"layers\.(9|1\d)\."], "final_norm": "freeze", "embeddings": "freeze"},
        {"level": "names", "names": [r"layers\.1[01]\.mlp"], "final_norm": "freeze", "head": "freeze"},
    ],
)
def test_llamafactory_trains_whole_blocks_of_the_ends(selection):
    params = params_of("llama")
    expected = drawn(params, **selection)
    text = FORMATS["llamafactory"](expected, params)
    assert by_llamafactory(text, [param.name for param in params], 12) == set(expected.updated)


@pytest.mark.parametrize(
    ("name", "selection", "message"),
    [
        ("llamafactory", {}, "takes the same whole blocks"),
        ("llamafactory", {"level": "layer"}, "takes the same whole blocks"),
        # The final norm is `norm`, which the norms of all layers have in their names.
        ("llamafactory", {"level": "names", "names": ["mlp"]}, "takes the same whole blocks"),
        ("peft", {}, "PEFT cannot train this draw"),
        ("deepspeed", {}, "no list of parameters to train"),
    ],
)
def test_what_a_program_cannot_train_is_refused(name, selection, message):
    params = params_of("llama")
    with pytest.raises(UserError, match=message):
        FORMATS[name](drawn(params, **selection), params)
