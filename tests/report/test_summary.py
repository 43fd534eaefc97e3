"""What `hft train` prints at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import write_items, write_run

from hft_cli.report.summary import summary
from hft_cli.run_dir import RunDir


def change_results(run: Path, round_fields: dict, **fields: object) -> RunDir:
    """Add fields to results.json and to each of its rounds."""
    file = run / "results.json"
    values = json.loads(file.read_text())
    values["rounds"] = [entry | {"steps": 4, "loss": 1.5} | round_fields for entry in values["rounds"]]
    file.write_text(json.dumps(values | fields))
    return RunDir(run)


def test_a_run_is_summed_up_in_tables(tmp_path):
    run = write_run(tmp_path / "run", retained=0.5)
    write_items(run, "pocket/facts", before=[1, 1, 1, 1], after=[1, 0, 1, 0])
    text = summary(change_results(run, {"checkpoint_seconds": 0.1, "checkpoint_bytes": 5 << 20}))
    assert text.splitlines() == [
        "round     updated  steps  mean loss  seconds  tokens/s  peak memory  frozen weights",
        "capitals  59.0%    4      1.500      2.0      1,000     3 MiB        bit-identical",
        "",
        "score          metric       before  after  change in points [95%]  lost                  gained",
        "pocket/facts   exact match  100.0%  50.0%  -50.0 [-85.0, +10.2]    2 of 4 [15.0, 85.0]%  0 of 0",
        "data/capitals  exact match  0.0%    90.0%  +90.0",
        "",
        "capitals: a checkpoint took 0.1 s and 5 MiB.",
    ]


def test_a_sequence_shows_its_matrix_and_the_notes(tmp_path):
    run = write_run(tmp_path / "run", r=[[0.8, None], [0.4, 0.6]])
    (run / "model").mkdir()
    notes = {"rewards/margins": 0.25, "rewards/accuracies": 0.75, "unmoved": ["a.weight"], "rows_truncated": 2}
    text = summary(change_results(run, notes))
    assert "R            task0  task1\nafter task0  80.0%\nafter task1  40.0%  60.0%\nOP 50.0   BWT -40.0" in text
    assert "task1: reward margin 0.250, accuracy 75.0%." in text
    assert "2 updated tensors did not move, such as a.weight; see hft verify." in text
    assert "Rows cut at train.max_length: 4; left out (see results.json): 0." in text
    assert text.endswith(f"Model: {run}/model   everything else: {run}   check: hft verify {run}")


def test_a_half_reset_has_no_training_to_show(tmp_path):
    run = write_run(tmp_path / "run", "half_reset")
    assert summary(change_results(run, {}, stage="half_reset")).splitlines()[0] == "round     updated  seconds"


@pytest.mark.parametrize(
    ("fields", "cell"),
    [({"updated_fraction": 1.0}, "none"), ({"updated_fraction": 1.0, "frozen_bit_identical": False}, "CHANGED")],
)
def test_a_run_that_freezes_nothing_claims_nothing(fields, cell, tmp_path):
    text = summary(change_results(write_run(tmp_path / "run"), fields))
    assert text.splitlines()[1].split()[-1] == cell
