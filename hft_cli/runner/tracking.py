"""A run at TensorBoard, Weights & Biases or trackio, by accelerate's trackers. Nothing is imported while that is off.

The runner feeds it from what the workers leave in the run's directory: lines of metrics.jsonl, scores, results, on one
axis of optimizer steps over all rounds. tracking.json keeps how far that went, so that a continued run goes on there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hft_cli.config.schema import TrackingConfig
from hft_cli.errors import UserError
from hft_cli.files import read_json, write_json
from hft_cli.run_dir import RunDir

State = dict[str, Any]  # `step`: the last one sent; `sent`: which scores and results; `id`: the run's at its tracker

# Seconds until a tracker has stored what it was sent: if it and we are killed before, that is sent again, not lost.
SETTLES = {"tensorboard": 0.0, "wandb": 2.0, "trackio": 2.0}

RESULTS = ("OP", "BWT", "verified")


def require_tracker(tracking: TrackingConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if tracking.name == "none":
        return
    name = tracking.name
    found = find_spec(name)
    if found is None or found.origin is None:  # without an origin: only a folder of that name, such as W&B leaves
        raise UserError(f"tracking={name} needs {name}, which is not installed: pip install 'hft-cli[{name}]'")


class Tracker:
    """A run as its tracker has it; without a tracker nothing is sent."""

    def __init__(self, tracker: Any = None, file: Path = Path(), place: str = "", state: State | None = None) -> None:
        self.tracker = tracker
        self.file, self.place = file, place
        self.state = self.kept = state or _fresh()
        self.waiting: tuple[float, State] | None = None  # since when, to be written down
        self.log: tuple[str, int] = "", 0  # the round and the file (inode) that are read
        self.read = 0  # bytes

    def lines(self, log: Path, name: str, offset: int) -> None:
        """Send what `log` has of the round `name`, whose steps come after `offset`, beyond what was sent.

        Steps that a resumed round does again from its checkpoint are not sent again.
        """
        if self.tracker is None:
            return
        for line in self._new(log, name):
            at = offset + line["step"]
            if at > self.state["step"]:
                values = {f"train/{key}": value for key, value in line.items() if key not in ("name", "step")}
                self._send(values, at)
        self.keep()

    def scores(self, when: str, scores: Mapping[str, Any], step: int) -> None:
        """Send what was scored at `step` (suite -> task -> metric -> value), once for each `when`."""
        self._once(when, dict(_numbers(scores, "eval/")), step)

    def results(self, results: Mapping[str, Any], step: int) -> None:
        """Send what a run ends with: overall performance, backward transfer, whether its files verify."""
        found = {"verified": results["verification"]["passed"], **results["continual"]}
        self._once("results", {f"result/{k}": float(found[k]) for k in RESULTS if found.get(k) is not None}, step)

    def _once(self, what: str, values: dict[str, Any], step: int) -> None:
        if self.tracker is not None and values and what not in self.state["sent"]:
            self._send(values, step)
            self.state = {**self.state, "sent": [*self.state["sent"], what]}
            self.keep()

    def _send(self, values: dict[str, Any], step: int) -> None:
        if self.tracker.name == "wandb":  # its own steps cannot be gone back to, as scores after a resume need
            self.tracker.log({**values, "step": step})
        else:
            self.tracker.log(values, step=step)
        self.state = {**self.state, "step": max(self.state["step"], step)}

    def _new(self, log: Path, name: str) -> Iterator[dict[str, Any]]:
        """A round's whole lines that were not read yet. A worker that begins puts another file in the log's place."""
        if not log.exists():
            return
        with log.open("rb") as file:
            at = name, os.fstat(file.fileno()).st_ino
            if at != self.log:
                self.log, self.read = at, 0
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):  # in the middle of being written
                    return
                self.read += len(line)
                values = json.loads(line)
                if values["name"] == name:
                    yield values

    def keep(self, now: bool = False) -> None:
        """Write down how far sending went: `now`, or once the tracker has had the time to store what it was sent."""
        if now or (self.waiting is None and self.state != self.kept):
            self.waiting = time.monotonic(), self.state
        if self.waiting and (now or time.monotonic() - self.waiting[0] >= SETTLES[self.tracker.name]):
            (_, self.kept), self.waiting = self.waiting, None
            states = read_json(self.file) if self.file.exists() else {}
            write_json(self.file, {**states, self.place: self.kept})


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value


@contextmanager
def track(tracking: TrackingConfig, folder: Path, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """The run in `folder` at its tracker, begun there with its `settings` or continued, and closed in the end.

    Another project or run name, like another tracker, begins anew, and is sent all that there has been.

    Raises:
        UserError: if the tracker does not let us in.
    """
    if tracking.name == "none":
        yield Tracker()
        return
    file = RunDir(folder).tracking
    name = tracking.run_name or folder.resolve().name
    place = f"{tracking.name}:{tracking.project}/{name}"
    state: State | None = (read_json(file) if file.exists() else {}).get(place)
    # Lists and null are not for all of them.
    plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
    with redirect_stdout(sys.stderr):  # trackio says where it logs to; ours is the table of results
        tracker, state = _OPEN[tracking.name](tracking.project, name, folder, plain, state)
    tracked = Tracker(tracker, file, place, state)
    tracked.keep(now=True)
    ended = False
    try:
        yield tracked
        ended = True
    finally:
        with redirect_stdout(sys.stderr):
            _close(tracker, ended)
        tracked.keep(now=True)


def log_scores(
    tracking: TrackingConfig, folder: Path, when: str, scores: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Send scores from outside a training run: to the tracked run of `folder`, at its last step, or to a new one.

    Raises:
        UserError: if the tracker is not installed or does not let us in.
    """
    require_tracker(tracking)
    with track(tracking, folder, settings) as tracked:
        tracked.scores(when, scores, max(tracked.state["step"], 0))


def _tensorboard(
    project: str, name: str, folder: Path, settings: dict[str, Any], state: State | None
) -> tuple[Any, State]:
    from accelerate.tracking import TensorBoardTracker

    # What was written, but not written down as sent when we were killed, is left out by TensorBoard and written again.
    purge = None if state is None else state["step"] + 1
    tracker = TensorBoardTracker(name, folder / "tensorboard", purge_step=purge)
    _start(tracker)
    if state is None:
        tracker.store_init_configuration(settings)
    return tracker, state or _fresh()


def _wandb(project: str, name: str, folder: Path, settings: dict[str, Any], state: State | None) -> tuple[Any, State]:
    import wandb
    from accelerate.tracking import WandBTracker

    own = {} if state is None else {"id": state["id"], "resume": "allow"}
    tracker = WandBTracker(project, name=name, dir=str(folder), **own)
    try:
        _start(tracker)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(
            f"tracking=wandb did not begin: {str(error).splitlines()[0]} (WANDB_MODE=offline needs no account.)"
        ) from None
    tracker.tracker.define_metric("*", step_metric="step")
    tracker.store_init_configuration(settings)
    if state is None:
        return tracker, _fresh(tracker.tracker.id)
    there = tracker.tracker.summary.get("step", -1)  # unless offline, what had come through when we were killed
    return tracker, {**state, "step": max(state["step"], there)}


def _trackio(project: str, name: str, folder: Path, settings: dict[str, Any], state: State | None) -> tuple[Any, State]:
    from accelerate.tracking import TrackioTracker

    continued = state is not None and state["step"] >= 0  # before the first values it keeps nothing to go on with
    tracker = TrackioTracker(project, name=name, config=settings, resume="allow" if continued else "never")
    try:
        _start(tracker)
    except ValueError as error:
        raise UserError(f"tracking=trackio did not begin: {str(error).splitlines()[0]}") from None
    run = tracker.tracker
    if state is None or not continued:
        return tracker, _fresh(run.id)
    if run.id != state["id"]:
        run.finish()
        raise UserError(
            f"tracking=trackio: the newest run called {name} in project {project} is not that of {folder}. "
            "Give it another name there (tracking.run_name=…), or set tracking=none."
        )
    # It stores twice a second, so which step was the last when we were killed only it can tell.
    return tracker, {**state, "step": run._next_step - 1}


def _start(tracker: Any) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # its loggers ask for it; a GPU is the workers'
    tracker.start()


def _close(tracker: Any, ended: bool) -> None:
    if tracker.name == "wandb" and not ended:
        tracker.tracker.finish(exit_code=1)  # a stopped run is not a finished one
    elif tracker.name == "trackio":
        import trackio

        trackio.finish()  # not the run alone: it would be finished again at exit, which prints to our stdout
    else:
        tracker.finish()


def _fresh(own: str | None = None) -> State:
    return {"id": own, "step": -1, "sent": []}


# Adding a tracker is one function, one row here and in schema.TRACKERS, and an extra in pyproject.toml.
_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
