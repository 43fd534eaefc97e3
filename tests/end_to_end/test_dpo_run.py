"""`hft train` with DPO rounds, from end to end: real processes, real DeepSpeed ranks, the embedded model."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    BASE,
    changed,
    command,
    environment,
    hft,
    kill,
    largest_difference,
    ledger,
    metrics,
    results,
    wait_for,
)
from safetensors.torch import load_file

QUICK_DPO = (
    "data.test_path=null", "suite=none", "data.max_rows=32", "train.batch_size=8", "train.micro_batch_size=4",
    "train.max_length=48", "train.log_every=1", "dpo.max_steps=8", "dpo.warmup=0",
)  # fmt: skip


def train_dpo(out: Path, *arguments: str) -> Path:
    ended = hft("train", *QUICK_DPO, *arguments, f"output_dir={out}")
    assert ended.status == 0, ended.err
    assert hft("verify", out).out.splitlines()[-1].startswith("verified")
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return train_dpo(tmp_path_factory.mktemp("dpo") / "run", "method=hft_dpo")


def test_it_starts_at_ln_2_and_learns_the_preference(one):
    lines = metrics(one)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert changed(BASE, one / "model") == set(ledger(one)[0]["updated"])
    assert results(one)["stage"] == "dpo"


@pytest.mark.parametrize("reference", ["shared", "full"])
def test_every_reference_gives_the_same_losses(one, tmp_path, reference):
    run = train_dpo(tmp_path / "run", "method=hft_dpo", f"dpo.reference={reference}")
    assert [line["loss"] for line in metrics(run)] == pytest.approx([line["loss"] for line in metrics(one)], abs=1e-5)


@pytest.mark.parametrize("engine", ["zero3"])  # test_dpo.py has the others
def test_deepspeed_ranks_agree_with_one_process(one, tmp_path, engine):
    run = train_dpo(
        tmp_path / "run", "method=hft_dpo", f"engine={engine}", "engine.num_processes=2", "train.micro_batch_size=2"
    )
    assert metrics(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert largest_difference(run, one) < 1e-5
    norms, expected = ([line["grad_norm"] for line in metrics(folder)] for folder in (run, one))
    assert norms == pytest.approx(expected, rel=1e-5)


def test_dpo_of_every_matrix_moves_every_matrix(tmp_path):
    run = train_dpo(tmp_path / "run", "+method=dpo")
    assert changed(BASE, run / "model") == set(load_file(BASE / "model.safetensors"))


SFT_THEN_DPO = ("method=hft", "experiment=sft_then_dpo", "train.max_steps=8", "dpo.max_steps=60", "train.save_every=10")


def test_sft_then_dpo_resumes_in_its_second_round_bit_by_bit(tmp_path):
    whole = train_dpo(tmp_path / "whole", *SFT_THEN_DPO)
    arguments = ("train", *QUICK_DPO, *SFT_THEN_DPO, f"output_dir={tmp_path}/killed")
    process = subprocess.Popen(command(*arguments), env=environment())
    wait_for(tmp_path / "killed/rounds/02-capitals-2/checkpoints/checkpoint-10/hft.json", process)
    kill(process, tmp_path / "killed")
    assert (tmp_path / "killed/rounds/01-capitals-1/outcome.json").exists()
    ended = hft(*arguments)
    assert ended.status == 0, ended.err

    first, second = ledger(whole)
    assert first["updated"] != second["updated"]
    one, two = (load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line["round"] for line in metrics(whole)] == [1] * 8 + [2] * 60
    assert metrics(whole)[8]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("method=hft_dpo", "engine=zero3", "dpo.reference=shared"), r"reference=shared does not work on engine=zero3"),
        (("method=hft_dpo", "dpo.beta=0"), r"dpo\.beta=0(\.0)? must be above 0"),
        (("method=dpo", "selection=category"), r"method=dpo updates every matrix.*Use method=hft_dpo"),
        (("method=hft", "method.stages=[sft,dpo]"), r"method\.stages names 2 stages for 1 training sets"),
        (("method=hft", "method.stages=[dop]"), r"Unknown method\.stages 'dop'\. Did you mean 'dpo'"),
        (("method=hft_dpo", "data=pocket_order"), r"no 'chosen'|'chosen'"),
    ],
)  # fmt: skip
def test_what_dpo_cannot_do_is_refused_in_one_line(tmp_path, arguments, said):
    ended = hft("train", *arguments, cwd=tmp_path)
    assert ended.status == 2
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert re.search(said, ended.err), ended.err
    assert list(tmp_path.iterdir()) == []
