"""Send a run's metrics to TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

The parent process reads what the workers write into the run's directory (lines of metrics.jsonl, scores, results) and
sends it on one axis: optimizer steps over all phases. tracking.json records what was sent, so that a resumed run
continues there. A tracker's package is imported only when it is used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hft_cli.config.schema import TrackingConfig
from hft_cli.errors import UserError, choose, first_line
from hft_cli.files import flatten, read_json, write_json
from hft_cli.run_dir import RunDir
from hft_cli.runner.compat import trackio_last_step

State = dict[str, Any]  # `step`: last step sent; `sent`: scores and results sent; `id`: the run's id at its tracker

RESULTS = ("OP", "BWT", "verified")


@dataclass(frozen=True)
class Target:
    """The run to open at a tracker. `state` is None for a new run; `settings` become its hyperparameters."""

    project: str
    name: str
    folder: Path
    settings: Mapping[str, Any]
    state: State | None


@dataclass(frozen=True)
class Connection:
    """An open run at a tracker. `log` takes values and their step, `close` whether the session ended without an error.

    `delay` is the number of seconds until the tracker has stored what it was sent. After a kill, the values of the
    last `delay` seconds are sent again.
    """

    log: Callable[[dict[str, Any], int], None]
    close: Callable[[bool], None]
    state: State
    delay: float = 0.0


class Tracker:
    """Sends what is new in a run's directory to its tracker; without a connection it sends nothing."""

    def __init__(self, connection: Connection | None = None, file: Path = Path(), key: str = "") -> None:
        """`key` names the tracked run in `file`, the run's tracking.json."""
        self._connection, self._file, self._key = connection, file, key
        self.state = self._saved = _new_state() if connection is None else connection.state
        self._unsaved: tuple[float, State] | None = None  # a state to save, and since when it waits
        self._log: tuple[str, int] = "", 0  # phase and inode of the log that is being read
        self._offset = 0  # bytes of it that were read

    def send_metrics(self, log: Path, phase: str, steps_before: int) -> None:
        """Send the new lines of a phase in metrics.jsonl (`log`); `steps_before` counts the steps of earlier phases.

        A resumed phase repeats the steps after its checkpoint. These are not sent again.
        """
        if self._connection is None:
            return
        for line in self._new_lines(log, phase):
            step = steps_before + line["step"]
            if step > self.state["step"]:
                self._send({f"train/{key}": value for key, value in line.items() if key not in ("name", "step")}, step)
        self.save()

    def send_scores(self, when: str, scores: dict[str, Any], step: int) -> None:
        """Send scores (suite -> task -> metric -> value) made at `step`, once for each `when`."""
        values = flatten(scores, "eval/", "/")
        self._send_once(when, {name: value for name, value in values.items() if isinstance(value, int | float)}, step)

    def send_results(self, results: Mapping[str, Any], step: int) -> None:
        """Send a run's overall performance, backward transfer, and whether its files verify."""
        values = {"verified": results["verification"]["passed"], **results["continual"]}
        present = {f"result/{key}": float(values[key]) for key in RESULTS if values.get(key) is not None}
        self._send_once("results", present, step)

    def save(self, now: bool = False) -> None:
        """Record in tracking.json what was sent: `now`, or after the tracker's delay."""
        if now or (self._unsaved is None and self.state != self._saved):
            self._unsaved = time.monotonic(), self.state
        if self._connection is None or self._unsaved is None:
            return
        since, state = self._unsaved
        if now or time.monotonic() - since >= self._connection.delay:
            self._saved, self._unsaved = state, None
            write_json(self._file, {**_read_states(self._file), self._key: state})

    def _send_once(self, what: str, values: dict[str, Any], step: int) -> None:
        if self._connection is not None and values and what not in self.state["sent"]:
            self._send(values, step)
            self.state = {**self.state, "sent": [*self.state["sent"], what]}
            self.save()

    def _send(self, values: dict[str, Any], step: int) -> None:
        assert self._connection is not None
        self._connection.log(values, step)
        self.state = {**self.state, "step": max(self.state["step"], step)}

    def _new_lines(self, log: Path, phase: str) -> Iterator[dict[str, Any]]:
        """The complete lines of a phase that were not read before. A worker that starts replaces the log's file."""
        if not log.exists():
            return
        with log.open("rb") as file:
            current = phase, os.fstat(file.fileno()).st_ino
            if current != self._log:
                self._log, self._offset = current, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # the worker is writing this line
                    return
                self._offset += len(line)
                values = json.loads(line)
                if values["name"] == phase:
                    yield values


def require_tracker(tracking: TrackingConfig) -> None:
    """Check that the tracker's package is installed.

    Raises:
        UserError: if it is not, with the command that installs it, or if there is no such tracker.
    """
    name = choose("tracking", tracking.name, TRACKERS)
    if TRACKERS[name] is None:
        return
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # no origin: a folder of that name, as W&B leaves in a run's directory
        raise UserError(f"tracking={name} needs {name}, which is not installed: pip install 'hft-cli[{name}]'")


@contextmanager
def track(tracking: TrackingConfig, folder: Path, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open the run in `folder` at its tracker, new or continued, and close it at the end.

    A new tracker, project or run name starts a new tracked run, which is sent the whole history. Raises UserError if
    the tracker refuses the connection.
    """
    connect = TRACKERS[tracking.name]
    if connect is None:
        yield Tracker()
        return
    file = RunDir(folder).tracking
    name = tracking.run_name or folder.resolve().name
    key = f"{tracking.name}:{tracking.project}/{name}"
    # Not every tracker takes lists or null.
    plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in settings.items()}
    with redirect_stdout(sys.stderr):  # trackio prints where it logs to; our stdout is for results
        connection = connect(Target(tracking.project, name, folder, plain, _read_states(file).get(key)))
    tracker = Tracker(connection, file, key)
    tracker.save(now=True)
    completed = False
    try:
        yield tracker
        completed = True
    finally:
        with redirect_stdout(sys.stderr):
            connection.close(completed)
        tracker.save(now=True)


def log_scores(
    tracking: TrackingConfig, folder: Path, when: str, scores: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Send scores from outside a training run: to the tracked run of `folder` at its last step, or to a new one."""
    require_tracker(tracking)
    with track(tracking, folder, settings) as tracker:
        tracker.send_scores(when, scores, max(tracker.state["step"], 0))


def _tensorboard(target: Target) -> Connection:
    from accelerate.tracking import TensorBoardTracker

    # Values that were written but not recorded as sent before a kill: TensorBoard drops them, and they are sent again.
    purge = None if target.state is None else target.state["step"] + 1
    tracker = TensorBoardTracker(target.name, target.folder / "tensorboard", purge_step=purge)
    _start(tracker)
    if target.state is None:
        tracker.store_init_configuration(target.settings)
    return Connection(
        log=lambda values, step: tracker.log(values, step=step),
        close=lambda completed: tracker.finish(),
        state=target.state or _new_state(),
    )


def _wandb(target: Target) -> Connection:
    import wandb
    from accelerate.tracking import WandBTracker

    resumed = {} if target.state is None else {"id": target.state["id"], "resume": "allow"}
    tracker = WandBTracker(target.project, name=target.name, dir=str(target.folder), **resumed)
    try:
        _start(tracker)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(
            f"tracking=wandb did not start: {first_line(error)} (WANDB_MODE=offline needs no account.)"
        ) from None
    run = tracker.tracker
    run.define_metric("*", step_metric="step")
    tracker.store_init_configuration(target.settings)
    if target.state is None:
        state = _new_state(run.id)
    else:  # unless offline, the server knows which steps arrived before a kill
        state = {**target.state, "step": max(target.state["step"], run.summary.get("step", -1))}
    return Connection(
        # A resumed run sends scores of earlier steps, which W&B's own steps do not allow.
        log=lambda values, step: tracker.log({**values, "step": step}),
        close=lambda completed: tracker.finish() if completed else run.finish(exit_code=1),
        state=state,
        delay=2.0,
    )


def _trackio(target: Target) -> Connection:
    import trackio
    from accelerate.tracking import TrackioTracker

    # trackio stores nothing of a run before its first values, so such a run starts anew.
    state = target.state if target.state is not None and target.state["step"] >= 0 else None
    resume = "never" if state is None else "allow"
    tracker = TrackioTracker(target.project, name=target.name, config=target.settings, resume=resume)
    try:
        _start(tracker)
    except ValueError as error:
        raise UserError(f"tracking=trackio did not start: {first_line(error)}") from None
    run = tracker.tracker
    if state is not None and run.id != state["id"]:
        run.finish()
        raise UserError(
            f"tracking=trackio: the newest run called {target.name} in project {target.project} is not that of "
            f"{target.folder}. Choose another name for this run (tracking.run_name=…), or set tracking=none."
        )
    return Connection(
        log=lambda values, step: tracker.log(values, step=step),
        # Not tracker.finish(): trackio would finish the run again at exit and print to stdout.
        close=lambda completed: trackio.finish(),
        state=_new_state(run.id) if state is None else {**state, "step": trackio_last_step(run)},
        delay=2.0,
    )


def _start(tracker: Any) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's loggers need it; GPUs are for the workers
    tracker.start()


def _new_state(run_id: str | None = None) -> State:
    return {"id": run_id, "step": -1, "sent": []}


def _read_states(file: Path) -> dict[str, State]:
    return read_json(file) if file.exists() else {}


# To add a tracker: a function, a row here, a file in conf/tracking, and an extra in pyproject.toml.
TRACKERS: dict[str, Callable[[Target], Connection] | None] = {
    "none": None,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
