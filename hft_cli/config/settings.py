"""What a config field says about itself: help, unit, range and choices, kept in the metadata of its dataclass field.

The help text, the check of single values and the error messages all read it, so each fact is written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any

from hft_cli.errors import UserError, choose

WITHOUT_TRAINING = ("half_reset", "interpolate")  # methods, and stages of a round, that only compute with files
REQUIRED = "???"  # Hydra's spelling of a value that must be given
# Attentions that keep packed rows apart without a mask: the module that each needs, and the package that has it.
FLASH_ATTENTION = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
BACKENDS = ("transformers", "vllm")  # programs that generate answers
FORCED_METRICS = ("exact_match", "token_accuracy")  # they need no generated answer: one forward pass over the right one
AUTO = "auto"  # a value that depends on the machine, and is replaced before anything else


@dataclass(frozen=True)
class Range:
    """An interval of numbers in mathematical notation: "[0, 1)" contains 0 and not 1, "(0, inf)" starts above 0."""

    text: str

    @property
    def _bounds(self) -> tuple[float, float]:
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self._bounds
        above = value >= low if self.text[0] == "[" else value > low
        below = value <= high if self.text[-1] == "]" else value < high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low, high = self._bounds
        if high != math.inf:
            return f"in {self.text}"
        return f"{'at least' if self.text[0] == '[' else 'above'} {low:g}"


@dataclass(frozen=True)
class Setting:
    """The metadata of a config field.

    Attributes:
        help: one sentence or two for `--help`.
        unit: unit of a number.
        range: the numbers that are allowed, in interval notation; every number must be finite.
        choices: the strings that are allowed. An item "package.module:NAME" stands for the keys of the registry NAME
            in that module. It is imported when help or validation needs it, because this package lies below those that
            hold the registries. Such a module must be importable without torch.
    """

    help: str
    unit: str | None = None
    range: Range | None = None
    choices: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The choices, with registries replaced by their keys."""
        names: list[str] = []
        for choice in self.choices:
            module, _, registry = choice.partition(":")
            names += getattr(import_module(module), registry) if registry else [choice]
        return names

    @property
    def limits(self) -> str:
        """Unit, range and choices in one phrase; empty if there are none."""
        facts = [self.unit, self.range, f"one of {', '.join(self.names)}" if self.choices else None]
        return "; ".join(str(fact) for fact in facts if fact)


def setting(
    default: Any, help: str, *, unit: str | None = None, range: str | None = None, choices: Iterable[str] = ()
) -> Any:
    """A dataclass field with its help, unit, range and choices as metadata (see `Setting`).

    `default` may be a list or a dict, which is copied for each instance, or `dataclasses.MISSING` for none.
    """
    about = Setting(help, unit, None if range is None else Range(range), tuple(choices))
    metadata = {"setting": about}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def leaves(config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, dataclass field, value) of every field of a config, nested dataclasses included.

    `config` is an instance, or a class, whose values are the defaults.
    """
    for spec in fields(config):
        value = getattr(config, spec.name, None)
        if isinstance(config, type) and spec.default_factory is not MISSING:
            value = spec.default_factory()
        if is_dataclass(value):
            yield from leaves(value, f"{where}{spec.name}.")
        else:
            yield where + spec.name, spec, value


def check_settings(config: Any, where: str = "") -> None:
    """Check every value of a config against its field's range and choices.

    The items of a list and the values of a map are checked one by one.

    Args:
        config: a config dataclass.
        where: what stands before its keys in messages, such as "suite.probe.pararel.".

    Raises:
        UserError: with the key, the value and what is allowed.
    """
    for key, spec, value in leaves(config, where):
        about: Setting = spec.metadata["setting"]
        if value is None and "None" in str(spec.type):
            continue
        if str(spec.type).startswith("list") and not isinstance(value, list | tuple):
            raise UserError(f"{key}={value!r} is not a list. Write {key}=[{value!r}].")
        for name, item in _items(key, value, str(spec.type)):
            _check_value(name, item, about)


def _items(key: str, value: Any, type_name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", item) for name, item in value.items())
    elif isinstance(value, list | tuple) and type_name.startswith(("list", "tuple")):
        yield from ((key, item) for item in value)
    else:
        yield key, value


def _check_value(key: str, value: Any, about: Setting) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} is not a finite number.")
    if about.range is not None and not (about.choices and isinstance(value, str)):  # a number, or one of some words
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{key}={'null' if value is None else value} is not a number. It must be {about.range}.")
        if value not in about.range:
            raise UserError(f"{key}={value} must be {about.range}.")
    elif about.range is not None and value not in about.names:
        raise UserError(f"{key}={value} must be {about.range}, or {' or '.join(about.names)}.")
    elif about.choices:
        # OmegaConf turns the YAML words true and false of a text field into True and False.
        text = value.lower() if value in ("True", "False") else value
        choose(key, text, about.names)
