"""Uses of private or undocumented parts of other packages, each with the version tried and the reason."""

from __future__ import annotations

from typing import Any


def trackio_last_step(run: Any) -> int:
    """The last step that a continued trackio run has stored; -1 if it has stored none.

    UPSTREAM: trackio 0.43.0: `Run._next_step` is the only place that says so. trackio stores values twice a second, so
    a killed process cannot know which of them were stored. Can go when trackio has a public name for it.
    """
    return int(run._next_step) - 1
