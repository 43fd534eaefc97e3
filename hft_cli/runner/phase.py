"""Run one phase: train it in worker processes, or put tensors back to a base, and write the model after it."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hft_cli.checkpoint.deltas import apply_deltas
from hft_cli.checkpoint.interpolation import write_blends
from hft_cli.errors import Stopped
from hft_cli.files import read_json, write_json, write_text
from hft_cli.launch.jobs import PhaseJob
from hft_cli.launch.rendezvous import Followers
from hft_cli.launch.worker import WorkerRun, run_worker
from hft_cli.method.rounds import Phase, phase_config
from hft_cli.method.selection import Draw
from hft_cli.run_dir import RoundDir, RunDir
from hft_cli.runner.companions import companions
from hft_cli.runner.prepare import Prepared, blended_tensors, stored_model
from hft_cli.runner.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One session of a run: from its start, or from where it was stopped. `followers` are its other nodes."""

    run: RunDir
    prepared: Prepared
    tracker: Tracker
    followers: Followers | None = None


@dataclass(frozen=True)
class Position:
    """Where a run is between two phases: the folder of its model, and the number of optimizer steps so far.

    LoRA trains `adapter`, the folder of the adapters so far, beside the base; `model` has them merged into it.
    """

    model: Path
    steps: int = 0
    adapter: Path | None = None


def run_phase(session: Session, phase: Phase, draw: Draw, start: Position) -> Position:
    """Run a phase, unless it is finished, and write the model after it. Raises what `run_worker` does."""
    run, config = session.run, session.prepared.config
    folder = run.round(phase.number, phase.name)
    if not folder.outcome.exists():
        folder.folder.mkdir(parents=True, exist_ok=True)
        run_stage = _train if phase.trains else _put_back
        run_stage(session, phase, draw, start)
    session.tracker.send_metrics(run.metrics, phase.name, start.steps)
    return Position(
        model=_write_model(session, folder, start) if config.method.save_model else start.model,
        steps=start.steps + read_json(folder.outcome).get("steps", 1),  # without training it counts as one
        adapter=folder.adapter if config.method.name == "lora" else None,
    )


def _train(session: Session, phase: Phase, draw: Draw, start: Position) -> None:
    """Train a phase in worker processes, on all nodes."""
    run, prepared = session.run, session.prepared
    config, folder = prepared.config, run.round(phase.number, phase.name)
    job = PhaseJob(
        config=phase_config(config, phase),
        phase=phase,
        model=str(_trained_model(session, start)),
        metrics=str(run.metrics),
        updated=draw.updated,
        frozen=draw.frozen,
        adapter=str(start.adapter) if start.adapter else None,
        base_sha256=prepared.record["base_sha256"],
        deepspeed=prepared.deepspeed,
    )
    label = f"Round {phase.round}, {phase.name}"
    logger.info(f"{label}: {_size(draw)} updated")
    ranks = None if config.engine.zero_stage is None else config.engine.num_processes
    send_metrics = partial(session.tracker.send_metrics, run.metrics, phase.name, start.steps)
    said = folder.data.exists()

    def poll() -> None:
        nonlocal said
        if not said and folder.data.exists():
            said = True
            logger.info(f"{label}: {read_json(folder.data)['line']}")
        send_metrics()

    run_worker(WorkerRun(job, folder, label, ranks, checkpoints=True), poll, session.followers)
    if not folder.outcome.exists():  # the worker, or one of its ranks, was asked to stop, and this process was not
        logger.info(f"{label}: its worker was stopped by a signal.")
        raise Stopped(signal.SIGTERM)


def _put_back(session: Session, phase: Phase, draw: Draw, start: Position) -> None:
    """Write the delta of a phase without training, unless the model is only scored (method.save_model=false)."""
    config, folder = session.prepared.config, session.run.round(phase.number, phase.name)
    what = "set back" if phase.stage == "half_reset" else "put a part of the way back"
    logger.info(f"{_size(draw)} {what} to {phase.data or 'the model that the run began with'}")
    for earlier in session.prepared.phases[: phase.number - 1]:  # the model keeps the template of the last training
        trained = session.run.round(earlier.number, earlier.name)
        for source, target in ((trained.template, folder.template), (trained.answer_end, folder.answer_end)):
            if source.exists():
                write_text(target, source.read_text(encoding="utf-8"))
    start_time = time.perf_counter()
    if config.method.save_model:
        tensors = blended_tensors(config, draw, stored_model(start.model, config), session.prepared.base)
        write_blends(tensors, folder.delta, {"base_sha256": session.prepared.record["base_sha256"]})
    write_json(folder.outcome, {"train_seconds": round(time.perf_counter() - start_time, 3)})


def _write_model(session: Session, folder: RoundDir, start: Position) -> Path:
    """Write the model after a phase, and remove what the phase needed only while it ran."""
    run = session.run
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    shutil.rmtree(folder.tokens, ignore_errors=True)
    shutil.rmtree(folder.best, ignore_errors=True)
    out = run.model if run.model.exists() else folder.model
    if not out.exists():
        base = _trained_model(session, start)
        apply_deltas(
            base, [folder.delta], out, companions(folder, base, session.prepared.config.model.changes_template)
        )
    if start.model.is_relative_to(run.folder) and start.model != out:
        shutil.rmtree(start.model, ignore_errors=True)  # the model after the previous phase
    return out


def _trained_model(session: Session, start: Position) -> Path:
    """The model whose weights a phase trains: the base if there are adapters beside it, else the last phase's."""
    return session.prepared.base if start.adapter else start.model


def _size(draw: Draw) -> str:
    tensors = f"{len(draw.updated)} of {len(draw.updated) + len(draw.frozen)} tensors"
    return f"{draw.level}, {tensors}, {draw.updated_fraction:.1%} of the elements,"
