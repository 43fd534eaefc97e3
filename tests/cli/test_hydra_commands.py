"""Mistakes in `hft train`, `plan` and `eval`: exit status 2, one line, no traceback, no files."""

from __future__ import annotations

import re

import pytest
from helpers import hft

# ruff: noqa: E501
MISTAKES = {
    "no method": ((), r"No method: .* Available: dpo, fft, half_reset, hft, hft_dpo, .* For instance: hft train \+method=hft"),
    "sweep without -m": (("experiment=level_ablation",), r"experiment=level_ablation is a sweep: hft train -m experiment=level_ablation"),
    "unknown key": (("+method=hft", "train.learning_rat=1"), r"Unknown key 'train\.learning_rat'\. Did you mean 'train\.learning_rate'"),
    "key of another group": (("+method=hft", "generation.thinking=false"), r"Did you mean 'model\.thinking'\?"),
    "key of another trainer": (("+method=hft", "train.lr=1"), r"Unknown key 'train\.lr'\. Did you mean 'train\.learning_rate'\?"),
    "key without a group": (("+method=hft", "cutoff_len=1"), r"Unknown key 'cutoff_len'\. Did you mean 'train\.max_length'\?"),
    "key of several groups": (
        ("+method=hft", "model.learning_rate=1"), r"Did you mean 'train\.learning_rate' or 'dpo\.learning_rate'\?"
    ),
    "added key": (("+method=hft", "+train.bogus=1"), r"Unknown key 'train\.bogus'"),
    "wrong type": (("+method=hft", "train.max_steps=ten"), r"train\.max_steps: Value 'ten' .* Integer"),
    "quoted number": (("+method=hft", "train.learning_rate='1e-5x'"), r"train\.learning_rate: .* Float"),
    "data of other model": (("+method=hft", "model=llama2_7b"), r"No data: give data\.path=FILE.* Available: local, none, pocket_backwards"),
    "no data": (("+method=hft", "data.path=nowhere.jsonl"), r"No such file or folder: 'nowhere\.jsonl'"),
    "no model": (("+method=hft", "model.path=./nowhere", "data=pocket_capitals"), r"model\.path=\./nowhere is not a folder"),
    "no hub": (("+method=hft", "model.path=meta/none", "data=pocket_capitals"), r"model\.path=meta/none is neither a folder nor a model"),
    "nothing trains": (
        ("+method=hft", "selection.ratio=0", "selection.embeddings=freeze", "selection.head=freeze", "selection.final_norm=freeze"),
        r"Nothing would be trained",
    ),
    "resume nothing": (("+method=hft", "resume=true"), r"no unfinished run of this configuration"),
    "resume elsewhere": (("+method=hft", "resume=true", "output_dir=there"), r"resume=true, but there is no run in there"),
    "sweep without method": (("-m", "train.learning_rate=1,2"), r"No method: .* Available: dpo, fft, half_reset, hft, hft_dpo, "),
    "accents": (("+method=hft", "data.path=données.jsonl"), r"No such file or folder: 'données\.jsonl'"),
    "spaces": (("+method=hft", "data.path=a (1) = b's.jsonl"), r"No such file or folder: 'a \(1\) = b's\.jsonl'"),
    "positions": (("+method=hft", "train.max_length=4096"), r"more than the 512 positions of model\. Set train\.max_length=512"),
    "unknown engine": (("+method=hft", "engine=zero4"), r"Unknown engine 'zero4'\. Did you mean 'zero3'\? Available: auto, single"),
    "unknown launcher": (("+method=hft", "hydra/launcher=jobli"), r"Unknown hydra/launcher 'jobli'\. Did you mean 'joblib'"),
    "unknown flag": (("+method=hft", "--nope"), r"Unknown option '--nope'\."),
    "value of a flag": (("+method=hft", "--cfg", "jop"), r"invalid choice: 'jop' .*More: hft train --hydra-help"),
    "key of hydra": (("+method=hft", "hydra.nope=1"), r"hydra\.nope: Could not override"),
    "sweep of nodes": (("-m", "+method=hft", "engine.num_nodes=2", "seed=1,2"), r"needs a job of its own for each run"),
    "not a folder": (("+method=hft", "output_dir=/dev/null/x"), r"Not a directory: /dev/null/x"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, tmp_path):
    arguments, message = MISTAKES[name]
    ended = hft("train", *arguments, cwd=tmp_path)
    assert ended.status == 2, ended
    assert re.search(message, ended.err), ended.err
    assert ended.err.startswith("hft: ")
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("hft: failed: ")]  # a sweep's jobs
    assert len(lines) == 1
    if "-m" not in arguments:
        assert ended.out == ""
        assert list(tmp_path.iterdir()) == []


def test_eval_takes_a_run_or_a_model_and_not_both():
    ended = hft("eval", "run=x", "model=pocket")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "hft: run=… scores the run's own models: leave out model and model.path, or leave out run.\n"


def test_overrides_may_stand_on_both_sides_of_a_flag():
    ended = hft("train", "+method=hft", "--cfg", "job", "seed=7")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("seed: 7\n")
