"""Anchors hold a model near its start by exactly what they are defined to add, on every engine, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import BASE, phase_job, torchrun
from safetensors.torch import load_file

from hft_cli.launch.jobs import Progress, write_job
from hft_cli.run_dir import RoundDir
from hft_cli.training import phase
from hft_cli.training.anchors import KlAnchor, filter_by_momentum, pull_to_start
from hft_cli.training.compat import LossOnlyTrainer
from hft_cli.training.weights import copy_of_start, freeze

MEASURE = Path(__file__).parents[1] / "plan/measure_ranks.py"
QUICK = (
    "data=pocket_order", "data.max_rows=16", "train.max_steps=4", "train.batch_size=4", "train.micro_batch_size=1",
    "train.max_length=64", "train.learning_rate=1e-3", "train.save_every=2", "train.save_limit=9", "train.log_every=1",
)  # fmt: skip
L2_SP, KL = ("anchor=l2_sp", "anchor.weight=100"), ("anchor=kl", "anchor.weight=3")


def train(folder: Path, *more: str) -> RoundDir:
    folder.mkdir(exist_ok=True)
    made = RoundDir(folder)
    phase.train_phase(phase_job(folder, BASE, *QUICK, *more), made, Progress(made.progress))
    return made


def forget_the_end(folder: Path, copy: Path) -> RoundDir:
    """A copy of a phase that was stopped after its second step."""
    stopped = RoundDir(Path(shutil.copytree(folder, copy)))
    for file in (stopped.delta, stopped.outcome):
        file.unlink()
    return stopped


def logs(folder: RoundDir) -> list[dict]:
    return [json.loads(line) for line in (folder.folder / "metrics.jsonl").read_text().splitlines()]


def distance(folder: RoundDir) -> float:
    """From the start, over all updated elements."""
    base = load_file(BASE / "model.safetensors")
    parts = [(value - base[name]).norm() for name, value in load_file(folder.delta).items()]
    return float(torch.stack(parts).norm())


# ------------------------------------------------------------------------------------------------------------ optimizer


def steps(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        tensor.grad = gradient.clone()
        optimizer.step()


def test_a_step_is_pulled_by_rate_times_weight_of_the_way():
    start, gradients = torch.randn(7), list(torch.randn(5, 7))
    held, by_hand = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pulled = torch.optim.AdamW([held], lr=0.01, weight_decay=0.1)
    pull_to_start(pulled, 20.0)
    steps(pulled, held, gradients)
    plain = torch.optim.AdamW([by_hand], lr=0.01, weight_decay=0.1)
    for gradient in gradients:
        with torch.no_grad():
            by_hand.sub_(0.01 * 20.0 * (by_hand - start))
        steps(plain, by_hand, [gradient])
    assert torch.allclose(held, by_hand, rtol=0, atol=1e-6)


def test_a_tensor_without_gradients_at_first_is_pulled_later():
    start = torch.randn(3)
    late, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([late, other], lr=0.01)
    pull_to_start(optimizer, 10.0)
    steps(optimizer, other, [torch.randn(3)])  # as an expert that no token is sent to
    assert torch.equal(late, start)
    steps(optimizer, late, list(torch.randn(3, 3)))
    (kept,) = (value for name, value in optimizer.state[late].items() if name == "hft_start")
    assert torch.equal(kept, start)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
def test_a_step_changes_the_share_with_the_largest_moments(share):
    tensor = torch.nn.Parameter(torch.randn(20, 10))
    optimizer = torch.optim.AdamW([tensor], lr=0.01, weight_decay=0.1)
    filter_by_momentum(optimizer, share)
    for gradient in torch.randn(3, 20, 10):
        before = tensor.detach().clone()
        steps(optimizer, tensor, [gradient])
        moments, changed = optimizer.state[tensor]["exp_avg"].abs(), tensor != before
        assert int(changed.sum()) == max(1, round(share * 200))
        assert moments[changed].min() >= moments[~changed].max()


# ----------------------------------------------------------------------------------------------------------------- loss


def test_the_divergence_is_that_of_the_start_from_now():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    names = [name for name, _ in model.named_parameters()]
    freeze(model, [name for name in names if "up_proj" in name], [name for name in names if "up_proj" not in name])
    start = copy_of_start(model)
    shared = [one is other for one, other in zip(model.parameters(), start.parameters(), strict=True)]
    assert shared == [not value.requires_grad for value in model.parameters()]

    ids, trained = torch.randint(0, 500, (2, 9)), torch.rand(2, 9) < 0.5
    anchor = KlAnchor(start, 1.0)
    assert float(anchor.divergence({"input_ids": ids}, model(ids).logits, trained)) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.02 * torch.randn_like(value) * ("up_proj" in name))
    was, now = start(ids).logits[trained].log_softmax(-1), model(ids).logits[trained].log_softmax(-1)
    expected = (was.exp() * (was - now)).sum()
    assert torch.allclose(anchor.divergence({"input_ids": ids}, model(ids).logits, trained), expected, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- a phase


def test_the_plain_loss_is_logged_first_and_the_divergence_falls(tmp_path):
    plain, held = train(tmp_path / "plain"), train(tmp_path / "held", *KL)
    assert logs(held)[0]["loss"] == pytest.approx(logs(plain)[0]["loss"], rel=1e-5)
    assert logs(held)[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert logs(held)[-1]["kl"] > 1e-4
    assert "kl" not in logs(plain)[-1]
    assert distance(held) != distance(plain)


@pytest.mark.parametrize("more", [L2_SP, ("train.optimizer=adafactor", *L2_SP), KL, ("train.momentum_filter=0.1",)])
def test_a_resumed_phase_has_the_same_start(more, tmp_path):
    whole = train(tmp_path / "whole", *more)
    resumed = forget_the_end(tmp_path / "whole", tmp_path / "resumed")
    train(tmp_path / "resumed", *more)
    assert resumed.delta.read_bytes() == whole.delta.read_bytes()


def test_micro_batches_count_by_their_tokens(tmp_path):
    one, many = (train(tmp_path / size, *KL, f"train.micro_batch_size={size}") for size in ("1", "4"))
    last, other = (load_file(folder.delta) for folder in (one, many))
    assert all(torch.allclose(value, other[name], rtol=0, atol=2e-5) for name, value in last.items())


CASES = {"zero1": ("engine=zero1", *L2_SP), "zero2": ("engine=zero2", *L2_SP), "zero3": ("engine=zero3", *L2_SP),
         "kl": ("engine=zero2", *KL)}  # fmt: skip


def ranks_train(folder: Path, names: list[str]) -> None:
    """Train phases one after the other on the same two ranks."""
    jobs = []
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        case = CASES[name.removesuffix("-resumed")]
        jobs.append(write_job(phase_job(folder / name, BASE, *QUICK, *case, "engine.num_processes=2"), folder / name))
    torchrun(2, MEASURE, *jobs)


@pytest.mark.end_to_end
def test_ranks_hold_as_one_process_does_and_resume(tmp_path):
    ranks_train(tmp_path, list(CASES))
    alone = {"kl": train(tmp_path / "one-kl", *KL)}
    l2_sp = train(tmp_path / "one-l2", *L2_SP)
    for name in CASES:
        expected, made = (load_file(f.delta) for f in (alone.get(name, l2_sp), RoundDir(tmp_path / name)))
        assert max((made[key] - value).abs().max() for key, value in expected.items()) < 2e-5, name
        forget_the_end(tmp_path / name, tmp_path / f"{name}-resumed")
    ranks_train(tmp_path, [f"{name}-resumed" for name in CASES])
    for name in CASES:
        resumed, whole = (RoundDir(tmp_path / folder).delta for folder in (f"{name}-resumed", name))
        assert resumed.read_bytes() == whole.read_bytes(), name


def test_only_the_kl_anchor_makes_a_small_batch_hold_logits():
    trainer = object.__new__(LossOnlyTrainer)
    trainer.holds_logits = False
    trainer.hold(KlAnchor(None, 1.0))
    assert trainer.holds_logits
