"""What starts runs elsewhere, as far as it shows without a cluster: launchers of sweeps, and the files in scripts/."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_AFTER, QUICK, environment, hft, wait_for_step

from hft_cli.cli import launchers
from hft_cli.cli.launchers import launcher_arguments
from hft_cli.errors import UserError
from hft_cli.launch.nodes import is_free
from hft_cli.launch.slurm import (
    SqueueWatcher,  # here: submitit sets up logging anew, which closes streams that capsys has put aside
)
from hft_cli.paths import group_options

ROOT = Path(__file__).parents[2]
SWEEP = ("train", "-m", *QUICK, "+method=hft")


def test_a_sweep_by_submitit_on_one_machine_tells_its_failures(tmp_path):
    ended = hft(*SWEEP, "train.max_length=3,64", "hydra/launcher=submitit_local", f"output_dir={tmp_path}")
    assert ended.status == 2
    assert ended.err.count("hft: failed: ") == 1
    assert "train.max_length=3 " in ended.err
    assert (tmp_path / "train.max_length=64/DONE").exists()


def test_a_cluster_is_for_sweeps_and_must_be_there():
    one = hft("train", *QUICK, "+method=hft", "hydra/launcher=submitit_slurm")
    assert one.status == 2
    assert one.err.splitlines() == [
        "hft: hydra/launcher=submitit_slurm starts the jobs of a sweep: add -m. For one run there is scripts/slurm."
    ]
    path = {"PATH": os.path.dirname(sys.executable)}
    words = [sys.executable, "-m", "hft_cli", *SWEEP, "seed=1,2", "hydra/launcher=submitit_slurm"]
    none = subprocess.run(words, env=environment() | path, capture_output=True, text=True)
    assert none.returncode == 2
    assert none.stderr == "hft: hydra/launcher=submitit_slurm needs SLURM, and there is no sbatch here.\n"


def test_a_launcher_that_is_not_installed_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(launchers, "version", lambda name: importlib.metadata.version("not-" + name))
    with pytest.raises(UserError, match=re.escape("pip install 'hft-cli[cluster]'")):
        launcher_arguments(["-m", "hydra/launcher=submitit_slurm"])


def test_a_short_time_limit_leaves_most_of_it_to_the_run(monkeypatch):
    """SLURM warns at once of an end that is nearer than the warning, and the job would go round for ever."""
    monkeypatch.setattr(launchers.shutil, "which", lambda name: name)
    launcher = ["-m", "hydra/launcher=submitit_slurm"]
    assert "hydra.launcher.signal_delay_s=300" in launcher_arguments(launcher)
    assert "hydra.launcher.signal_delay_s=60" in launcher_arguments([*launcher, "hydra.launcher.timeout_min=4"])
    typed = [*launcher, "hydra.launcher.signal_delay_s=7"]
    assert [word for word in launcher_arguments(typed) if "signal_delay_s" in word] == typed[2:]


def test_a_job_is_over_when_squeue_has_twice_said_so(tmp_path, monkeypatch, caplog):
    """Once may be on its way back into the queue; a controller that is away says nothing about jobs."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/said && exit 0\necho away >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    watcher = SqueueWatcher()
    watcher.register_job("7_1")

    def over(said: str | None) -> bool:
        (tmp_path / "said").unlink(missing_ok=True)
        if said is not None:
            (tmp_path / "said").write_text(said)
        watcher.update()
        return watcher.is_done("7_1", mode="cache")

    said = ("NODE_FAIL|None", "PENDING|BeginTime", "RUNNING|None", "OUT_OF_MEMORY|OutOfMemory")
    assert not any(over(f"7_0|COMPLETED|None\n7_1|{line}\n") for line in said)
    assert not over(None)
    assert "squeue does not answer: " in caplog.text
    assert over("7_1|OUT_OF_MEMORY|OutOfMemory\n")
    assert watcher.get_state("7_1") == "OUT_OF_MEMORY (OutOfMemory)"
    watcher.register_job("8")
    watcher.update()
    assert not watcher.is_done("8", mode="cache")
    watcher.update()
    assert watcher.is_done("8", mode="cache")  # of which squeue says nothing any more


@pytest.mark.parametrize("script", ["one_node", "several_nodes", "array"])
def test_a_job_that_could_not_find_its_run_again_is_refused(tmp_path, script):
    lines = tmp_path / "jobs.txt"
    lines.write_text("+method=hft seed=1\n")
    first = [str(lines)] if script == "array" else []
    words = ["bash", str(ROOT / f"scripts/slurm/{script}.sbatch"), *first, "+method=hft"]
    ended = subprocess.run(words, env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert re.fullmatch("hft: give .*output_dir=….*\n", ended.stderr)


def test_hosts_start_together_and_stop_with_a_checkpoint(tmp_path):
    """`ssh` is a shell here, and both hosts are this machine."""
    for name, line in {
        "ssh": 'shift; exec bash -c "$*"',
        "hft": f'exec "{sys.executable}" -m hft_cli "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    settings = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    settings["HFT_PORT"] = str(next(port for port in range(29400, 30000, 2) if is_free(port) and is_free(port + 1)))
    two = (*QUICK, "+method=hft", "engine=zero2", "train.micro_batch_size=2", "train.max_steps=60")
    run = tmp_path / "run"
    words = [str(ROOT / "scripts/hosts.sh"), "127.0.0.1", "127.0.0.1", "--", *two, f"output_dir={run}"]
    with subprocess.Popen(words, env=settings, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run / "rounds/01-order/progress.json", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert list(run.glob("rounds/01-order/checkpoints/checkpoint-*/hft.json"))


@pytest.mark.parametrize("where", ["pocket", "node", "slurm"])
def test_every_experiment_of_the_paper_has_its_line(where):
    words = [str(ROOT / "scripts/experiments.sh"), where]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    named = {found[1] for line in lines if (found := re.search(r"experiment=(\w+)", line))}
    ours = {"forgetting", "frontier", "variance", "half_reset_explorer"}
    assert named == set(group_options("experiment/paper")) - ours
    assert all(line.startswith("hft train ") and "output_dir=" in line for line in lines)
    assert all(("submitit_slurm" in line) == (where == "slurm") for line in lines)
