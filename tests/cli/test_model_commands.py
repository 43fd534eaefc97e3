"""`hft draw`, and `hft verify` of two models."""

from __future__ import annotations

import json
import re

import pytest
from helpers import BASE, hft
from safetensors.torch import load_file, save_file

from hft_cli.cli.commands import run_command
from hft_cli.errors import UserError

LEDGER = "draws.json"


def test_a_draw_is_that_of_a_run(capsys):
    assert run_command("draw", ["pocket", "--seed", "5", "--round", "2", "--format", "json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["rounds"]
    assert (entry["seed"], entry["round"], entry["level"], len(entry["updated"])) == (5, 2, "category", 21)
    assert run_command("draw", [str(BASE), "seed=5", "round=2"]) == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(entry["updated"])


@pytest.mark.parametrize("model", ["llama2_7b", "mixtral_8x7b", str(BASE / "config.json")])
def test_models_without_weights_are_drawn_for(model, capsys):
    assert run_command("draw", [model, "--format", "axolotl"]) == 0
    assert capsys.readouterr().out.startswith("unfrozen_parameters:\n  - ^")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pocket", "--ratio", "half"], "half is not a number"),
        (["pocket", "--ratio", "2"], r"ratio=2\.0 must be in"),
        (["pocket", "--level", "catgory"], "Did you mean 'category'"),
        (["pocket", "--format", "axolotls"], "Did you mean 'axolotl'"),
        (["pocket", "--round", "0"], "counted from 1"),
        (["pocket", "--seed", "x"], "invalid int value"),
        (["pocket", "--names", "q_proj"], "give both level=names"),
        (["pocket", "--level", "importance"], "needs rows"),
        ([], "MODEL"),
    ],
)
def test_a_mistake_in_a_draw_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        run_command("draw", words)
    assert "\n" not in str(error.value)


def test_two_models_are_verified_from_the_shell(tmp_path):
    drawn = hft("draw", BASE, "--format", "json")
    (tmp_path / LEDGER).write_text(drawn.out)
    updated = json.loads(drawn.out)["rounds"][0]["updated"]
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    tensors = load_file(BASE / "model.safetensors")
    save_file({name: value + (name in updated) for name, value in tensors.items()}, tuned / "model.safetensors")
    (tuned / "config.json").write_bytes((BASE / "config.json").read_bytes())
    proven = hft("verify", BASE, tuned, "--draw", tmp_path / LEDGER)
    assert proven.status == 0, proven.err
    assert proven.out.endswith("verified: 21 parameters drawn, 18 frozen: frozen ones bit-identical\n")
    inferred = hft("verify", BASE, tuned, "--infer")
    assert (inferred.status, "fits one draw of level category, ratio 0.5" in inferred.out) == (0, True)
    assert re.search(r"attention +8 +8 +16", inferred.out)
    other = hft("draw", BASE, "--format", "json", "--seed", "1")
    (tmp_path / LEDGER).write_text(other.out)
    failed = hft("verify", BASE, tuned, "--draw", tmp_path / LEDGER)
    assert failed.status == 1
    assert "NOT VERIFIED" in failed.out
    assert "frozen parameters moved: model.layers." in failed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "For two models give --draw FILE or --infer"),
        (["a", "b", "--infer", "--draw", "f"], "For two models give --draw FILE or --infer"),
        (["a", "b", "--infer", "--base", "c"], "For two models give"),
        (["a", "--infer"], "--draw and --infer are for two models"),
    ],
)
def test_options_of_two_models_and_of_a_run_are_apart(words, message):
    with pytest.raises(UserError, match=message):
        run_command("verify", words)


def test_nothing_that_moved_and_no_single_draw_are_said(tmp_path, capsys):
    assert run_command("verify", [str(BASE), str(BASE), "--infer"]) == 0
    assert capsys.readouterr().out.endswith("Nothing moved.\n")
    tensors = load_file(BASE / "model.safetensors")
    odd = {name: value + ("layers.0.mlp.up_proj" in name) for name, value in tensors.items()}
    save_file(odd, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((BASE / "config.json").read_bytes())
    assert run_command("verify", [str(BASE), str(tmp_path), "--infer"]) == 1
    assert "No single draw fits" in capsys.readouterr().out
