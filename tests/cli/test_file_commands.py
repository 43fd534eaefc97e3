"""verify, show, materialize, publish and report as a user types them, on a finished run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers import BASE, Ended, hft

from hft_cli.cli.commands import run_command


@pytest.fixture(scope="module")
def swept(hft_run, tmp_path_factory) -> Path:
    """A finished run in a folder whose name has equals signs, as a sweep's have."""
    return shutil.copytree(hft_run, tmp_path_factory.mktemp("sweep") / "method=hft,seed=1")


def test_verify_takes_a_base_and_a_model_from_elsewhere(swept, tmp_path, capsys):
    base, model = shutil.copytree(BASE, tmp_path / "base"), shutil.copytree(swept / "model", tmp_path / "model")
    assert run_command("verify", [str(swept), "--base", str(base), f"model={model}"]) == 0
    assert capsys.readouterr().out.endswith("verified: 1 round\n")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert run_command("verify", [str(swept), "--model", str(model)]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert text.endswith("NOT VERIFIED\n")


def test_show_prints_the_draws(swept, capsys):
    assert run_command("show", ["draws", str(swept)]) == 0
    assert capsys.readouterr().out.startswith("round 1 order: category, ratio 0.5, seed 42")


@pytest.mark.parametrize("spelling", [["--round", "1", "--out"], ["round=1", "--out"]])
def test_materialize_writes_the_model_of_a_run(spelling, swept, tmp_path, capsys):
    out = tmp_path / "model"
    assert run_command("materialize", [str(swept), "--base", str(BASE), *spelling, str(out)]) == 0
    assert capsys.readouterr().out == f"Model: {out}\n"
    assert (out / "model.safetensors").read_bytes() == (swept / "model/model.safetensors").read_bytes()


def test_publish_writes_a_delta_that_materialize_reads(swept, tmp_path, capsys):
    delta, out = tmp_path / "delta", tmp_path / "model"
    assert run_command("publish", [str(swept), f"out={delta}"]) == 0
    assert capsys.readouterr().out == f"Delta with its model card: {delta}\n"
    assert run_command("materialize", [str(delta), f"base={BASE}", f"out={out}"]) == 0
    assert (out / "model.safetensors").read_bytes() == (swept / "model/model.safetensors").read_bytes()


def test_report_takes_its_folder_in_both_spellings(swept, tmp_path, capsys):
    for words in (["--out", str(tmp_path / "a")], [f"out={tmp_path / 'b'}"]):
        assert run_command("report", [str(swept), *words]) == 0
    assert (tmp_path / "a/runs.csv").read_bytes() == (tmp_path / "b/runs.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify",), r"The following arguments are required: RUN\|BASE\. Usage: hft verify RUN \[--base BASE\]"),
        (("verify", "nowhere"), r"There is no run directory nowhere"),
        (("verify", "."), r"is not the directory of a run"),
        (("verify", "a", "b"), r"For two models give --draw FILE or --infer"),
        (("show",), r"arguments are required: draws, RUN\. Usage: hft show draws RUN \| tokens method=METHOD"),
        (("show", "drawings", "."), r"Unknown thing to show 'drawings'\. Did you mean 'draws'"),
        (("show", "token"), r"The following arguments are required: RUN"),
        (("show", "draws", "."), r"Cannot read draws\.json: No such file"),
        (("report", "."), r"There is no run in \."),
        (("report", "--nope"), r"Unknown option '--nope'\. Did you mean '--norms'"),
        (("materialize", "nowhere", "out=x"), r"There is no run or delta nowhere"),
        (("materialize", ".", "out=x"), r"is not the directory of a run\. If it is a published delta, give its base"),
        (("materialize", ".", "out=x", "round=1"), r"a published delta has no rounds: leave out --round"),
        (("materialize", ".", "round=x", "out="), r"round=x is not a number"),
        (("publish",), r"Usage: hft publish RUN --out FOLDER"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(words, message, tmp_path):
    ended: Ended = hft(*words, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert re.search(message, ended.err), ended.err
    assert re.fullmatch(r"hft: .*\n", ended.err)
    assert list(tmp_path.iterdir()) == []
