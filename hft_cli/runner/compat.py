"""Uses of private or undocumented parts of other packages, each with the version tried and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse_overrides(overrides: Sequence[str]) -> list[Any]:
    """Hydra's `Override` objects for overrides as the user types them.

    UPSTREAM: hydra-core 1.3.8: the parser of overrides is not documented. It is the only code that knows which values
    are sweeps. Can go when Hydra documents one.

    Raises:
        hydra.errors.OverrideParseException: if one is not in Hydra's grammar.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return list(OverridesParser.create().parse_overrides(list(overrides)))


def split_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in the order in which Hydra runs them.

    UPSTREAM: hydra-core 1.3.8: `BasicSweeper.split_arguments` is private. The report needs the jobs that never started,
    and Hydra records only the overrides of the sweep. Can go when multirun.yaml lists the jobs.

    Raises:
        hydra.errors.HydraException: if an override is not in Hydra's grammar, or sweeps over an interval.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    (jobs,) = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    return [list(job) for job in jobs]


def trackio_last_step(run: Any) -> int:
    """The last step that a continued trackio run has stored; -1 if it has stored none.

    UPSTREAM: trackio 0.43.0: `Run._next_step` is the only place that says so. trackio stores values twice a second, so
    a killed process cannot know which of them were stored. Can go when trackio has a public name for it.
    """
    return int(run._next_step) - 1
