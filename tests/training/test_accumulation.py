"""Gradients of micro-batches are added in float32 under every stage of ZeRO, whatever the model's dtype is.

All rows are the same, so all micro-batches have the same gradient, and so has their mean: sums in bfloat16 round it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import BASE, phase_job, torchrun

from hft_cli.launch.jobs import write_job

MEASURE = Path(__file__).parents[1] / "plan/measure_ranks.py"


def norm(folder: Path) -> float:
    """The norm of the gradient of the only step."""
    return json.loads((folder / "metrics.jsonl").read_text())["grad_norm"]


def one_step(folder: Path, stage: int, batch_size: int) -> Path:
    """The job of one step of micro-batches of one row."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "The capital of France is", "completion": "Paris"}\n' * 64)
    job = phase_job(
        folder, BASE, f"engine=zero{stage}", f"data.path={rows}", f"train.batch_size={batch_size}",
        "train.micro_batch_size=1", "train.max_steps=1", "train.max_length=64", "model.dtype=bfloat16",
    )  # fmt: skip
    return write_job(job, folder)


@pytest.mark.end_to_end
def test_the_mean_of_equal_gradients_is_that_gradient(tmp_path):
    one = one_step(tmp_path / "one", 2, 1)
    many = [one_step(tmp_path / f"zero{stage}", stage, 64) for stage in (1, 2, 3)]
    torchrun(1, MEASURE, one, *many)
    expected = norm(tmp_path / "one")
    for stage in (1, 2, 3):
        # Float32: 64 additions, each exact to 2^-24. In bfloat16 the sum of 64 equal numbers is off by up to 2^-9.
        assert norm(tmp_path / f"zero{stage}") == pytest.approx(expected, rel=1e-5), stage
