"""Validation while training: the same loss on every engine, the same weights as without it, the best ones kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    BASE,
    hft,
    kill,
    largest_difference,
    metrics,
    on_one_worker,
    results,
    start,
    train,
    wait_for,
    weights,
)

OTHER = "pocket:skills/backwards/test.jsonl"  # which the model forgets while it learns another skill
FORGETS = (
    "+method=hft", "data.max_rows=200", f"data.validation={OTHER}", "train.validate_every=2", "train.early_stopping=2",
    "train.schedule=constant", "train.learning_rate=3e-3", "train.max_steps=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("forgetful") / "run", *FORGETS)


def validation_of(run: Path) -> dict:
    return results(run)["rounds"][0]["validation"]


def loss_of(model: Path, rows: str) -> float:
    """The mean negative log-likelihood of the trained tokens, row by row and without hft's training code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hft_cli.data.rows import read_chats
    from hft_cli.data.tokenization import tokenize
    from hft_cli.paths import resolve_path

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    dataset = tokenize(read_chats(resolve_path(rows)), AutoTokenizer.from_pretrained(model), max_length=64).dataset
    total, count = 0.0, 0
    for row in dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(loaded(input_ids=ids, labels=labels).loss) * tokens
        count += tokens
    return total / count


@pytest.mark.xdist_group("validation")
def test_a_round_keeps_the_weights_of_its_lowest_loss(forgetful, tmp_path):
    found = validation_of(forgetful)
    steps, losses = zip(*found["losses"], strict=True)
    assert steps[-1] < 40
    assert (found["best_step"], found["best_loss"]) == (steps[losses.index(min(losses))], min(losses))
    assert losses[0] == pytest.approx(loss_of(BASE, OTHER), rel=1e-5)
    assert min(losses) == pytest.approx(loss_of(forgetful / "model", OTHER), rel=1e-5)
    logged = {line["step"]: line["validation_loss"] for line in metrics(forgetful) if "validation_loss" in line}
    assert logged == dict(found["losses"])
    assert hft("verify", forgetful).status == 0
    assert not list((forgetful / "rounds").glob("*/best"))
    # A run that ends at that step, and is not validated, has the same weights.
    shorter = train(
        tmp_path / "shorter", *FORGETS, f"train.max_steps={found['best_step']}", "data.validation=null",
        "train.validate_every=null", "train.early_stopping=null",
    )  # fmt: skip
    assert weights(shorter) == weights(forgetful)


@pytest.mark.xdist_group("validation")
def test_a_killed_round_stops_early_where_it_would_have(tmp_path):
    stopping = ("train.validate_every=4", "train.early_stopping=10", "train.max_steps=100")
    settings = (*FORGETS, *stopping, "train.save_every=10")
    whole, out = train(tmp_path / "whole", *settings), tmp_path / "killed"
    process = start(out, *settings)
    wait_for(out / "rounds/01-order/checkpoints/checkpoint-10/hft.json", process)
    kill(process, out)
    assert not (out / "DONE").exists()
    assert hft("verify", train(out, *settings)).status == 0
    assert weights(out) == weights(whole)
    assert validation_of(out)["losses"] == validation_of(whole)["losses"]
    assert [line["step"] for line in metrics(out)] == [line["step"] for line in metrics(whole)]


@pytest.mark.parametrize("engine", [on_one_worker(engine) for engine in ("zero1", "zero2", "zero3")])
def test_two_ranks_validate_and_stop_like_one(forgetful, tmp_path, engine):
    ranks = ("engine.num_processes=2", "train.micro_batch_size=2")
    run = train(tmp_path / "run", *FORGETS, f"engine={engine}", *ranks)
    found, expected = validation_of(run), validation_of(forgetful)
    assert found["best_step"] == expected["best_step"]
    for (step, loss), (other, wanted) in zip(found["losses"], expected["losses"], strict=True):
        assert (step, loss) == (other, pytest.approx(wanted, rel=1e-4))
    assert largest_difference(run, forgetful) < 1e-4


def test_a_share_is_held_out_of_pairs_and_starts_at_ln_2(tmp_path):
    data = ("+method=hft_dpo", "data=pocket_preferences", "data.validation=0.25", "data.max_rows=40")
    run = train(tmp_path / "run", *data, "dpo.max_steps=4", "dpo.learning_rate=1e-4", "dpo.warmup=0")
    found = results(run)["rounds"][0]
    assert found["rows"] == 30
    losses = [loss for _, loss in found["validation"]["losses"]]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1] < 0.69
    assert "10 more held out for validation" in (run / "rounds/01-capitals/data.json").read_text()


def test_lora_keeps_the_adapters_of_its_lowest_loss(tmp_path):
    run = train(tmp_path / "run", *FORGETS, "+method=lora", "train.early_stopping=1")
    found = validation_of(run)
    assert found["best_step"] < found["losses"][-1][0]
    assert found["best_loss"] == pytest.approx(loss_of(run / "model", OTHER), rel=1e-4)
    assert hft("verify", run).status == 0
