"""A phase is sealed with the settings of the session's start."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import BASE, composed
from safetensors.torch import save_file

from hft_cli.launch.jobs import PhaseJob
from hft_cli.launch.worker import WorkerRun
from hft_cli.run_dir import RunDir
from hft_cli.runner import phase
from hft_cli.runner.phase import Position, Session, run_phase
from hft_cli.runner.prepare import prepare
from hft_cli.runner.tracking import Tracker


@pytest.fixture
def jobs(monkeypatch) -> list[PhaseJob]:
    """The jobs of workers that only write an outcome and an empty delta."""
    jobs = []

    def run_worker(worker: WorkerRun, poll: object, followers: object) -> None:
        jobs.append(worker.job)
        save_file({"model.norm.weight": torch.ones(96)}, worker.folder.delta)
        worker.folder.outcome.write_text('{"steps": 4}')

    monkeypatch.setattr(phase, "run_worker", run_worker)
    return jobs


def test_a_deepspeed_json_is_read_once_for_all_rounds(jobs, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"steps_per_print": 7}))
    rows = ",".join(f"pocket:skills/{name}/train.jsonl" for name in ("order", "backwards"))
    config = composed(
        "+method=hft", f"data.path=[{rows}]", "data.test_path=null", "engine=zero1", f"engine.deepspeed={own}",
        f"output_dir={tmp_path}/run",
    )  # fmt: skip
    run = RunDir(tmp_path / "run")
    session = Session(run, prepare(config, BASE, run), Tracker())
    position = Position(BASE)
    for item, draw in zip(session.prepared.phases, session.prepared.draws, strict=True):
        position = run_phase(session, item, draw, position)
        own.write_text(json.dumps({"steps_per_print": 1}))  # changed while the run is under way
    assert [job.deepspeed["steps_per_print"] for job in jobs] == [7, 7]
    assert [job.model for job in jobs] == [str(BASE), str(run.round(1, "order").model)]
    assert position == Position(run.round(2, "backwards").model, steps=8)
    assert not run.round(1, "order").model.exists()  # no later phase needs it
