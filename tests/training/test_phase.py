"""What a phase holds in memory, writes into checkpoints, and in which order it takes rows."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import BASE, phase_job, save_model
from hypothesis import given
from hypothesis import strategies as st
from model_types import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.optimizers import OPTIMIZERS
from hft_cli.config.training import TrainConfig
from hft_cli.errors import UserError
from hft_cli.files import read_json
from hft_cli.launch.jobs import Progress
from hft_cli.method.rounds import Phase, rows_read
from hft_cli.run_dir import RoundDir
from hft_cli.training import phase
from hft_cli.training.batches import ByLength, row_lengths, rows_of_steps
from hft_cli.training.resume import MARKER

QUICK = (
    "data=pocket_order", "data.max_rows=16", "train.max_steps=4", "train.batch_size=4", "train.micro_batch_size=2",
    "train.max_length=64", "train.learning_rate=1e-3",
)  # fmt: skip


def train(folder: Path, model: Path, *more: str) -> RoundDir:
    folder.mkdir(exist_ok=True)
    made = RoundDir(folder)
    phase.train_phase(phase_job(folder, model, *QUICK, *more), made, Progress(made.progress))
    return made


@pytest.fixture(scope="module")
def low_model(tmp_path_factory) -> Path:
    """The embedded model in bfloat16."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("low") / "model"))
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def held(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are trained from here on."""
    models, make = [], phase.model_to_train
    monkeypatch.setattr(phase, "model_to_train", lambda *given: models.append(make(*given)) or models[-1])
    return models


def test_frozen_matrices_take_two_bytes_and_train_alike(low_model, tmp_path, monkeypatch):
    models = held(monkeypatch)
    low = train(tmp_path / "low", low_model, "model.dtype=bfloat16")
    monkeypatch.setattr(phase, "store_frozen_in_bfloat16", lambda *_: None)
    high = train(tmp_path / "high", low_model, "model.dtype=bfloat16")
    assert low.delta.read_bytes() == high.delta.read_bytes()
    assert low.frozen.read_bytes() == high.frozen.read_bytes()
    for name, value in models[0].named_parameters():
        is_low = not value.requires_grad and "proj" in name
        assert value.dtype == (torch.bfloat16 if is_low else torch.float32), name


def test_frozen_matrices_of_float32_files_stay_float32(tmp_path, monkeypatch):
    models = held(monkeypatch)
    train(tmp_path / "run", BASE, "model.dtype=bfloat16")
    assert {value.dtype for value in models[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(("model_type", "more"), [("mixtral", ()), ("llama", ("train.group_by_length=true",))])
def test_a_phase_resumes_with_merged_experts_and_its_order(model_type, more, tmp_path):
    torch.manual_seed(0)
    model = save_model(AutoModelForCausalLM.from_config(tiny_config(model_type, vocabulary=512)), tmp_path / "model")
    settings = ("train.save_every=2", "train.save_limit=9", "train.max_steps=8", "data.max_rows=10", *more)  # 3 epochs
    whole = train(tmp_path / "whole", model, *settings)
    resumed = RoundDir(Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed")))
    shutil.rmtree(resumed.checkpoints / "checkpoint-6")
    assert (resumed.checkpoints / "checkpoint-4" / MARKER).exists()  # within the second epoch
    for file in (resumed.delta, resumed.outcome):
        file.unlink()
    train(tmp_path / "resumed", model, *settings)
    assert resumed.delta.read_bytes() == whole.delta.read_bytes()


NEEDS_PACKAGE = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")

CASES = [pytest.param(name, marks=[NEEDS_PACKAGE] if one.package else []) for name, one in OPTIMIZERS.items()]


def tensor_bytes(value: Any) -> int:
    """The bytes of the tensors in a value of an optimizer's state, but for counts of steps."""
    if isinstance(value, dict):  # of bitsandbytes
        return sum(tensor_bytes(part) for name, part in value.items() if "qmap" not in name)
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) and value.dim() else 0


@pytest.mark.parametrize("optimizer", CASES)
def test_an_optimizer_holds_what_is_planned_and_resumes(optimizer, tmp_path):
    settings = (f"train.optimizer={optimizer}", "train.save_every=2", "train.weight_decay=0.1")
    whole = train(tmp_path / "whole", BASE, *settings)
    checkpoint = torch.load(whole.checkpoints / "checkpoint-2/optimizer.pt")["state"]
    held = sum(map(tensor_bytes, checkpoint.values()))
    updated = set(phase_job(tmp_path / "job", BASE, *QUICK).updated)
    trained = [param for param in parameters_from_folder(BASE) if param.name in updated]
    planned = OPTIMIZERS[optimizer].state_bytes
    assert held == sum(planned(param.shape, param.kind == "embedding") for param in trained)
    resumed = RoundDir(Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed")))
    for file in (resumed.delta, resumed.outcome):
        file.unlink()
    train(tmp_path / "resumed", BASE, *settings)
    assert resumed.delta.read_bytes() == whole.delta.read_bytes()


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 8))
def test_rows_by_length_are_a_permutation_of_each_epoch(lengths, batch):
    sampler = ByLength(lengths, batch, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    assert list(ByLength(lengths, batch, seed=3)) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(len(lengths)))


@given(rows=st.integers(1, 40), length=st.integers(1, 200), batch=st.integers(1, 9), parts=st.integers(1, 6))
def test_the_parts_of_a_training_are_the_whole(rows, length, batch, parts):
    train, first = TrainConfig(epochs=length / rows, batch_size=batch), Phase(1, 1, "p", "sft", ())
    assert rows_read(train, rows) == length
    steps_of = [replace(first, set_part=n, set_parts=parts).steps_of_set(train, rows) for n in range(1, parts + 1)]
    in_parts = [rows_of_steps(rows, length, batch, 5, steps) for steps in steps_of]
    whole = [row for part in in_parts for row in part]
    assert whole == rows_of_steps(rows, length, batch, 5, first.steps_of_set(train, rows))
    assert len(whole) == length
    epochs = [whole[start : start + rows] for start in range(0, length, rows)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs[:-1])
    steps = [math.ceil(len(part) / batch) for part in in_parts]
    assert steps == [len(each) for each in steps_of]
    assert max(steps) - min(steps) <= 1
    full = [len(part) % batch == 0 for part in in_parts if part]
    assert all(full[:-1])


def test_a_part_trains_on_its_rows_once_and_in_order(tmp_path):
    made = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = phase_job(folder, BASE, *QUICK, "train.max_steps=6", "train.save_every=1", "train.save_limit=9")
        run = RoundDir(folder)
        in_parts = replace(job, phase=replace(job.phase, set_part=number, set_parts=2))
        phase.train_phase(in_parts, run, Progress(run.progress))
        made.append(run)
    whole = train(tmp_path / "whole", BASE)
    rows = load_from_disk(str(whole.tokens))["input_ids"]
    order = rows_of_steps(16, 24, 4, 42, range(6))
    for run, expected in zip(made, (order[:12], order[12:]), strict=True):
        assert load_from_disk(str(run.tokens))["input_ids"] == [rows[row] for row in expected]
        assert read_json(run.outcome)["steps"] == 3


def test_more_parts_than_steps_are_refused(tmp_path):
    job = phase_job(tmp_path, BASE, *QUICK, "train.epochs=1", "train.max_steps=null")
    run = RoundDir(tmp_path)
    with pytest.raises(UserError, match=r"=5 is more than the 4 optimizer steps of order\. Set .*=4 or less"):
        phase.train_phase(replace(job, phase=replace(job.phase, set_parts=5)), run, Progress(run.progress))


def test_batches_by_length_have_less_padding():
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (4000,), generator=random).tolist()
    sampler = ByLength(lengths, 16, seed=1)

    def padded(order: list[int]) -> float:
        batches = [[lengths[index] for index in order[start : start + 16]] for start in range(0, len(order), 16)]
        return sum(max(batch) * len(batch) for batch in batches) / sum(lengths)

    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert padded(list(range(4000))) > 1.8
    assert padded(first) < 1.05


def test_the_length_of_a_pair_is_that_of_all_its_tokens():
    rows = {"prompt_ids": [[1, 2], [3]], "chosen_ids": [[4], [5, 6]], "rejected_ids": [[7], []], "other": [1, 2]}
    assert row_lengths(Dataset.from_dict(rows)) == [4, 3]
