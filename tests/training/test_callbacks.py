"""training/callbacks.py: what each callback does, and in which order."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import composed
from transformers import TrainerControl, TrainerState

from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.method.rounds import phases
from hft_cli.run_dir import RoundDir
from hft_cli.training import callbacks
from hft_cli.training.procedures import PROCEDURES
from hft_cli.training.resume import Checkpoint, Identity
from hft_cli.training.session import Losses, Session, SessionState
from hft_cli.training.validation import Validation

ARGUMENTS = SimpleNamespace(per_device_train_batch_size=4)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    config = composed("+method=hft", f"output_dir={tmp_path}", "train.save_minutes=1")
    job = PhaseJob(config, phases(config)[0], "model", str(tmp_path / "metrics.jsonl"), (), ())
    identity = Identity("draw", "data", 1, None, None)
    return Session(job, RoundDir(tmp_path), Ranks(), {}, {}, identity, None, SessionState(start=1.0))


def at(step: int, last: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last, num_input_tokens_seen=100 * step)


def lines(session: Session) -> list[dict]:
    return [json.loads(line) for line in Path(session.job.metrics).read_text().splitlines()]


def test_callbacks_come_in_the_order_that_they_need(session, tmp_path):
    procedure, progress = PROCEDURES["sft"], Progress(tmp_path / "progress.json")
    validation = Validation(session, procedure.objective, [], procedure.write_delta, progress)
    made = callbacks.phase_callbacks(session, procedure, progress, Dataset.from_list([]), validation)
    order = [type(callback).__name__ for callback in made]
    assert order[0] == "RestoreMasters"
    for before, after in (
        ("Meter", "FrozenProof"), ("FrozenProof", "LossProof"), ("Meter", "Metrics"), ("Meter", "ProgressReport"),
        ("Stop", "Checkpoints"),
        ("RestoreMasters", "Validation"), ("Validation", "Metrics"), ("Validation", "Stop"),
    ):  # fmt: skip
        assert order.index(before) < order.index(after)


def test_the_clock_starts_after_the_proof_and_stops_before_it(session):
    meter, state = callbacks.Meter(session), session.state
    meter.trainer = SimpleNamespace(
        args=SimpleNamespace(device="cpu"), accelerator=SimpleNamespace(gather=lambda one: torch.cat([one, one]))
    )
    state.start = 0.0
    meter.on_train_begin(ARGUMENTS, at(3), None)
    assert (state.start, state.first_step) == (0.0, 3)
    meter.on_epoch_begin(ARGUMENTS, at(3), None)
    start = state.start
    meter.on_epoch_begin(ARGUMENTS, at(5), None)
    for mask in ([1, 1, 0], [1, 0, 0]):
        meter.trainer._track_num_input_tokens({"input_ids": torch.zeros(3), "attention_mask": torch.tensor(mask)})
    meter.trainer._track_num_input_tokens({"input_ids": torch.zeros(2, 5)})  # packed without a mask
    meter.on_log(ARGUMENTS, at(5), None)
    assert state.tokens == 26  # of two ranks
    meter.on_train_end(ARGUMENTS, at(5), None)
    assert 0 < start == state.start <= state.end


def model() -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    made[0].requires_grad_(False)
    return made


def test_a_frozen_weight_that_changes_stops_the_run(session):
    proof, trained = callbacks.FrozenProof(session), model()
    proof.on_train_begin(ARGUMENTS, at(0), None, model=trained)
    with torch.no_grad():
        trained[1].weight += 1
        proof.on_train_end(ARGUMENTS, at(1), None, model=trained)
        trained[0].bias[1] += 1e-7
        with pytest.raises(RuntimeError, match="A frozen weight changed in memory"):
            proof.on_train_end(ARGUMENTS, at(1), None, model=trained)


def test_a_checkpoint_with_other_frozen_weights_stops_the_run(session):
    trained = model()
    callbacks.FrozenProof(session).on_train_begin(ARGUMENTS, at(0), None, model=trained)
    resumed = replace(session, checkpoint=Checkpoint(Path("checkpoint-1"), {"frozen_sums": session.state.frozen}))
    callbacks.FrozenProof(resumed).on_train_begin(ARGUMENTS, at(1), None, model=trained)
    trained[0].bias.data[1] += 1e-7
    with pytest.raises(RuntimeError, match="The checkpoint restored other frozen weights"):
        callbacks.FrozenProof(resumed).on_train_begin(ARGUMENTS, at(1), None, model=trained)


def test_a_log_is_a_line_and_adds_to_the_losses(session):
    metrics = callbacks.Metrics(session, ("rewards/chosen",))
    metrics.on_train_begin(ARGUMENTS, at(0), None)
    metrics.on_log(ARGUMENTS, at(4), None, logs={"loss": 2.0, "grad_norm": 1.5, "rewards/chosen": 0.5, "entropy": 9})
    metrics.on_log(ARGUMENTS, at(6), None, logs={"loss": 1.0})
    metrics.on_log(ARGUMENTS, at(6), None, logs={"train_loss": 3.0})
    assert session.state.losses == Losses(10.0, 6)
    first, second = lines(session)
    assert {key: first[key] for key in ("step", "loss", "grad_norm", "rewards/chosen")} == {
        "step": 4, "loss": 2.0, "grad_norm": 1.5, "rewards/chosen": 0.5,
    }  # fmt: skip
    assert "entropy" not in first
    assert second["step"] == 6


def test_a_loss_that_is_not_finite_stops_the_run(session):
    metrics = callbacks.Metrics(session, ())
    metrics.on_train_begin(ARGUMENTS, at(0), None)
    with pytest.raises(UserError, match=r"The loss is nan at step 3: .* Lower train\.learning_rate="):
        metrics.on_log(ARGUMENTS, at(3), None, logs={"loss": math.nan})
    assert not Path(session.job.metrics).exists()


def test_lines_after_the_checkpoint_are_dropped(session):
    name = session.job.phase.name
    kept = [{"name": "before", "step": 9}, {"name": name, "step": 1}, {"name": name, "step": 2}]
    text = "".join(json.dumps(line) + "\n" for line in [*kept, {"name": name, "step": 3}])
    Path(session.job.metrics).write_text(text + '{"name": "cut o')
    callbacks.Metrics(session, ()).on_train_begin(ARGUMENTS, at(2), None)
    assert lines(session) == kept


def test_the_validation_before_the_first_step_has_a_line(session):
    name = session.job.phase.name
    old = {"name": name, "step": 0, "validation_loss": 3.0}  # of a session that was killed before a checkpoint
    Path(session.job.metrics).write_text(json.dumps(old) + "\n")
    session.state.validations.append((0, 2.0))
    callbacks.Metrics(session, ()).on_train_begin(ARGUMENTS, at(0), None)
    assert lines(session) == [{"round": 1, "name": name, "step": 0, "validation_loss": 2.0}]


def test_an_engine_is_recorded_once_with_its_first_step(session):
    history = callbacks.EngineHistory(session)
    for step in (0, 3):
        history.on_train_begin(ARGUMENTS, at(step), None)
    other = SimpleNamespace(per_device_train_batch_size=2)
    history.on_train_begin(other, at(5), None)
    assert [(engine["from_step"], engine["micro_batch_size"]) for engine in session.state.engines] == [(0, 4), (5, 2)]


@pytest.mark.parametrize("step", [5, 10])
def test_a_requested_stop_saves_unless_the_phase_ends(step, session):
    session.folder.stop.touch()
    control = TrainerControl()
    callbacks.Stop(session).on_step_end(ARGUMENTS, at(step), control)
    expected = step < 10
    assert (control.should_save, control.should_training_stop, session.state.stopped) == (expected,) * 3


@pytest.mark.parametrize("step", [5, 10])
def test_the_step_that_ends_a_phase_has_no_checkpoint(step, session):
    session.folder.stop.touch()
    control = TrainerControl(should_save=True, should_training_stop=True)
    saver = callbacks.Checkpoints(session)
    saver.on_train_begin(ARGUMENTS, at(0), control)
    for callback in (callbacks.Stop(session), saver):
        callback.on_step_end(ARGUMENTS, at(step), control)
    assert (control.should_save, session.state.stopped) == (False, False)


@pytest.mark.parametrize(("asked", "minutes", "saves"), [(False, 0.5, False), (False, 1.5, True), (True, 0.5, True)])
def test_a_checkpoint_is_logged_first_and_comes_by_time(asked, minutes, saves, session):
    saver, control = callbacks.Checkpoints(session), TrainerControl(should_save=asked)
    saver.on_train_begin(ARGUMENTS, at(0), control)
    saver.last_save -= 60 * minutes
    saver.on_step_end(ARGUMENTS, at(5), control)
    assert (control.should_save, control.should_log) == (saves, saves)


def test_a_checkpoint_is_marked_with_what_it_cost(session, tmp_path):
    saver = callbacks.Checkpoints(session)
    saver.on_step_end(ARGUMENTS, at(10), TrainerControl())
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234")
    saver.on_save(SimpleNamespace(output_dir=tmp_path), at(10), None)
    marker = json.loads((folder / "hft.json").read_text())
    assert (marker["draw"], list(marker["files"])) == ("draw", ["weights"])
    assert session.state.checkpoint["checkpoint_bytes"] == 4
    assert session.state.checkpoint["checkpoint_seconds"] >= 0
