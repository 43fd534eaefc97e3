"""selection=importance: measured on rows, kept in the ledger, and proven like a draw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import QUICK, hft, kill, ledger, start, train, wait_for

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.evaluation.importance_worker import spread, squared_gradients
from hft_cli.launch.jobs import Progress
from hft_cli.paths import resolve_path

BASE = Path(resolve_path("pocket:model"))
FACTS = Path(resolve_path("pocket:facts.jsonl"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A few facts."""
    file = tmp_path_factory.mktemp("rows") / "facts.jsonl"
    file.write_text("".join(line + "\n" for line in FACTS.read_text().splitlines()[::50]))
    return file


def by_importance(rows: Path, *more: str) -> tuple[str, ...]:
    return ("+method=hft", "selection=importance", f"selection.importance_rows={rows}", *more)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "run", *by_importance(rows))


def test_a_score_is_the_mean_squared_gradient_of_a_unit(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = AutoModelForCausalLM.from_pretrained(BASE).eval(), torch.randint(0, 500, (3, 8))
    labels = ids.masked_fill(torch.arange(8) < 5, -100)
    data = [{"input_ids": i.tolist(), "labels": label.tolist()} for i, label in zip(ids, labels, strict=True)]
    unit = "model.layers.1.self_attn.v_proj"
    matrix, expected = model.get_submodule(unit).weight, 0.0
    for one, label in zip(ids, labels, strict=True):
        loss = model(one[None], labels=label[None]).loss
        expected += float(torch.autograd.grad(loss, matrix)[0].square().mean()) / 3
    scores = squared_gradients(model, data, parameters_from_folder(BASE), Progress(tmp_path / "progress.json"))
    assert scores[unit] == pytest.approx(expected, rel=1e-4)
    assert scores.keys() == {p.unit for p in parameters_from_folder(BASE) if p.layer is not None}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_are_taken_at_equal_distances():
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread(list(range(3)), 10) == [0, 1, 2]


def test_the_run_updates_what_matters_least_and_verifies(run):
    scores = json.loads((run / "importance.json").read_text())["scores"]
    updated = set(ledger(run)[0]["updated"])
    for layer in range(4):
        names = [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkvo"]
        least = sorted(names, key=scores.__getitem__)[:2]
        assert {name for name in names if f"{name}.weight" in updated} == set(least)
    assert hft("verify", run).status == 0


def test_verify_fails_when_the_scores_were_changed(run, tmp_path):
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    file = broken / "importance.json"
    content = json.loads(file.read_text())
    content["scores"] = {name: -value for name, value in content["scores"].items()}
    file.write_text(json.dumps(content))
    ended = hft("verify", broken)
    assert ended.status == 1
    assert "draws.json is not what its seed and selection give" in ended.out
    file.write_text("{}")
    assert "importance.json is not as hft wrote it" in hft("verify", broken).err


def test_the_control_updates_what_matters_most(rows, run, tmp_path):
    arguments = by_importance(rows, "selection.importance_update=most", "selection.ratio=0.25")
    ended = hft("train", *QUICK, *arguments, f"output_dir={tmp_path / 'run'}")
    assert ended.status == 0, ended.err
    assert "The importance of the matrices is taken from" in ended.err
    assert (
        not set(ledger(tmp_path / "run")[0]["updated"])
        & set(ledger(run)[0]["updated"])
        & {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(4) for name in "qkvo"}
    )


def test_a_run_resumes_by_the_same_rows_only(rows, tmp_path):
    own = Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    arguments = by_importance(own, "train.max_steps=100", "train.save_every=20")
    process = start(tmp_path / "run", *arguments)
    wait_for(tmp_path / "run/rounds/01-order/checkpoints/checkpoint-20/hft.json", process)
    kill(process, tmp_path / "run")
    own.write_text(own.read_text().splitlines()[0] + "\n")
    ended = hft("train", *QUICK, *arguments, f"output_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert "have changed since" in ended.err
    shutil.copy(rows, own)
    assert hft("train", *QUICK, *arguments, f"output_dir={tmp_path / 'run'}").status == 0


def test_rows_without_an_answer_are_refused_in_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    ended = hft("train", *QUICK, *by_importance(tmp_path / "rows.jsonl"), f"output_dir={tmp_path / 'run'}")
    assert ended.status == 2
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert not (tmp_path / "run").exists()
