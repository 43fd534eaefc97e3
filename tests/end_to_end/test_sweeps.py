"""Sweeps: a run for each job, in a folder named by what is swept."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import BASE, QUICK, Ended, changed, hft, results, train, weights
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
