"""training/proof.py and FrozenProof: each proof in memory fires when a fault is put into a real training.

Run as a program, this file is one of two ranks: `torchrun … test_proof.py OUT FAULT…`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE, phase_job, torchrun
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hft_cli.errors import UserError
from hft_cli.launch.jobs import PhaseJob, Progress
from hft_cli.launch.ranks import Ranks
from hft_cli.live.compat import local_part, unwrapped
from hft_cli.run_dir import RoundDir
from hft_cli.training import phase
from hft_cli.training.resume import complete


def four_steps(folder: Path, engine: str, model: Path = BASE, *more: str) -> PhaseJob:
    """Four steps of HFT, with a checkpoint after the second."""
    processes = 1 if engine == "single" else 2
    return phase_job(
        folder, model, f"engine={engine}", f"engine.num_processes={processes}", "data=pocket_order",
        "data.max_rows=16", "train.max_steps=4", "train.batch_size=4",
        "train.micro_batch_size=2", "train.max_length=64", "train.save_every=2",
        *more,
    )  # fmt: skip


class Fault(TrainerCallback):
    """Changes one bit of a frozen weight of this rank, before the first step or after the third."""

    def __init__(self, at_start: bool) -> None:
        self.at_start = at_start

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.at_start:
            self.change(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.at_start and state.global_step == 3:
            self.change(model)

    def change(self, model: Any) -> None:
        frozen = (value for value in unwrapped(model).parameters() if not value.requires_grad)
        local_part(next(frozen)).view(-1).view(torch.int32)[0] ^= 1


def with_fault(fault: Fault, make: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`phase_callbacks` with the fault after RestoreMasters, which comes before every proof."""

    def made(*arguments: Any) -> list[Any]:
        first, *others = make(*arguments)
        return [first, fault, *others]

    return made


def train(job: PhaseJob, folder: Path) -> RoundDir:
    made = RoundDir(folder)
    phase.train_phase(job, made, Progress(made.progress, rank=int(os.environ.get("RANK", "0"))))
    return made


@pytest.mark.parametrize(
    ("at_start", "error", "said"),
    [
        (True, UserError, r"q_proj\.weight in memory differs from that in .*model\.safetensors before the first step"),
        (False, RuntimeError, "A frozen weight changed in memory during training"),
    ],
)
def test_a_frozen_weight_that_changes_stops_the_phase(at_start, error, said, tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "phase_callbacks", with_fault(Fault(at_start), phase.phase_callbacks))
    with pytest.raises(error, match=said):
        train(four_steps(tmp_path, "single"), tmp_path)
    assert not RoundDir(tmp_path).outcome.exists()


def test_an_updated_weight_that_loading_changes_is_refused(tmp_path, monkeypatch):
    load = phase.load_model

    def zeroes_a_row(*arguments: Any) -> Any:
        model = load(*arguments)
        model.get_input_embeddings().weight.data[5] = 0
        return model

    monkeypatch.setattr(phase, "load_model", zeroes_a_row)
    with pytest.raises(UserError, match=r"embed_tokens\.weight in memory differs from .* LlamaForCausalLM changes it"):
        train(four_steps(tmp_path, "single"), tmp_path)


def test_weights_that_are_not_finite_are_not_blamed_on_training(tmp_path):
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight in .*model\.safetensors has values that are not finite"):
        train(four_steps(tmp_path, "single", model), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [(), ("method=dpo", "data=pocket_preferences")])
def test_a_loss_that_is_not_the_models_own_is_refused(dtype, stage, tmp_path):
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())  # TRL bounds the logits, and Llama ignores the field
    (model / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 3.0}))
    job = four_steps(tmp_path, "single", model, f"model.dtype={dtype}", *stage)
    with pytest.raises(
        UserError, match=r"another loss for a llama model than the model itself: \d+\.\d+ against \d+\."
    ):
        train(job, tmp_path)
    assert not RoundDir(tmp_path).outcome.exists()


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    job = four_steps(tmp_path, "single")
    made = train(job, tmp_path)
    hashes = json.loads(made.frozen.read_text())["tensors"]
    assert set(hashes) == set(job.frozen)
    checkpoint = made.checkpoints / "checkpoint-2"
    tensors = load_file(checkpoint / "model.safetensors")
    assert set(tensors) == set(job.updated)  # frozen weights are in the model's files

    def rewrite(marker: dict[str, Any]) -> None:
        complete(checkpoint, {key: value for key, value in marker.items() if key != "files"})  # as if written so

    marker = json.loads((checkpoint / "hft.json").read_text())
    rewrite(marker | {"frozen_sums": [marker["frozen_sums"][0] ^ 1]})
    with pytest.raises(RuntimeError, match="The checkpoint restored other frozen weights"):
        train(job, tmp_path)
    save_file({job.updated[0]: tensors[job.updated[0]]}, checkpoint / "model.safetensors", {"format": "pt"})
    rewrite(marker)
    with pytest.raises(RuntimeError, match=r"checkpoint-2 has no weights of "):
        train(job, tmp_path)


@pytest.mark.end_to_end
def test_a_fault_of_one_rank_stops_all(tmp_path):
    torchrun(2, __file__, tmp_path, "zero2 step", "zero2 start", "zero3 step")
    found = {file.stem: file.read_text() for file in tmp_path.glob("*.txt")}
    assert found == {
        "zero2 step": "A frozen weight changed in memory during training: this is a fault of the engine.",
        "zero2 start": "The ranks hold different frozen weights: this is a fault of the engine.",
        "zero3 step": "A frozen weight changed in memory during training: this is a fault of the engine.",
    }


@pytest.mark.end_to_end
def test_a_wrong_shard_of_another_rank_is_refused(tmp_path):
    with pytest.raises(AssertionError):  # the first rank ends, and torchrun ends the others
        torchrun(2, __file__, tmp_path, "zero3 start")
    assert "in memory differs from that in" in (tmp_path / "zero3 start.txt").read_text()


def rank(out: Path, faults: list[str]) -> None:
    """One of two ranks: train once for each fault of the second rank, and write what the first rank says."""
    from hft_cli.launch.compat import exit_rank

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    number = int(os.environ["RANK"])
    Ranks.leave = lambda self: None  # type: ignore[method-assign]  # it would end the process
    make = phase.phase_callbacks
    for name in faults:
        engine, when = name.split()
        if number == 1:
            phase.phase_callbacks = with_fault(Fault(when == "start"), make)
        folder = out / engine / when
        folder.mkdir(parents=True, exist_ok=True)
        try:
            train(four_steps(folder, engine), folder)
        except (UserError, RuntimeError) as error:
            if number == 0:
                (out / f"{name}.txt").write_text(str(error))
            if name == "zero3 start":
                os._exit(1)  # the others wait for this one
    exit_rank()


if __name__ == "__main__":
    rank(Path(sys.argv[1]), sys.argv[2:])
