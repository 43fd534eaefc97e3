"""Refuse a setting that was typed and that nothing in the run reads: its author expects an effect.

Only what was typed counts. Files of conf/ set the same keys for all methods, and a sweep over methods gives them to all
of its jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hft_cli.config.schema import RunConfig
from hft_cli.config.settings import leaves
from hft_cli.errors import UserError


@dataclass(frozen=True)
class Reader:
    """What reads a setting.

    Attributes:
        key: the setting, or the start of several.
        needed: what a run must have.
        reads: whether a run has it, from its config and the keys that were typed.
    """

    key: str
    needed: str
    reads: Callable[[RunConfig, frozenset[str]], bool]


def _has_value_for_sft(name: str) -> Reader:
    """A value of `train` that DPO rounds have of their own."""

    def reads(config: RunConfig, typed: frozenset[str]) -> bool:
        own = getattr(config.dpo, name)
        return set(config.method.stages) != {"dpo"} or own is None or f"dpo.{name}" in typed

    return Reader(f"train.{name}", f"an SFT round (for DPO set dpo.{name})", reads)


def _warms_up(group: str) -> Reader:
    """A share of the steps, which a constant learning rate does not read."""

    def reads(config: RunConfig, typed: frozenset[str]) -> bool:
        return config.train.schedule != "constant" or not getattr(config, group).warmup

    return Reader(f"{group}.warmup", "train.schedule=linear, cosine or constant_with_warmup", reads)


def _counts_epochs(group: str) -> Reader:
    """A number of epochs, which a number of steps overrides."""

    def reads(config: RunConfig, typed: frozenset[str]) -> bool:
        return getattr(config, group).max_steps is None or f"{group}.max_steps" in typed

    return Reader(f"{group}.epochs", f"{group}.max_steps=null", reads)


READERS = (
    Reader("dpo.", "a DPO round (method=hft_dpo or dpo)", lambda config, _: "dpo" in config.method.stages),
    Reader("lora.", "method=lora", lambda config, _: config.method.name == "lora"),
    Reader("selection.importance_", "selection=importance", lambda config, _: config.selection.level == "importance"),
    Reader(
        "continual.replay_share", "continual=mixed_replay", lambda config, _: config.continual.name == "mixed_replay"
    ),
    *(
        Reader(f"continual.replay_{name}", "continual=replay", lambda config, _: config.continual.name == "replay")
        for name in ("ratio", "epochs", "shuffle")
    ),
    Reader("continual.gem_", "continual=gem", lambda config, _: config.continual.name == "gem"),
    *map(_has_value_for_sft, ("learning_rate", "epochs", "max_steps", "warmup")),
    _warms_up("train"),
    _warms_up("dpo"),
    _counts_epochs("train"),
    _counts_epochs("dpo"),
)


def refuse_unread(config: RunConfig, overrides: Iterable[str]) -> None:
    """Check the overrides of a new run that is not a job of a sweep.

    Raises:
        UserError: for a key with another value than its default, which the run does not read.
    """
    typed = frozenset(override.lstrip("+~").partition("=")[0] for override in overrides)
    values = {key: value for key, _, value in leaves(config)}
    defaults = {key: value for key, _, value in leaves(type(config))}
    for key in sorted(typed & values.keys()):
        if values[key] == defaults[key]:
            continue
        for reader in READERS:
            if key.startswith(reader.key) and not reader.reads(config, typed):
                raise UserError(
                    f"{key}={values[key]} has no effect without {reader.needed}. Use that, or leave {key} out."
                )
