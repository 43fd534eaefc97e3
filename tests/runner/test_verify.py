"""`verify` proves a run from its files, and finds every kind of change in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import BASE, hft, ledger
from safetensors.torch import load_file, save_file

from hft_cli.checkpoint.tensors import read_header
from hft_cli.run_dir import RunDir
from hft_cli.runner.verify import verify

DELTA = "rounds/01-order/delta.safetensors"
MODEL = "model/model.safetensors"


@pytest.fixture
def copied(hft_run, tmp_path) -> Path:
    return Path(shutil.copytree(hft_run, tmp_path / "run"))


def flip(path: Path, name: str) -> None:
    """Change one bit of a tensor in a safetensors file."""
    start = read_header(path)[name].start
    with path.open("r+b") as file:
        file.seek(start)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ 1]))


def faults(run: Path) -> list[str]:
    return [fault for proof in verify(RunDir(run)) for fault in proof.faults]


def test_the_command_passes_a_run_and_says_so(hft_run):
    ended = hft("verify", hft_run)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, "verified: 1 round")


def test_the_command_fails_a_run_with_one_frozen_bit_changed(copied):
    name = ledger(copied)[0]["frozen"][-1]
    flip(copied / MODEL, name)
    ended = hft("verify", copied)
    assert ended.status == 1
    assert name in ended.out
    assert ended.out.endswith("NOT VERIFIED\n")


def test_a_changed_bit_of_an_updated_tensor_is_a_fault(copied):
    name = ledger(copied)[0]["updated"][-1]
    flip(copied / MODEL, name)
    assert faults(copied) == [f"the final model differs from this round's delta in: {name}"]


def test_a_fault_names_the_round_that_froze_the_tensor(two_rounds, tmp_path):
    run = Path(shutil.copytree(two_rounds, tmp_path / "run"))
    first, second = ledger(run)
    name = next(n for n in first["updated"] if n in second["frozen"])
    flip(run / MODEL, name)
    proofs = verify(RunDir(run))
    assert f"frozen tensors differ in the final model: {name}" not in proofs[0].faults
    assert f"frozen tensors differ in the final model: {name}" in proofs[1].faults


def test_a_delta_that_holds_a_frozen_tensor_is_a_fault(copied):
    name = ledger(copied)[0]["frozen"][0]
    save_file(load_file(copied / DELTA) | {name: load_file(BASE / "model.safetensors")[name]}, copied / DELTA)
    assert f"the delta holds tensors that the draw freezes: {name}" in faults(copied)


def test_a_delta_that_lacks_an_updated_tensor_is_a_fault(copied):
    tensors = load_file(copied / DELTA)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, copied / DELTA)
    assert f"the delta lacks tensors that the draw updates: {name}" in faults(copied)


def test_a_delta_of_another_dtype_is_a_fault(copied):
    tensors = load_file(copied / DELTA)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].bfloat16()}, copied / DELTA)
    assert f"the delta has another dtype or shape than the model for: {name}" in faults(copied)


@pytest.mark.parametrize("lie", ["names", "ratio", "no rounds", "not a ledger"])
def test_a_ledger_that_its_seed_does_not_give_is_a_fault(copied, lie):
    content = json.loads((copied / "draws.json").read_text())
    if lie == "names":
        content["rounds"][0]["updated"].append(content["rounds"][0]["frozen"].pop())
    if lie == "ratio":
        content["rounds"][0]["matrices_reached"] = 0.9
    if lie == "no rounds":
        content = {"rounds": []}
    if lie == "not a ledger":
        content = []
    (copied / "draws.json").write_text(json.dumps(content))
    assert faults(copied) == ["draws.json is not what its seed and selection give"]


def test_a_model_that_is_cut_off_is_a_fault(copied):
    with (copied / MODEL).open("r+b") as file:
        file.truncate(10_000)
    assert any("model.safetensors" in fault for fault in faults(copied))


def test_updated_tensors_that_did_not_move_are_listed_and_pass(copied):
    base, tensors = load_file(BASE / "model.safetensors"), load_file(copied / DELTA)
    save_file({name: base[name] for name in tensors}, copied / DELTA)
    save_file(base, copied / MODEL)
    (proof,) = verify(RunDir(copied))
    assert set(proof.unmoved) == set(tensors)
    assert not proof.faults
    ended = hft("verify", copied)
    assert (ended.status, ended.out.splitlines()[-1]) == (0, "verified: 1 round")
    assert "and 16 more" in ended.out


def altered_memory(run: Path, name: str, change: dict | None) -> None:
    """Change or remove the hash of a tensor in memory, as if the training process had written it so."""
    folder = run / "rounds/01-order"
    content = json.loads((folder / "frozen.json").read_text())
    if change is None:
        del content["tensors"][name]
    else:
        content["tensors"][name] |= change
    (folder / "frozen.json").write_text(json.dumps(content))
    outcome = json.loads((folder / "outcome.json").read_text())
    outcome["frozen_sha256"] = hashlib.sha256((folder / "frozen.json").read_bytes()).hexdigest()
    (folder / "outcome.json").write_text(json.dumps(outcome))


def test_all_frozen_tensors_are_compared_with_memory(hft_run):
    (proof,) = verify(RunDir(hft_run))
    assert proof.in_memory == proof.frozen > 0
    assert "(in files, and in memory after the last step)" in hft("verify", hft_run).out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "frozen tensors differed in memory after the last step: "),
        (None, "memory during training has no hash of frozen tensors: "),
    ],
)
def test_a_frozen_tensor_that_memory_does_not_have_is_a_fault(copied, change, said):
    name = ledger(copied)[0]["frozen"][0]
    altered_memory(copied, name, change)
    assert faults(copied) == [said + name]


def test_hashes_that_training_did_not_write_are_a_fault(copied):
    file = copied / "rounds/01-order/frozen.json"
    file.write_text(file.read_text().replace("F32", "F32 ", 1))
    assert faults(copied) == ["frozen.json is not what the training process wrote"]
    file.unlink()
    assert "Cannot read" in faults(copied)[0]


def test_a_run_of_an_earlier_version_is_verified_by_its_files(copied):
    folder = copied / "rounds/01-order"
    (folder / "frozen.json").unlink()
    outcome = json.loads((folder / "outcome.json").read_text())
    del outcome["frozen_sha256"]
    (folder / "outcome.json").write_text(json.dumps(outcome))
    ended = hft("verify", copied)
    assert "frozen ones bit-identical (in files)" in ended.out
    assert ended.status == 0
