"""What the parts of a phase's training share.

A session is one start of a phase's worker: a phase that is stopped and resumed has several.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from transformers import TrainerCallback

from hft_cli.checkpoint.naming import Param
from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training.resume import Checkpoint, Identity


@dataclass(frozen=True)
class TrainerParts:
    """What a trainer is built from."""

    model: Any
    arguments: Any
    dataset: Any
    tokenizer: Any
    callbacks: Sequence[Any]


@dataclass(frozen=True)
class Losses:
    """The sum of the losses of `steps` optimizer steps."""

    total: float = 0.0
    steps: int = 0


@dataclass
class Projections:
    """Counts of GEM."""

    memory_rows: tuple[int, ...] = ()  # of each past task
    steps: int = 0  # optimizer steps of this session
    projected: int = 0  # steps of the phase whose gradient was in conflict with a memory, and was replaced


@dataclass
class SessionState:
    """What the callbacks of a session tell each other, the checkpoints and the outcome.

    `resumed` and `marker` carry the first six fields from session to session.
    """

    seconds_before: float = 0.0  # training time of earlier sessions
    losses_before: Losses = Losses()  # up to the checkpoint that the session resumes from
    losses: Losses = Losses()  # of all sessions, up to the last log
    engines: list[dict[str, Any]] = field(default_factory=list)  # that the phase was trained on, with their first steps
    validations: list[tuple[int, float]] = field(default_factory=list)  # steps and their validation losses
    projections: Projections | None = None  # where GEM acts
    frozen: list[int] = field(default_factory=list)  # checksum of the frozen weights of each rank
    first_step: int = 0  # optimizer steps of earlier sessions
    tokens: int = 0  # without padding, that this session has trained on
    marked_best: int | None = None  # the step of the lowest validation loss at the newest checkpoint
    paused: float = 0.0  # seconds of validation since `start`
    start: float = 0.0  # time.perf_counter() before the first step of this session
    end: float = 0.0  # and after its last one; 0 until then
    metrics: dict[str, float] = field(default_factory=dict)  # of the procedure, logged last
    checkpoint: dict[str, float] = field(default_factory=dict)  # seconds and bytes of the last one
    stopped: bool = False  # whether the session ends before the phase does

    @classmethod
    def resumed(cls, marker: Mapping[str, Any]) -> SessionState:
        """The state that continues from a checkpoint's marker. An empty marker starts the phase."""
        losses = Losses(*marker.get("losses", ()))
        validations = [(step, loss) for step, loss in marker.get("validations", ())]
        state = cls(float(marker.get("seconds", 0.0)), losses, losses, list(marker.get("engines", ())), validations)
        state.marked_best = state.best_step() if validations else None
        return state

    def marker(self, identity: Identity) -> dict[str, Any]:
        """What a checkpoint keeps of this state."""
        return {
            **asdict(identity),
            "seconds": self.seconds(),
            "frozen_sums": self.frozen,
            "losses": astuple(self.losses),
            "engines": self.engines,
            **({"validations": self.validations} if self.validations else {}),
            **({"projected": self.projections.projected} if self.projections else {}),
        }

    def best_step(self) -> int:
        """The step of the lowest validation loss, the first one if there are several."""
        return min(self.validations, key=lambda validation: validation[1])[0]

    def since_best(self) -> int:
        """The number of validations after that of the lowest loss."""
        return sum(step > self.best_step() for step, _ in self.validations)

    def seconds(self) -> float:
        """Training time of all sessions."""
        return self.seconds_before + self._session_seconds()

    def tokens_per_second(self) -> float:
        """Tokens per second of this session."""
        return self.tokens / max(self._session_seconds(), 1e-9)

    def mean_loss(self, session_mean: float, last_step: int) -> float:
        """The mean loss of all steps of the phase, from that of this session's steps."""
        before, steps = self.losses_before, last_step - self.first_step
        return round((before.total + session_mean * steps) / max(before.steps + steps, 1), 6)

    def _session_seconds(self) -> float:
        return (self.end or time.perf_counter()) - self.start - self.paused


@dataclass(frozen=True)
class Session:
    """A phase as one rank trains it in one session."""

    job: PhaseJob
    folder: RoundDir
    ranks: Ranks
    params: Mapping[str, Param]  # the model's parameters by name
    counts: Mapping[str, Any]  # of the phase's data: rows and tokens, for the outcome
    identity: Identity  # what the session's checkpoints belong to
    checkpoint: Checkpoint | None  # that it resumes from
    state: SessionState


def diverged(what: str, config: RunConfig) -> UserError:
    """The mistake of a learning rate that is too high; `what` is what shows it."""
    return UserError(
        f"{what}: training has diverged. Lower train.learning_rate={config.train.learning_rate:g}, or raise "
        "train.warmup."
    )


class SessionCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that works on a session and its state.

    Attributes:
        trainer: TRL's, which is set before it trains.
    """

    trainer: Any = None

    def __init__(self, session: Session) -> None:
        self.session, self.state = session, session.state
