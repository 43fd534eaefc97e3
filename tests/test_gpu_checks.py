"""The short form of scripts/gpu_checks.py: its commands are accepted, and it says what failed and what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import composed, load_script

from hft_cli.config.validate import check

gpu_checks = load_script("gpu_checks")


@pytest.mark.parametrize("name", gpu_checks.WAYS)
def test_each_way_to_train_is_a_valid_configuration(name):
    engine, arguments = gpu_checks.WAYS[name]
    method = () if any(each.startswith("method=") for each in arguments) else ("method=hft",)
    check(composed(*gpu_checks.SMALL, *method, f"engine={engine}", *arguments))


def write_losses(folder: Path, *values: float) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"loss": value}) + "\n" for value in values))


def test_losses_that_differ_too_much_fail_a_check(tmp_path):
    write_losses(tmp_path / "run", 1.0, 2.0)
    write_losses(tmp_path / "single", 1.0, 2.1)
    outcome = gpu_checks.run("losses", None, lambda work: gpu_checks._same_losses(work, 0.05), tmp_path)
    assert outcome.found == "losses differ by at most 4.76%"
    write_losses(tmp_path / "run", 1.0, 2.0)
    write_losses(tmp_path / "single", 1.0, 2.1)
    outcome = gpu_checks.run("losses", None, lambda work: gpu_checks._same_losses(work, 0.04), tmp_path)
    assert outcome.fault == "losses differ by up to 4.8%"


def test_a_command_that_fails_is_a_failed_check(tmp_path):
    outcome = gpu_checks.run("bad", None, lambda work: str(gpu_checks.train(work, "engine=none_such")), tmp_path / "w")
    assert "none_such" in outcome.fault


def test_a_check_without_its_package_is_skipped(tmp_path):
    outcome = gpu_checks.run("x", "no_such_package", lambda work: pytest.fail("ran"), tmp_path / "work")
    assert outcome.skipped == "no_such_package is not installed"
