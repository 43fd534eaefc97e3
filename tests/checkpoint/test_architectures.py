"""Shapes and ties that follow from config.json alone are those that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from architectures import FAMILIES
from transformers import AutoConfig

from hft_cli.checkpoint.architectures import KNOWN_SHAPES, SAME_NAMES
from hft_cli.checkpoint.parameters import parameters_from_config, parameters_from_fields
from hft_cli.paths import ARCHITECTURES

# Elements of the published checkpoints, as the hub counts them in their files.
PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "qwen3_8b": 8_190_735_360,
    "olmo2_7b": 7_298_617_344, "mixtral_8x7b": 46_702_792_704,
}  # fmt: skip


@pytest.mark.parametrize("model_type", SAME_NAMES)
def test_known_types_have_the_default_tying_of_transformers(model_type: str) -> None:
    assert SAME_NAMES[model_type] == AutoConfig.for_model(model_type).tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_from_fields_are_those_of_transformers(family: str) -> None:
    fields = dict(FAMILIES[family])
    params = parameters_from_fields(fields)
    assert params == parameters_from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def test_every_type_with_known_shapes_is_tested():
    assert {own["model_type"] for own in FAMILIES.values()} == set(KNOWN_SHAPES)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_shipped_architecture_has_its_published_size(name):
    config = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    assert sum(p.elements for p in parameters_from_fields(config) or ()) == PUBLISHED[name]


def test_every_shipped_architecture_has_a_model_config():
    shipped = {path.stem for path in ARCHITECTURES.glob("*.json")}
    conf = Path(__file__).parents[2] / "conf/model"
    assert shipped == set(PUBLISHED)
    assert all(f"architecture: {name}\n" in (conf / f"{name}.yaml").read_text() for name in shipped)
