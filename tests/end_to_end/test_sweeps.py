"""Sweeps: a run for each job, in a folder named by what is swept."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers import BASE, QUICK, Ended, changed, hft, ranks, results, start, train, wait_for_step, weights
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tuple[Ended, dict[str, Path]]:
    """A sweep with jobs that fail: how it ended, and its finished runs by the names of their folders."""
    folder = tmp_path_factory.mktemp("sweep")
    ended = hft("train", "-m", *QUICK, f"output_dir={folder}", "train.max_length=3,64", "+method=hft,fft")
    return ended, {path.parent.name: path.parent for path in folder.glob("*/DONE")}


@pytest.mark.xdist_group("sweep")
def test_a_failed_job_does_not_stop_the_others(sweep):
    ended, runs = sweep
    assert ended.err.count("hft: failed: ") == 2
    assert "train.max_length=3" in ended.err.split("hft: failed: ")[1]
    assert ended.status == 2
    assert {name: results(run)["method"] for name, run in runs.items()} == {
        f"method={method},train.max_length=64": method for method in ("hft", "fft")
    }


@pytest.mark.xdist_group("sweep")
def test_hft_at_ratio_one_ends_with_the_bits_of_fft(sweep, tmp_path):
    full = sweep[1]["method=fft,train.max_length=64"]
    half = train(tmp_path / "run", "+method=hft", "selection.ratio=1")
    assert weights(half) == weights(full)
    assert changed(BASE, full / "model") == set(load_file(BASE / "model.safetensors"))


def test_an_extended_parallel_sweep_does_only_what_is_missing(tmp_path):
    sweep = ("train", *QUICK, "+method=hft", f"output_dir={tmp_path}", "-m", "hydra/launcher=joblib")
    ended = hft(*sweep, "train.max_length=3,64", "hydra.launcher.n_jobs=2")
    assert ended.status == 2
    assert ended.err.count("hft: failed: ") == 1
    first = tmp_path / "train.max_length=64"
    written = (first / "results.json").stat().st_mtime_ns
    ended = hft(*sweep, "train.max_length=64,60", "hydra.launcher.n_jobs=2")
    assert ended.status == 0, ended.err
    assert (tmp_path / "train.max_length=60/DONE").exists()
    assert (first / "results.json").stat().st_mtime_ns == written


def test_a_signal_stops_a_parallel_sweep_with_checkpoints(tmp_path):
    sweep = ("-m", "+method=hft", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "train.max_steps=100")
    process = start(tmp_path, *sweep, "selection.seed=1,2,3")
    running = [tmp_path / f"selection.seed={seed}" for seed in (1, 2)]
    for run in running:
        wait_for_step(run / "rounds/01-order/progress.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert ranks(tmp_path) == []
    for run in running:
        assert list(run.glob("rounds/01-order/checkpoints/checkpoint-*/hft.json")), run.name
    assert not (tmp_path / "selection.seed=3").exists()
