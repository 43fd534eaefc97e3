"""Any round's model from the base and the deltas, and deltas published: bit for bit, over nothing that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import hft
from safetensors import safe_open

from hft_cli.cli.commands import run_command
from hft_cli.config.schema import read_config
from hft_cli.errors import UserError
from hft_cli.paths import PACKAGE
from hft_cli.run_dir import RunDir
from hft_cli.runner.deltas import apply, materialize, publish

BASE = PACKAGE / "assets/pocket/model"


def everything(file: Path) -> dict[str, bytes]:
    """Name -> dtype and bytes, read by the library."""
    with safe_open(file, "np") as opened:
        return {name: (t := opened.get_tensor(name)).dtype.str.encode() + t.tobytes() for name in opened.keys()}  # noqa: SIM118


def model(folder: Path) -> dict[str, bytes]:
    return everything(folder / "model.safetensors")


def deltas(run: Path) -> list[dict[str, bytes]]:
    return [everything(folder / "delta.safetensors") for folder in sorted((run / "rounds").iterdir())]


def test_the_last_round_is_the_runs_own_model_file_by_file(two_rounds, tmp_path):
    materialize(RunDir(two_rounds), None, tmp_path / "model")
    names = sorted(path.name for path in (two_rounds / "model").iterdir())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (two_rounds / "model" / name).read_bytes(), name


def test_an_earlier_round_is_the_base_with_the_deltas_up_to_it(two_rounds, tmp_path):
    ended = hft("materialize", two_rounds, "round=1", f"out={tmp_path / 'a model'}")
    assert ended.status == 0, ended.err
    first = deltas(two_rounds)[0]
    assert model(tmp_path / "a model") == model(BASE) | first
    assert model(tmp_path / "a model") != model(two_rounds / "model")


def test_a_published_delta_gives_the_model_again(two_rounds, tmp_path):
    publish(RunDir(two_rounds), None, tmp_path / "delta")
    first, second = deltas(two_rounds)
    assert everything(tmp_path / "delta/delta.safetensors") == first | second
    apply(tmp_path / "delta", str(BASE), tmp_path / "again")
    assert model(tmp_path / "again") == model(two_rounds / "model")
    card = (tmp_path / "delta/README.md").read_text()
    assert "hft materialize delta base=BASE out=model" in card
    assert "| 2     | backwards" in card
    assert str(tmp_path) not in card + (tmp_path / "delta/hft.json").read_text()


def test_a_delta_names_the_weights_that_it_belongs_to(two_rounds):
    for folder in sorted((two_rounds / "rounds").iterdir()):
        with safe_open(folder / "delta.safetensors", "np") as opened:
            assert opened.metadata()["base_sha256"] == json.loads((two_rounds / "plan.json").read_text())["base_sha256"]


def test_another_base_is_refused_and_nothing_is_left(two_rounds, tmp_path):
    publish(RunDir(two_rounds), 1, tmp_path / "delta")
    with pytest.raises(UserError, match=r"are not those that .*delta was made from"):
        apply(tmp_path / "delta", str(two_rounds / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN", "round=3", "out=new"), r"round=3 is not one of the rounds of .*: 1 to 2"),
        (("RUN", "round=one", "out=new"), r"round=one is not a number"),
        (("RUN", "rond=1", "out=new"), r"Unknown key 'rond'\. Did you mean 'round'"),
        (("RUN",), r"required: --out\. Usage: hft materialize RUN\|DELTA --out FOLDER"),
        (("RUN", "again", "--out", "new"), r"One argument too many: 'again'"),
        (("RUN", "out=."), r"out=\. exists already"),
        ((".", "out=new"), r"\. is not the directory of a run\. If it is a published delta, give its base"),
        ((".", "base=x", "out=new"), r"\. is neither a run nor a published delta"),
    ],
)
def test_mistakes_are_one_line(words, said, two_rounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        run_command("materialize", [*(str(two_rounds) if word == "RUN" else word for word in words)])
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_sweep_is_found_by_its_name(two_rounds, tmp_path):
    run = shutil.copytree(two_rounds, tmp_path / "method=hft,seed=1")
    assert run_command("materialize", [str(run), "round=1", f"out={tmp_path / 'model'}"]) == 0
    assert model(tmp_path / "model") == model(BASE) | deltas(run)[0]


def test_a_round_that_is_not_finished_is_refused(two_rounds, tmp_path):
    shutil.copytree(two_rounds, tmp_path / "run")
    (sorted((tmp_path / "run/rounds").iterdir())[1] / "outcome.json").unlink()
    with pytest.raises(UserError, match=r"Round 2, backwards, of .* is unfinished"):
        materialize(RunDir(tmp_path / "run"), None, tmp_path / "out")
    materialize(RunDir(tmp_path / "run"), 1, tmp_path / "out")
    assert read_config(RunDir(tmp_path / "run")).method.name == "hft"
