"""On a real SLURM of two nodes, which `make test-slurm` sets up and takes down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import QUICK, command, environment, results, train, trains, weights

if "HFT_TEST_SLURM" not in os.environ:
    pytest.skip("needs a SLURM to itself: `make test-slurm` sets one up", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LONG = (*QUICK, "+method=hft", "train.max_steps=120")  # some ten seconds: time to be stopped in
SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1")
SECONDS = 240


def test_a_sweep_waits_for_every_job_and_says_how_each_ended(tmp_path, settings):
    """One by a mistake, one killed outright, which nothing but squeue tells here, and one put back by a signal."""
    sweep = (*LONG, "train.max_length=3,64,60", f"output_dir={tmp_path}", "-m", *SLURM)
    with subprocess.Popen(command("train", *sweep), env=settings, stderr=subprocess.PIPE, text=True) as process:
        signalled, killed = (tmp_path / f"train.max_length={length}" for length in (64, 60))
        until(lambda: training(signalled) and training(killed))
        (folder,) = tmp_path.glob(".submitit/*_0")
        array = folder.name.partition("_")[0]
        slurm("scancel", "--signal=KILL", "--full", f"{array}_2")
        slurm("scancel", "--signal=USR1", f"{array}_1")
        _, err = process.communicate(timeout=SECONDS)
    first, second = re.findall("hft: failed: .*", err)
    assert "train.max_length=3 " in first
    assert "It ended without a result; SLURM says" not in first
    assert "train.max_length=60 " in second
    assert "It ended without a result; SLURM says" in second
    assert process.returncode == 2  # of the first
    assert "Restarts=1" in shown(f"{array}_1")
    assert "Requeued job" in next(tmp_path.glob(f".submitit/{array}_1/*_log.out")).read_text()
    assert (signalled / "DONE").exists()
    assert not (killed / "DONE").exists()
    assert weights(signalled) == weights(train(tmp_path / "whole", *LONG))


def test_a_sweep_ends_within_a_minute_of_the_death_of_its_job(tmp_path, settings):
    arguments = ("train", *LONG, "seed=1", f"output_dir={tmp_path}", "-m", *SLURM)
    with subprocess.Popen(command(*arguments), env=settings, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: training(tmp_path / "run"))
        (folder,) = tmp_path.glob(".submitit/[0-9]*")
        begun = time.monotonic()
        slurm("scancel", folder.name)
        _, err = process.communicate(timeout=SECONDS)
    assert time.monotonic() - begun < 60
    assert process.returncode == 1
    assert "SLURM says CANCELLED" in err
    checkpoint = next(tmp_path.glob("run/rounds/01-order/checkpoints/checkpoint-*/hft.json"))  # it had time for one
    assert int(checkpoint.parent.name.split("-")[1]) < 120


def test_a_preempted_run_goes_on_and_ends_with_the_same_bits(tmp_path, settings):
    run = tmp_path / "run"
    job = sbatch(settings, tmp_path, "one_node", *LONG, f"output_dir={run}")
    until(lambda: training(run))
    preempt(tmp_path)
    assert ended(job) == ("COMPLETED", "0:0")
    assert "Restarts=1" in shown(job)
    assert "back into the queue" in (tmp_path / f"hft-{job}.out").read_text()
    assert weights(run) == weights(train(tmp_path / "whole", *LONG))


def test_an_array_requeues_only_the_task_whose_time_is_up(tmp_path, settings):
    lines = tmp_path / "jobs.txt"
    lines.write_text(
        f"train.max_steps=4 output_dir='{tmp_path}/a name'\n"
        f"train.max_steps=0 output_dir={tmp_path}/mistake\n"
        f'train.max_steps=120 "output_dir={tmp_path}/signalled"\n'
    )
    job = sbatch(settings, tmp_path, "array", lines, *QUICK, "+method=hft", options=["--array=1-3"])
    # (the last task's own number is the array's)
    until(lambda: training(tmp_path / "signalled"))
    slurm("scancel", "--signal=USR1", f"{job}_3")
    assert [ended(f"{job}_{task}") for task in (1, 2, 3)] == [
        ("COMPLETED", "0:0"),
        ("FAILED", "2:0"),
        ("COMPLETED", "0:0"),
    ]
    assert [re.search(r"Restarts=(\d)", shown(f"{job}_{task}"))[1] for task in (1, 2, 3)] == ["0", "0", "1"]
    assert weights(tmp_path / "signalled") == weights(train(tmp_path / "whole", *LONG))


def test_two_preempted_nodes_end_with_the_bits_of_one_node(tmp_path, settings):
    run = tmp_path / "run"
    two = (*QUICK, "+method=hft", "engine=zero3", "train.micro_batch_size=2", "train.max_steps=20")
    job = sbatch(settings | {"HFT_HEAD": "127.0.0.1"}, tmp_path, "several_nodes", *two, f"output_dir={run}")
    until(lambda: training(run))
    preempt(tmp_path)
    assert ended(job) == ("COMPLETED", "0:0"), (tmp_path / f"hft-{job}.out").read_text()
    assert "NodeList=n[1-2]" in shown(job)
    assert "Restarts=1" in shown(job)
    assert weights(run) == weights(train(tmp_path / "whole", *two, "engine.num_processes=2"))
    assert results(run)["verification"]["passed"]


# ------------------------------------------------------------------------------------------------------------ helpers


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, str]:
    """The environment in which jobs are submitted: there is an `hft` in it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "hft").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hft_cli "$@"\n')
    (folder / "hft").chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    return environment() | {"PATH": path, "PYTHONPATH": str(ROOT)}


def slurm(*arguments: object) -> str:
    return subprocess.run([str(a) for a in arguments], check=True, capture_output=True, text=True, timeout=60).stdout


def sbatch(settings: dict[str, str], cwd: Path, script: str, *arguments: object, options: list[str] = []) -> str:  # noqa: B006
    file = shutil.copy(ROOT / f"scripts/slurm/{script}.sbatch", cwd)
    words = ["sbatch", "--parsable", *options, file, *map(str, arguments)]
    return subprocess.run(words, check=True, capture_output=True, text=True, env=settings, cwd=cwd).stdout.strip()


def preempt(cwd: Path) -> None:
    """Want both nodes for something of more weight, for three seconds."""
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={cwd}/urgent.out", "--wrap=sleep 3")


def shown(job: str) -> str:
    return slurm("scontrol", "show", "job", "--oneliner", job)


def ended(job: str) -> tuple[str, str]:
    """A job's state and exit status, when it goes on no more: two looks apart, for on its way back it looks so too."""

    def over() -> bool:
        state = re.search(r"JobState=(\w+)", shown(job))[1]
        return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    until(lambda: over() and time.sleep(2) is None and over())
    return re.search(r"JobState=(\w+)", shown(job))[1], re.search(r"ExitCode=(\S+)", shown(job))[1]


def training(run: Path) -> bool:
    return trains(run / "rounds/01-order/progress.json")


def until(happened: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < SECONDS, slurm("squeue", "--states=all")
        time.sleep(0.1)
