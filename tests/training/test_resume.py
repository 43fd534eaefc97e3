"""training/resume.py and training/universal.py: which checkpoint a phase resumes from, and whether it is converted."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hft_cli.errors import UserError
from hft_cli.launch.ranks import Ranks
from hft_cli.run_dir import RoundDir
from hft_cli.training import resume
from hft_cli.training.resume import Identity, newest_checkpoint, record_signals, stop_requested
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
