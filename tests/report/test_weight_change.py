"""The size of the change of each tensor, from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_runs import NAMES, write_run

from hft_cli.checkpoint import tensors
from hft_cli.checkpoint.folders import weights_hash
from hft_cli.errors import UserError
from hft_cli.report.weight_change import tensor_changes
from hft_cli.run_dir import RunDir


def save(path: Path, values: dict[str, np.ndarray], bfloat16: bool = False) -> None:
    """A safetensors file; bfloat16 takes the upper halves of float32."""
    header, data = {}, b""
    for name, array in values.items():
        raw = array.astype("<f4")
        raw = (raw.view("<u4") >> 16).astype("<u2").tobytes() if bfloat16 else raw.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16" if bfloat16 else "F32", "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def run_with_weights(tmp_path: Path, bfloat16: bool = False) -> RunDir:
    """A run of two rounds, of which the second moves one tensor that the first has moved."""
    run, base = write_run(tmp_path / "run", r=[[0.5, None], [0.5, 0.5]]), tmp_path / "base"
    start = {NAMES[0]: np.full((2, 4), 2.0), NAMES[1]: np.full(4, 1.0), "lm_head.weight": np.full(4, 3.0)}
    save(base / "model.safetensors", start, bfloat16)
    (base / "config.json").write_text("{}")
    first = {NAMES[0]: np.full((2, 4), 9.0), NAMES[1]: np.full(4, 1.5)}
    save(run / "rounds/01-task0/delta.safetensors", first, bfloat16)
    save(run / "rounds/02-task1/delta.safetensors", {NAMES[0]: np.full((2, 4), 3.0)}, bfloat16)
    plan = json.loads((run / "plan.json").read_text()) | {"base": str(base), "base_sha256": weights_hash(base)}
    (run / "plan.json").write_text(json.dumps(plan))
    return RunDir(run)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_change_is_from_the_base_to_the_last_delta(tmp_path, bfloat16, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 8)  # several chunks a tensor
    changes = {change.tensor: change for change in tensor_changes(run_with_weights(tmp_path, bfloat16))}
    assert {name: change.relative for name, change in changes.items()} == {
        NAMES[0]: pytest.approx(0.5), NAMES[1]: pytest.approx(0.5), "lm_head.weight": 0,
    }  # fmt: skip
    assert (changes[NAMES[0]].start, changes[NAMES[0]].change) == pytest.approx((32**0.5, 8**0.5))


def test_a_tensor_of_zeros_has_no_relative_change(tmp_path):
    run = run_with_weights(tmp_path)
    save(tmp_path / "base/model.safetensors", {NAMES[0]: np.zeros((2, 4))})
    plan = json.loads(run.plan.read_text()) | {"base_sha256": weights_hash(tmp_path / "base")}
    run.plan.write_text(json.dumps(plan))
    (change,) = tensor_changes(run)
    assert (change.start, change.relative) == (0, None)


def test_another_base_is_refused(tmp_path):
    run = run_with_weights(tmp_path)
    save(tmp_path / "base/model.safetensors", {NAMES[0]: np.zeros((2, 4))})
    with pytest.raises(UserError, match="which holds other weights now"):
        tensor_changes(run)


def test_a_missing_base_or_delta_is_named(tmp_path):
    run = run_with_weights(tmp_path)
    run.round(2, "task1").delta.unlink()
    with pytest.raises(UserError, match=r"rounds/02-task1/delta\.safetensors is missing"):
        tensor_changes(run)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"started from .*/base, which does not exist any more"):
        tensor_changes(run)
