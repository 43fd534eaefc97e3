"""Runs at a tracker: TensorBoard's event files, read back by its own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import CACHE, QUICK, hft
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hft_cli.config.schema import TrackingConfig, read_config
from hft_cli.errors import UserError
from hft_cli.files import write_text
from hft_cli.run_dir import RunDir
from hft_cli.runner.tracking import log_scores, require_tracker, track
from hft_cli.runner.training import run

BOARD = TrackingConfig(name="tensorboard")


def board(out: Path, name: str | None = None) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the run in `out`: tag -> (step, value)."""
    events = EventAccumulator(str(out / "tensorboard" / (name or out.name)), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log(out: Path, name: str, steps: range) -> None:
    """Add lines to metrics.jsonl as a worker does."""
    with RunDir(out).metrics.open("a") as file:
        for step in steps:
            file.write(json.dumps({"round": 1, "name": name, "step": step, "loss": 1.0 + step}) + "\n")


# -------------------------------------------------------------------------------------------------------- real runs


def unfinished(whole: Path, to: Path, *files: str) -> Path:
    """A copy of a run that lacks its end, and `files`."""
    copy = Path(shutil.copytree(whole, to))
    for name in ("DONE", "results.json", *files):
        (copy / name).unlink()
    return copy


def go_on(out: Path, config: TrackingConfig, monkeypatch) -> RunDir:
    """Resume the run in `out`, as the same command with another `tracking` does."""
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE)
    return run(replace(read_config(RunDir(out)), output_dir=str(out), tracking=config), [])


def test_a_run_resumed_in_its_second_round_has_each_step_once(two_rounds, tmp_path, monkeypatch):
    out = unfinished(two_rounds, tmp_path / "run", "rounds/02-backwards/outcome.json")
    shutil.rmtree(out / "model")
    metrics = out / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:6]))
    with track(BOARD, out, {}) as tracked:  # the session that was stopped
        tracked.send_metrics(metrics, "order", 0)
        tracked.send_metrics(metrics, "backwards", 4)
        assert tracked.state["step"] == 6
    go_on(out, BOARD, monkeypatch)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) == 8
    shown = board(out)
    for key in ("loss", "learning_rate", "grad_norm"):
        expected = [(4 * (line["round"] - 1) + line["step"], pytest.approx(line[key])) for line in lines]
        assert shown[f"train/{key}"] == expected
    assert [step for step, _ in shown["train/tokens_per_second"]] == list(range(1, 9))
    assert shown["result/verified"] == [(8, 1.0)]


def test_a_tracker_that_is_added_later_is_sent_the_whole_history(hft_run, tmp_path, monkeypatch):
    out = unfinished(hft_run, tmp_path / "run")
    go_on(out, TrackingConfig("tensorboard", run_name="later"), monkeypatch)
    shown, scores = board(out, "later"), json.loads((out / "results.json").read_text())["eval"]
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    for suite, tasks in scores["after"].items():
        for task, metrics in tasks.items():
            for metric, after in metrics.items():
                steps, values = zip(*shown[f"eval/{suite}/{task}/{metric}"], strict=True)
                assert steps == (0, 4)
                assert values == pytest.approx((scores["before"][suite][task][metric], after))
    (settings,) = out.glob("tensorboard/later/*/hparams.yml")
    assert "train.max_steps: 4\n" in settings.read_text()


def test_without_tracking_nothing_is_sent_and_no_torch_is_loaded(hft_run, tmp_path):
    assert not (hft_run / "tensorboard").exists()
    assert not (hft_run / "tracking.json").exists()
    with track(TrackingConfig(), tmp_path, {}) as tracked:
        tracked.send_scores("before", {"s": {"t": {"m": 1.0}}}, 0)
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    assert list(tmp_path.iterdir()) == []
    loaded = "import sys, hft_cli.runner.training; print({'torch', 'accelerate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "set()\n"


# -------------------------------------------------------------------------------------------------- what is sent when


def test_lines_are_sent_while_they_are_written_but_only_complete(tmp_path):
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)  # not begun
        log(tmp_path, "a", range(1, 3))
        text = json.dumps({"round": 1, "name": "a", "step": 3, "loss": 9.0})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(text[:20])
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
        assert tracked.state["step"] == 2
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(text[20:] + "\n")
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    assert board(tmp_path)["train/loss"] == [(1, 2.0), (2, 3.0), (3, 9.0)]


def test_steps_done_again_from_a_checkpoint_are_not_sent_again(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    log(tmp_path, "a", range(1, 36))
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(metrics, "a", 0)
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(metrics, "a", 0)  # before the worker has begun
        write_text(metrics, "".join(metrics.read_text().splitlines(keepends=True)[:20]))  # it has, at its checkpoint
        for more in (range(21, 31), range(31, 41)):
            log(tmp_path, "a", more)
            tracked.send_metrics(metrics, "a", 0)
    assert [step for step, _ in board(tmp_path)["train/loss"]] == list(range(1, 41))


def test_what_was_sent_but_not_written_down_is_shown_once(tmp_path):
    log(tmp_path, "a", range(1, 6))
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    kept = (tmp_path / "tracking.json").read_text()
    log(tmp_path, "a", range(6, 9))
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    (tmp_path / "tracking.json").write_text(kept)  # as if killed between the two
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    assert [step for step, _ in board(tmp_path)["train/loss"]] == list(range(1, 9))


def test_scores_and_results_are_sent_once_at_their_steps(tmp_path):
    first, second = ({"suite": {"task": {"exact_match": value}}} for value in (0.9, 0.4))
    for _ in range(2):
        with track(BOARD, tmp_path, {"train.max_steps": None, "method.stages": ["sft"], "seed": 1}) as tracked:
            tracked.send_scores("before", first, 0)
            tracked.send_scores("round-01", second, 25)
            tracked.send_results(
                {"verification": {"passed": None}, "continual": {"name": "seqft", "OP": 0.5, "BWT": None}}, 25
            )
    steps, values = zip(*board(tmp_path)["eval/suite/task/exact_match"], strict=True)
    assert (steps, values) == ((0, 25), pytest.approx((0.9, 0.4)))
    assert board(tmp_path)["result/OP"] == [(25, 0.5)]
    assert not {"result/BWT", "result/verified"} & set(board(tmp_path))


def test_scores_from_outside_join_the_run_at_its_last_step(tmp_path):
    log(tmp_path, "a", range(1, 4))
    with track(BOARD, tmp_path, {}) as tracked:
        tracked.send_metrics(tmp_path / "metrics.jsonl", "a", 0)
    log_scores(BOARD, tmp_path, "knowledge", {"knowledge": {"nq": {"exact_match": 0.25}}}, {})
    assert board(tmp_path)["eval/knowledge/nq/exact_match"] == [(3, 0.25)]


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_refused_before_anything_is_written(hft_run, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = replace(read_config(RunDir(hft_run)), output_dir=f"{tmp_path}/run", tracking=TrackingConfig(name))
    with pytest.raises(UserError) as refused:
        run(config, [])
    assert str(refused.value) == f"tracking={name} needs {name}, which is not installed: pip install 'hft-cli[{name}]'"
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_package_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        require_tracker(TrackingConfig(name="wandb"))


def test_an_unknown_tracker_is_refused_and_nothing_is_written(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", "tracking=tensorbord", f"output_dir={tmp_path}/run")
    assert ended.status == 2
    assert "Did you mean 'tensorboard'?" in ended.err
    assert not (tmp_path / "run").exists()
