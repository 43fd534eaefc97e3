"""What a config field says about itself, and the check of single values that reads it."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace

import pytest

from hft_cli.config.schema import SCHEMAS, DataConfig, SelectionConfig
from hft_cli.config.settings import Range, check_settings, leaves, setting
from hft_cli.config.suites import BenchmarkConfig, ProbeConfig
from hft_cli.config.training import ContinualConfig, DpoConfig, GenerationConfig, TrainConfig
from hft_cli.errors import UserError
from hft_cli.method import selection


@pytest.mark.parametrize(
    ("text", "inside", "outside", "words"),
    [
        ("[1, inf)", (1, 1.5, 10**9), (0, 0.999, math.inf, math.nan), "at least 1"),
        ("(0, inf)", (1e-300, 1), (0, -1, math.inf), "above 0"),
        ("[0, 1)", (0, 0.5), (1, -0.1), "in [0, 1)"),
        ("(0, 1]", (0.5, 1), (0, 1.1), "in (0, 1]"),
    ],
)
def test_a_range_contains_its_closed_ends_only(text, inside, outside, words):
    assert all(value in Range(text) for value in inside)
    assert not any(value in Range(text) for value in outside)
    assert str(Range(text)) == words


@dataclass
class Example:
    """A config of this test."""

    share: float = setting(0.5, "A share.", range="[0, 1]")
    free: float = setting(1.0, "Any number.")
    steps: int | None = setting(None, "Steps.", unit="steps", range="[1, inf)")
    epochs: object = setting(2.0, "One number, or a map.", range="(0, inf)")
    names: list[str] = setting(["a"], "Names.", choices=("a", "b"))
    level: str = setting("layer", "A registry.", choices=("none", "hft_cli.method.selection:STRATEGIES"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("share", 1.5, "share=1.5 must be in [0, 1]."),
        ("share", True, "share=True is not a number. It must be in [0, 1]."),
        ("share", "0.5", "share=0.5 is not a number. It must be in [0, 1]."),
        ("share", math.nan, "share=nan is not a finite number."),
        ("free", math.inf, "free=inf is not a finite number."),
        ("steps", 0, "steps=0 must be at least 1."),
        ("epochs", None, "epochs=null is not a number. It must be above 0."),
        ("epochs", {"x": 1, "y": 0}, "epochs.y=0 must be above 0."),
        ("epochs", [1], "epochs=[1] is not a number. It must be above 0."),
        ("names", ["a", "c"], "Unknown names 'c'. Available: a, b."),
        ("level", "categry", "Unknown level 'categry'. Did you mean 'category'? "),
    ],
)
def test_a_value_outside_its_range_or_choices_is_refused(key, value, message):
    with pytest.raises(UserError) as error:
        check_settings(replace(Example(), **{key: value}))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("values", [{"steps": None}, {"epochs": {"x": 1}}, {"names": []}, {"level": "none"}])
def test_a_value_that_its_field_allows_is_accepted(values):
    check_settings(replace(Example(), **values))


def test_a_new_row_in_a_registry_is_a_choice(monkeypatch):
    with pytest.raises(UserError, match="Unknown level 'mine'"):
        check_settings(Example(level="mine"))
    monkeypatch.setitem(selection.STRATEGIES, "mine", selection.STRATEGIES["all"])
    check_settings(Example(level="mine"))


def test_lists_and_maps_of_two_configs_are_two_objects():
    assert Example().names is not Example().names
    assert DataConfig().tasks is not DataConfig().tasks


def every_field():
    for schema in (*SCHEMAS.values(), ProbeConfig, BenchmarkConfig):
        yield from leaves(schema)


def test_every_field_has_help_that_ends_in_a_sentence():
    assert [key for key, spec, _ in every_field() if not spec.metadata["setting"].help.endswith((".", "…"))] == []


@pytest.mark.parametrize("cls", [TrainConfig, DpoConfig, ContinualConfig, GenerationConfig, SelectionConfig])
def test_every_default_is_in_its_own_range(cls):
    check_settings(cls())


def test_every_number_has_a_range():
    numbers = {key for key, spec, _ in every_field() if str(spec.type).split(" ")[0] in ("int", "float")}
    assert {key for key, spec, _ in every_field() if key in numbers and spec.metadata["setting"].range is None} == set()


def test_every_registry_that_a_choice_names_exists():
    for key, spec, _ in every_field():
        assert all(isinstance(name, str) for name in spec.metadata["setting"].names), key


def test_a_field_may_have_no_default():
    spec = next(spec for spec in fields(ProbeConfig) if spec.name == "facts")
    assert spec.default is MISSING
