"""HalfFinetuneCallback and next_round, in transformers' Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hft_cli import HalfFinetuneCallback, half_finetune, next_round, verify
from hft_cli.errors import UserError
from hft_cli.files import read_json

ROWS = [{"input_ids": [5, 6, 7, n], "labels": [5, 6, 7, n]} for n in range(8, 24)]


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


def trainer(live: Any, out: Path, *callbacks: Any, **settings: Any) -> Trainer:
    arguments = {"max_steps": 4, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return Trainer(
        live, TrainingArguments(str(out), **arguments | settings), train_dataset=ROWS, callbacks=[*callbacks]
    )


def test_a_training_elsewhere_is_proven_and_one_bit_is_noticed(tmp_path):
    live = model()
    draw = half_finetune(live)
    made = trainer(live, tmp_path, HalfFinetuneCallback(draw), weight_decay=0.1)
    made.train()
    made.save_model(str(tmp_path / "model"))
    for given in (draw, tmp_path / "draws.json", str(tmp_path / "draws.json")):
        proof = verify(BASE, tmp_path / "model", given)
        assert (proof.verified, proof.from_seed, len(proof.frozen)) == (True, True, 18)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    frozen = draw.frozen[3]
    changed.get_parameter(frozen).data.view(torch.int32)[0, 0] ^= 1
    changed.save_pretrained(tmp_path / "changed")
    proof = verify(BASE, tmp_path / "changed", draw)
    assert not proof.verified
    assert proof.faults == (f"frozen parameters moved: {frozen}",)


def test_the_delta_on_the_base_is_the_trained_model(tmp_path):
    live = model()
    draw = half_finetune(live, seed=3)
    trainer(live, tmp_path, HalfFinetuneCallback(draw)).train()
    delta = load_file(tmp_path / "delta-1.safetensors")
    assert sorted(delta) == sorted(draw.updated)
    again = model()
    again.load_state_dict(delta, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), live.parameters(), strict=True))


def test_rounds_go_on_in_one_trainer(tmp_path):
    live = model()
    first = half_finetune(live, seed=3, ratio=0.25)
    made = trainer(live, tmp_path, HalfFinetuneCallback(first))
    made.train()
    before = {name: value.detach().clone() for name, value in live.named_parameters()}
    second = next_round(live, made)
    assert second == half_finetune(model(), seed=3, ratio=0.25, round=2)
    made.train()
    moved = {name for name, value in live.named_parameters() if not torch.equal(value, before[name])}
    assert moved <= set(second.updated)
    assert len(moved) > len(second.updated) // 2
    assert [entry["round"] for entry in read_json(tmp_path / "draws.json")["rounds"]] == [1, 2]
    made.save_model(str(tmp_path / "model"))
    proof = verify(BASE, tmp_path / "model", tmp_path / "draws.json")
    assert proof.verified
    assert proof.updated == {*first.updated, *second.updated}


def test_the_next_round_needs_a_first_and_no_optimizer(tmp_path):
    live = model()
    with pytest.raises(UserError, match="no draw yet"):
        next_round(live)
    half_finetune(live)
    optimizer = torch.optim.SGD([value for value in live.parameters() if value.requires_grad], lr=1)
    with pytest.raises(UserError, match="has an optimizer already"):
        next_round(live)
    del optimizer
    assert next_round(live).round == 2


def test_a_training_resumes_under_its_own_draw_only(tmp_path):
    live = model()
    half_finetune(live)
    trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live)), save_strategy="steps", save_steps=2).train()
    whole = {name: value.detach().clone() for name, value in live.named_parameters()}
    del live
    shutil.rmtree(tmp_path / "checkpoint-4")
    again, other = model(), model()
    same = half_finetune(again)
    trainer(again, tmp_path, HalfFinetuneCallback(same)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, whole[name]) for name, value in again.named_parameters())
    made = trainer(other, tmp_path, HalfFinetuneCallback(half_finetune(other, seed=1)))
    with pytest.raises(UserError, match=r"another draw \(round 1, seed 42\) than the model \(round 1, seed 1\)"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def killed_in_round_two(out: Path) -> dict[str, Any]:
    """Train round 1, stop round 2 in the same folder before its first checkpoint; the weights after round 1."""
    live = model()
    draw = half_finetune(live, seed=44)
    made = trainer(live, out, HalfFinetuneCallback(draw), save_strategy="steps", save_steps=2)
    made.train()
    after = {name: value.detach().clone() for name, value in live.named_parameters()}
    next_round(live, made)
    made.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    return after


class Killed(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_a_round_is_not_resumed_from_that_before_it(tmp_path):
    after = killed_in_round_two(tmp_path)
    live = model()
    live.load_state_dict(after, strict=False)
    made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live, seed=44, round=2)))
    with pytest.raises(UserError, match=r"another draw \(round 1, seed 44\) than the model \(round 2, seed 44\)"):
        made.train(resume_from_checkpoint=True)
    first = model()
    made = trainer(first, tmp_path, HalfFinetuneCallback(half_finetune(first, seed=44)))
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # round 1 can be
    assert all(torch.equal(value, after[name]) for name, value in first.named_parameters())
    assert [entry["round"] for entry in read_json(tmp_path / "draws.json")["rounds"]] == [1]


def test_a_checkpoint_without_a_draw_is_refused(tmp_path):
    trainer(model(), tmp_path, save_strategy="steps", save_steps=2).train()
    live = model()
    for value in live.parameters():
        value.requires_grad_(True)
    made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live, level="all")))
    with pytest.raises(UserError, match=r"another draw \(no draw\) than the model"):
        made.train(resume_from_checkpoint=True)


def test_a_resumed_round_that_moved_nothing_is_noticed(tmp_path):
    live = model()
    still = {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 2}
    for resumed in (False, True):
        made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live)), **still)
        with pytest.raises(RuntimeError, match="No weight moved that was drawn"):
            made.train(resume_from_checkpoint=resumed)
        del made
        live = model()


def test_a_checkpoint_with_other_frozen_weights_is_refused(tmp_path):
    live = model()
    draw = half_finetune(live)
    trainer(live, tmp_path, HalfFinetuneCallback(draw), save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    weights = load_file(checkpoint / "model.safetensors")
    weights[draw.frozen[0]] = weights[draw.frozen[0]].nextafter(torch.tensor(9.0))
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    live = model()
    made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live)))
    with pytest.raises(UserError, match="frozen weights of the checkpoint are not those with which the training began"):
        made.train(resume_from_checkpoint=str(checkpoint))


def test_a_model_that_trains_something_else_is_refused(tmp_path):
    live = model()
    draw = half_finetune(live)
    live.get_parameter(draw.frozen[0]).requires_grad_(True)
    with pytest.raises(UserError, match=f"does not train what was drawn: {draw.frozen[0]}"):
        trainer(live, tmp_path, HalfFinetuneCallback(draw)).train()
    assert not (tmp_path / "draws.json").exists()


def test_a_training_that_moves_nothing_is_noticed(tmp_path):
    live = model()
    made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live)), learning_rate=0.0)
    with pytest.raises(RuntimeError, match="No weight moved that was drawn"):
        made.train()


class Touch(TrainerCallback):
    """What a faulty trainer could do."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        frozen = next(value for value in model.parameters() if not value.requires_grad)
        frozen.data.view(torch.int32).view(-1)[0] ^= 1 if state.global_step == 1 else 0


def test_a_frozen_bit_that_changes_in_memory_is_noticed(tmp_path):
    live = model()
    made = trainer(live, tmp_path, HalfFinetuneCallback(half_finetune(live)), Touch())
    with pytest.raises(RuntimeError, match="A frozen weight changed in memory"):
        made.train()
