"""A run as the report sees it: a row of measures, and the data that single sections need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.config.settings import WITHOUT_TRAINING

COUNTED = ("verified", "no model written")  # statuses of the runs that means are taken over
Matrix = tuple[tuple[float | None, ...], ...]
# SUITE/TASK -> before, after, and of a Half-Reset base; None where it was not scored
Scores = dict[str, dict[str, float | None]]
Conditions = dict[str, dict[str, dict[str, Any]]]  # SUITE/TASK -> before, after, base -> how it was scored, by name
SettingKey = tuple[tuple[str, str], ...]

COMBINED = ("replay", "mixed_replay", "gem")  # values of `continual` that stand beside a method's name
ANCHORS = {"l2_sp": "L2-SP", "kl": "KL"}


def start_of(method: str) -> str:
    """The model that a run is compared with: that before it, or the base if it puts a tuned model back to its base."""
    return "base" if method in WITHOUT_TRAINING else "before"


@dataclass(frozen=True)
class RunRow:
    """One run in the table of runs. The fields' names are those of runs.csv and runs.json.

    Attributes:
        run: the run's directory.
        status: verified, failed, no model written, unfinished, missing, or results.json is broken.
        draw_seed: the seed of the draws, None if it is the run's seed.
        updated: share of all elements that a round updated, mean over rounds.
        skill: mean change of the score on the test sets of what was trained, better is positive.
        retained: mean over the tasks of the suites of the score after the last round, as a share of that before.
        op, bwt: overall performance and backward transfer of a sequence of tasks, as shares.
        continual: seqft, replay, mixed_replay or gem for a sequence of tasks; mixed_replay always; else empty.
        ratio: the ratio of the selection that was requested.
        anchor: L2-SP, KL, MoFO, WiSE-FT (an interpolation after training), or empty.
        note: what is wrong with the run.
        scores: every score.
    """

    run: str
    status: str
    method: str = ""
    selection: str = ""
    learning_rate: float | None = None
    seed: int | None = None
    draw_seed: int | None = None
    updated: float | None = None
    skill: float | None = None
    retained: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    op: float | None = None
    bwt: float | None = None
    continual: str = ""
    level: str = ""
    ratio: float | None = None
    tokens_per_second: float | None = None
    anchor: str = ""
    note: str = ""
    scores: Scores = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method's name in tables and figures."""
        name = self.method.upper().replace("_", "-")
        name = {"HALF-RESET": "Half-Reset", "INTERPOLATE": "Interpolation", "LORA": "LoRA"}.get(name, name)
        return " + ".join([name, *self.additions])

    @property
    def additions(self) -> list[str]:
        """What is done against forgetting besides the method."""
        continual = self.continual.replace("_", " ") if self.continual in COMBINED else ""
        return [*filter(None, (continual, self.anchor))]


@dataclass(frozen=True)
class TaskScores:
    """The matrix R of a sequence: `scores[i][j]` is the score on task j after round i, None where it was not scored."""

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    scores: Matrix


@dataclass(frozen=True)
class Draw:
    """The parameters that one round updated and froze, by name."""

    round: int
    name: str
    level: str
    updated: frozenset[str]
    frozen: frozenset[str]


@dataclass(frozen=True)
class Run:
    """A run with everything that the report needs of it.

    Attributes:
        metrics: SUITE/TASK -> the task's main metric.
        records: SUITE/TASK -> the files of scores item by item, "before" and "after", where `hft eval` wrote them.
        broken: the names of files that cannot be read: "results", or a suite of `hft eval`. The note says why.
        conditions: what two scores of a task must have in common to be compared.
        setting: the flat configuration without seeds and folders; equal for runs of one setting.
        hardware: GPUs, or the number of CPUs.
        items: number of items of the suites.
        losses: optimizer step, over all rounds -> training loss since the entry before.
        basis: the weights and the tasks that `retained` is about: only runs with the same are compared.
    """

    row: RunRow
    folder: Path
    stages: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)
    records: Mapping[str, dict[str, Path]] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    tasks: TaskScores | None = None
    draws: tuple[Draw, ...] = ()
    setting: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    items: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    basis: tuple[str, ...] = ()

    @property
    def start(self) -> str:
        """The model that the run is compared with: see `start_of`."""
        return start_of(self.row.method)

    @property
    def counted(self) -> bool:
        return self.row.status in COUNTED

    @property
    def draw_seed(self) -> int | None:
        return self.row.seed if self.row.draw_seed is None else self.row.draw_seed

    @property
    def updated_by_round(self) -> tuple[frozenset[str], ...]:
        """Equal for runs that updated the same parameters in the same rounds."""
        return tuple(draw.updated for draw in self.draws)

    def key_without(self, *prefixes: str) -> SettingKey:
        """The setting as a key of a dict, without the entries that begin with one of the prefixes."""
        return tuple(item for item in sorted(self.setting.items()) if not item[0].startswith(prefixes))
