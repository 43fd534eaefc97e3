"""Every type of causal language model of the installed transformers is trained and verified, or refused with a reason.

The list is in hft_cli/checkpoint/README.md. A type that transformers adds must be put into it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import changed, composed, hft, in_this_process, ledger, results, save_model, train
from model_types import MODEL_TYPES, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import hft_cli.checkpoint
from hft_cli.checkpoint.model_config import REFUSED, read_model_config
from hft_cli.checkpoint.parameters import parameters_from_config
from hft_cli.config.schema import RunConfig
from hft_cli.errors import UserError
from hft_cli.files import write_json
from hft_cli.method.rounds import PACKABLE
from hft_cli.runner import phase, training

README = Path(hft_cli.checkpoint.__file__).with_name("README.md").read_text()
OUTCOMES = dict(re.findall(r"^\| (.+?)(?: \(.*\))? \| \d+ \| (.+?) \|$", README, re.MULTILINE))
TRAINED = OUTCOMES["trained"].split(", ")
CANNOT_BE_BUILT, NOT_PLACED = "transformers cannot build it", "Parameters without a category"


def random_model(model_type: str, folder: Path) -> Path:
    """A model folder with random weights, whose logits are far from zero, and the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, vocabulary=512))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return save_model(model, folder)


@pytest.fixture(scope="module")
def settings(rows) -> RunConfig:
    """Composed once: it takes a third of a run's time."""
    return composed(
        "+method=hft", "model.path=?", f"data.path={rows}", "train.max_steps=2", "train.batch_size=4",
        "train.max_length=64", "train.learning_rate=0.01",
    )  # fmt: skip


@pytest.mark.parametrize("model_type", TRAINED)
def test_a_model_of_this_type_is_trained(model_type, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(phase, "run_worker", in_this_process)
    model = replace(settings.model, path=str(random_model(model_type, tmp_path / "model")))
    run = training.run(replace(settings, model=model, output_dir=str(tmp_path / "run")), [])
    (trained,) = results(run.folder)["rounds"]  # verified by the run itself
    assert trained["frozen_bit_identical"]
    assert json.loads(run.plan.read_text())["costs"]["rounds"][0]["memory_bytes"]["total"] > 0
    (draw,) = ledger(run.folder)
    assert 0.35 < draw["matrices_reached"] < 0.65
    # Some have no gradient in a step: experts, sparse attention.
    assert len(trained["unmoved"]) < len(draw["updated"]) / 3


@pytest.mark.parametrize("model_type", PACKABLE)
def test_packed_rows_do_not_see_each_other(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    rows = torch.randint(5, 60, (1, 7)), torch.randint(5, 60, (1, 9))
    packed, positions = torch.cat(rows, dim=1), torch.tensor([[*range(7), *range(9)]])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # logits far from zero
                parameter.mul_(4)
        alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        one_text = model(input_ids=packed, use_cache=False).logits
    scale = alone.abs().max()
    assert (together - alone).abs().max() < 1e-3 * scale
    assert (one_text - alone).abs().max() > 1e-2 * scale  # otherwise the test could not fail


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(TRAINED)))
def test_a_model_of_this_type_is_refused_with_its_reason(model_type, tmp_path):
    reason = next(reason for reason, types in OUTCOMES.items() if model_type in types.split(", "))
    if reason in (CANNOT_BE_BUILT, NOT_PLACED):
        message = "transformers cannot build" if reason == CANNOT_BE_BUILT else "Cannot place parameter"
        with pytest.raises(UserError, match=message):
            parameters_from_config(tiny_config(model_type))
        return
    # Types for more than text are known by their fields.
    values = CONFIG_MAPPING[model_type]().to_dict() if "more than text" in reason else {"model_type": model_type}
    write_json(tmp_path / "config.json", json.loads(json.dumps(values, default=str)))
    with pytest.raises(UserError) as refused:
        read_model_config(tmp_path / "config.json")
    assert reason.removeprefix("It ") in str(refused.value) or "more than text" in str(refused.value)


def test_the_readme_lists_every_type_once():
    listed = [name for types in OUTCOMES.values() for name in types.split(", ")]
    assert sorted(listed) == list(MODEL_TYPES)
    assert {*OUTCOMES} == {"trained", CANNOT_BE_BUILT, NOT_PLACED, *REFUSED}


@pytest.mark.end_to_end
def test_a_hybrid_mixture_under_zero3_and_half_reset(rows, tmp_path):
    base = random_model("lfm2_moe", tmp_path / "model")
    settings = ("train.max_steps=2", "train.batch_size=8", "train.max_length=64", "train.learning_rate=0.01")
    tuned = train(
        tmp_path / "tuned", "+method=hft", f"model.path={base}", f"data.path={rows}", *settings, "engine=zero3",
        "engine.num_processes=2",
    )  # fmt: skip
    reset = tmp_path / "reset"
    done = hft("train", "+method=half_reset", f"model.path={tuned}/model", f"model.base={base}", f"output_dir={reset}")
    assert done.status == 0, done.err
    done = hft("verify", reset)  # the runs have verified themselves
    assert done.status == 0, done.err
    assert "frozen ones bit-identical" in done.out
    assert changed(base, reset / "model") < changed(base, tuned / "model")
