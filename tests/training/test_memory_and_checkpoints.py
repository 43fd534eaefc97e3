"""What a phase holds in memory and writes into checkpoints, and that neither changes what is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE, phase_job, save_model
from model_types import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hft_cli.launch.jobs import Progress
from hft_cli.run_dir import RoundDir
from hft_cli.training import phase
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


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_checkpoint_resumes_merged_experts_too(model_type, tmp_path):
    torch.manual_seed(0)
    model = save_model(AutoModelForCausalLM.from_config(tiny_config(model_type, vocabulary=512)), tmp_path / "model")
    whole = train(tmp_path / "whole", model, "train.save_every=2", "train.save_limit=9")
    resumed = RoundDir(Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed")))
    assert (resumed.checkpoints / "checkpoint-2" / MARKER).exists()
    for file in (resumed.delta, resumed.outcome):
        file.unlink()
    train(tmp_path / "resumed", model, "train.save_every=2", "train.save_limit=9")
    assert resumed.delta.read_bytes() == whole.delta.read_bytes()
