"""Stopped and killed runs: the same command continues them and ends with the same bits, or refuses with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from helpers import (
    BASE,
    DECAYED,
    QUICK,
    SCORED,
    TWO_RANKS,
    TWO_ROUNDS,
    changed,
    hft,
    kill,
    largest_difference,
    ledger,
    metrics,
    on_one_worker,
    ranks,
    results,
    start,
    train,
    wait_for,
    wait_for_step,
    wait_until_gone,
    weights,
)

from hft_cli.config.schema import RunConfig, read_config
from hft_cli.errors import UserError
from hft_cli.launch.lifetime import hold_lock
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RunDir
from hft_cli.runner.training import run

ROUND, ROUND_1 = "rounds/01-rows", "rounds/01-order"
together = pytest.mark.xdist_group("killed")  # on one worker: they share a killed run


class Killed(NamedTuple):
    """A run of 100 steps that was killed after a checkpoint, and copies of the base and the rows that it uses."""

    run: RunDir
    base: Path
    rows: Path
    arguments: tuple[str, ...]

    def config(self) -> RunConfig:
        return replace(read_config(self.run), output_dir=str(self.run.folder))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    base, rows, out = folder / "base", folder / "rows.jsonl", folder / "runs/today/run"
    shutil.copytree(BASE, base)
    shutil.copy(resolve_path("pocket:skills/order/train.jsonl"), rows)
    arguments = (
        "+method=hft", "train.max_steps=100", "train.save_every=20", "model=local", f"model.path={base}",
        f"data.path={rows}",
    )  # fmt: skip
    process = start(out, *arguments)
    wait_for(out / ROUND / "checkpoints/checkpoint-20/hft.json", process)
    kill(process, out)
    assert not (out / "DONE").exists()
    return Killed(RunDir(out), base, rows, arguments)


@pytest.fixture(scope="module")
def uninterrupted(killed, tmp_path_factory) -> Path:
    """The same run, from its start to its end at once."""
    return train(tmp_path_factory.mktemp("whole") / "run", *killed.arguments)


# ------------------------------------------------------------------------------------------------------------ same bits


@together
def test_killed_and_found_by_resume_it_ends_with_the_same_bits(killed, uninterrupted, tmp_path):
    runs = shutil.copytree(killed.run.folder.parents[1], tmp_path / "runs")
    out = runs / "today/run"
    newest = max((out / ROUND / "checkpoints").glob("checkpoint-*/hft.json"), key=lambda path: path.stat().st_mtime)
    state = torch.load(newest.parent / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(ledger(out)[0]["updated"])  # no optimizer state of frozen matrices

    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"round": 1, "st')  # as a kill may leave it
    (runs / "other/project").mkdir(parents=True)  # not a run of ours
    (runs / "other/project/plan.json").write_text("[1, 2]")
    (runs / "other/project/config.yaml").write_text("a: 1")
    ended = hft("train", *QUICK, *killed.arguments, "resume=true", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert "Continuing the run in runs/today/run" in ended.err
    assert weights(out) == weights(uninterrupted)
    assert [line["step"] for line in metrics(out)] == list(range(1, 101))


@together
def test_stopped_at_random_it_ends_with_the_same_bits(killed, uninterrupted, tmp_path):
    out, random = tmp_path / "run", Random(5)
    settings = (*killed.arguments, "train.save_every=null", "train.log_every=10")
    for number in range(3):
        progress = out / ROUND / "progress.json"
        progress.unlink(missing_ok=True)
        process = start(out, *settings)
        wait_for_step(progress, process)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1]))
        assert process.wait() in (128 + signal.SIGTERM, 128 + signal.SIGUSR1), f"stop {number}"
        wait_until_gone(out)
    train(out, *settings)
    assert weights(out) == weights(uninterrupted)
    steps = [line["step"] for line in metrics(out)]
    assert steps == sorted(set(steps))
    assert {1, *range(10, 101, 10)} <= set(steps)
    (loss,), (expected,) = ([entry["loss"] for entry in results(folder)["rounds"]] for folder in (out, uninterrupted))
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_signal_ends_all_ranks_and_the_status_names_it(tmp_path):
    process = start(tmp_path / "run", "+method=hft", "train.max_steps=100", "engine=zero2", *TWO_RANKS)
    wait_for_step(tmp_path / "run/rounds/01-order/progress.json", process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    wait_until_gone(tmp_path / "run")
    # It has a checkpoint, though none was asked for.
    (marker,) = (tmp_path / "run/rounds/01-order/checkpoints").glob("checkpoint-*/hft.json")
    assert 0 < int(marker.parent.name.split("-")[1]) < 100
    assert not (tmp_path / "run/rounds/01-order/outcome.json").exists()


def test_a_signal_to_the_worker_alone_keeps_its_checkpoint(tmp_path):
    out, arguments = tmp_path / "run", ("+method=hft", "train.max_steps=100")
    process = start(out, *arguments)
    wait_for_step(out / ROUND_1 / "progress.json", process)
    (worker,) = [pid for pid in ranks(out) if b"launch.work" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    (marker,) = (out / ROUND_1 / "checkpoints").glob("checkpoint-*/hft.json")
    first = int(marker.parent.name.split("-")[1])
    train(out, *arguments)
    assert weights(out) == weights(train(tmp_path / "whole", *arguments))
    assert 0 < first < 100


def test_a_model_whose_generation_config_is_bad_has_checkpoints(tmp_path):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6}))
    out, arguments = tmp_path / "run", ("+method=hft", "train.max_steps=100", "model=local", f"model.path={base}")
    process = start(out, *arguments)
    wait_for_step(out / ROUND_1 / "progress.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert list((out / ROUND_1 / "checkpoints").glob("checkpoint-*/hft.json"))


# -------------------------------------------------------------------------------------------------------- other engines


@pytest.mark.parametrize("engine", [on_one_worker("zero1"), on_one_worker("zero2"), on_one_worker("zero3")])
def test_resumed_on_the_same_engine_it_ends_with_the_same_bits(begun, tmp_path, engine):
    whole, part = begun(engine)
    out = train(Path(shutil.copytree(part, tmp_path / "run")), *DECAYED, f"engine={engine}", *TWO_RANKS)
    assert weights(out) == weights(whole)


@pytest.mark.parametrize(
    ("engine", "to"),
    [on_one_worker("zero1", "zero3"), on_one_worker("zero3", "zero2"), on_one_worker("zero3_offload", "zero3")],
)
def test_resumed_on_other_ranks_or_stages_it_ends_nearly_alike(begun, tmp_path, engine, to):
    """To the last bits of float32, where each step changes weights by about 1e-3; frozen weights keep their bits."""
    whole, part = begun(engine)
    out = train(Path(shutil.copytree(part, tmp_path / "run")), *DECAYED, f"engine={to}")
    assert largest_difference(out, whole) < 1e-6
    assert changed(BASE, out / "model") == set(ledger(out)[0]["updated"])
    found = results(out)
    assert found["verification"]["passed"]
    engines = [(each["from_step"], each["name"], each["ranks"]) for each in found["rounds"][0]["engines"]]
    assert engines == [(0, engine, 2), (2, to, 1)]
    assert found["engine"] == f"{engine}, {to}"


def test_another_round_may_have_another_engine(two_rounds, tmp_path):
    out = Path(shutil.copytree(two_rounds, tmp_path / "run"))
    for folder in (out / "model", out / "rounds/02-backwards"):
        shutil.rmtree(folder)
    for name in ("DONE", "results.json"):
        (out / name).unlink()
    train(out, *TWO_ROUNDS, "engine=zero1", "train.micro_batch_size=8")
    assert largest_difference(out, two_rounds) < 1e-6
    found = results(out)
    assert [entry["engines"][0]["name"] for entry in found["rounds"]] == ["single", "zero1"]
    assert [entry["frozen_bit_identical"] for entry in found["rounds"]] == [True, True]


# -------------------------------------------------------------------------------------------------------------- refused


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@together
def test_another_selection_is_refused(killed, of_a_command):
    config = killed.config()
    with pytest.raises(UserError, match=r"another configuration \(selection\.seed was None, is 7\)"):
        run(replace(config, selection=replace(config.selection, seed=7)), [])


@together
def test_a_checkpoint_of_another_draw_is_refused(killed, of_a_command, tmp_path):
    out = Path(shutil.copytree(killed.run.folder, tmp_path / "run"))
    for marker in (out / ROUND / "checkpoints").glob("checkpoint-*/hft.json"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"draw": "of another seed"}))
    with pytest.raises(UserError, match=r"was made with another draw \(of another seed, now"):
        run(replace(killed.config(), output_dir=str(out)), [])


@together
@pytest.mark.parametrize("what", ["rows", "base"])
def test_changed_rows_and_a_changed_base_are_refused(killed, of_a_command, what):
    file = killed.rows if what == "rows" else killed.base / "model.safetensors"
    content = file.read_bytes()
    try:
        if what == "rows":
            file.write_bytes(content.partition(b"\n")[2])
        else:
            flip_a_bit(file)
        with pytest.raises(UserError, match=r"changed since .* was begun\. Restore"):
            run(killed.config(), [])
    finally:
        file.write_bytes(content)


@together
def test_a_run_that_another_process_works_on_is_refused(killed, of_a_command):
    with hold_lock(killed.run.lock), pytest.raises(UserError, match="Another process works on"):
        run(killed.config(), [])


def test_a_finished_run_is_left_alone(hft_run):
    before = weights(hft_run)
    ended = hft("train", *QUICK, f"output_dir={hft_run}", *SCORED)
    assert ended.status == 0
    assert "finished already" in ended.err
    assert weights(hft_run) == before
    config = read_config(RunDir(hft_run))
    with pytest.raises(UserError, match="holds a run of another configuration"):
        run(replace(config, output_dir=str(hft_run), method=replace(config.method, name="fft"),
                    selection=replace(config.selection, level="all")), [])  # fmt: skip
