"""training/resume.py and training/universal.py: which checkpoint a phase resumes from, and whether it is converted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hft_cli.errors import UserError
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training import resume
from hft_cli.training.resume import Identity, complete, newest_checkpoint, record_signals, remove_older, stop_requested
from hft_cli.training.universal import needs_conversion

SINGLE = Identity("draw", "data", 1, None, None)
ZERO3 = Identity("draw", "data", 2, 3, {"stage": 3})


def checkpoint(folder: Path, step: int, identity: Identity | None = SINGLE) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if identity:
        (path / "hft.json").write_text(json.dumps(asdict(identity)))
    return path


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    checkpoint(tmp_path, 8)
    expected = checkpoint(tmp_path, 10)
    incomplete = checkpoint(tmp_path, 12, None)
    found = newest_checkpoint(tmp_path, SINGLE, Ranks())
    assert (found.folder, found.marker, found.converted) == (expected, asdict(SINGLE), False)
    assert not incomplete.exists()


def whole(folder: Path, step: int) -> Path:
    path = checkpoint(folder, step, None)
    (path / "global_step2").mkdir()
    (path / "optimizer.pt").write_bytes(b"moments")
    (path / "global_step2/shard.pt").write_bytes(b"shard")
    assert complete(path, asdict(SINGLE)) == 12
    return path


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
        (lambda path: (path / "optimizer.pt").write_bytes(b"momentS"), r"optimizer\.pt has changed"),
        (lambda path: (path / "global_step2/shard.pt").write_bytes(b""), r"shard\.pt has another size"),
        (lambda path: (path / "global_step2/x_optim_states.pt").write_bytes(b"x"), r"x_optim_states\.pt was not in it"),
    ],
)
def test_a_damaged_checkpoint_is_refused(harm, said, tmp_path):
    whole(tmp_path, 2)
    path = whole(tmp_path, 4)
    assert newest_checkpoint(tmp_path, SINGLE, Ranks()).folder == path
    harm(path)
    with pytest.raises(UserError, match=rf"checkpoint-4 is damaged: .*{said}.* Delete that folder"):
        newest_checkpoint(tmp_path, SINGLE, Ranks())
    shutil.rmtree(path)
    assert newest_checkpoint(tmp_path, SINGLE, Ranks()).folder.name == "checkpoint-2"


@pytest.mark.parametrize("keep", [1, 2])
def test_older_checkpoints_go_marker_first(keep, tmp_path, monkeypatch):
    for step in (2, 9, 10):
        whole(tmp_path, step)
    begun = checkpoint(tmp_path, 12, None)  # that a rank is writing
    monkeypatch.setattr(resume.shutil, "rmtree", lambda path: None)  # a kill at the removal
    remove_older(tmp_path, keep)
    complete_ones = {path.parent.name for path in tmp_path.glob("*/hft.json")}
    assert complete_ones == {"checkpoint-9", "checkpoint-10"} if keep == 2 else {"checkpoint-10"}
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path, SINGLE, Ranks()).folder.name == "checkpoint-10"
    assert not begun.exists()
    assert not (tmp_path / "checkpoint-2").exists()


def test_without_a_complete_checkpoint_the_phase_starts(tmp_path):
    checkpoint(tmp_path, 12, None)
    assert newest_checkpoint(tmp_path, SINGLE, Ranks()) is None
    assert newest_checkpoint(tmp_path / "nothing", SINGLE, Ranks()) is None


@pytest.mark.parametrize("key", ["draw", "data"])
def test_a_checkpoint_of_another_draw_or_data_is_refused(key, tmp_path):
    checkpoint(tmp_path, 2, replace(SINGLE, **{key: "other"}))
    with pytest.raises(UserError, match=rf"was made with another {key} \(other, now {key}\)"):
        newest_checkpoint(tmp_path, SINGLE, Ranks())


@pytest.mark.parametrize(
    ("change", "needed"),
    [({}, False), ({"ranks": 4}, True), ({"zero_stage": 2}, True), ({"zero_optimization": {"stage": 2}}, True)],
)
def test_another_layout_is_converted(change, needed, tmp_path):
    marker = asdict(ZERO3) | change
    assert needs_conversion(marker, ZERO3) == needed
    checkpoint(tmp_path, 2, replace(ZERO3, **change))
    assert newest_checkpoint(tmp_path, ZERO3, Ranks())


@pytest.mark.parametrize(
    ("before", "now", "fix"),
    [(SINGLE, ZERO3, "engine=single"), (ZERO3, SINGLE, "engine=zero3 or another ZeRO stage")],
)
def test_between_one_process_and_deepspeed_nothing_is_converted(before, now, fix):
    with pytest.raises(UserError, match=f"DeepSpeed converts only between its own .* Finish the round with {fix};"):
        needs_conversion(asdict(before), now)


def test_a_signal_asks_any_rank_and_a_file_the_first_one(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SIGNALS", [])
    folder, first, second = RoundDir(tmp_path), Ranks(0, 2), Ranks(1, 2)
    assert not stop_requested(folder, first)
    folder.stop.touch()
    assert (stop_requested(folder, first), stop_requested(folder, second)) == (True, False)
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    try:
        record_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert stop_requested(folder, second)
