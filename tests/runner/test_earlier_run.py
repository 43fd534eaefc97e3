"""A run that an earlier version made (tests/fixtures/earlier_run) can be used by this one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import CACHE, hft

from hft_cli.config.schema import read_config
from hft_cli.run_dir import RunDir
from hft_cli.runner.deltas import materialize
from hft_cli.runner.directory import seal
from hft_cli.runner.prepare import prepare
from hft_cli.runner.training import run
from hft_cli.runner.verify import verify

FIXTURE = Path(__file__).parents[1] / "fixtures" / "earlier_run"


@pytest.fixture
def earlier(tmp_path) -> Path:
    """The run and its base, in places that the run does not know."""
    shutil.copytree(FIXTURE / "base", tmp_path / "moved")
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return tmp_path


def test_it_verifies_with_its_base_from_elsewhere(earlier):
    proofs = verify(RunDir(earlier / "run"), base=earlier / "moved")
    assert [(proof.round, proof.name, proof.faults) for proof in proofs] == [
        (1, "count-train", ()),
        (2, "copy-train", ()),
    ]
    assert [(proof.updated, proof.frozen) for proof in proofs] == [(12, 9), (12, 9)]


def test_its_last_round_materializes_to_the_stored_bytes(earlier):
    materialize(RunDir(earlier / "run"), None, earlier / "again", base=earlier / "moved")
    for file in (earlier / "run/model").iterdir():
        assert (earlier / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_it_is_shown_and_reported(earlier):
    shown = hft("show", "draws", earlier / "run")
    assert shown.status == 0, shown.err
    assert "round 2 copy-train: category, ratio 0.5, seed 42; reached 50.0%" in shown.out
    assert "updated in 0 rounds: 4, 1 round: 10, 2 rounds: 4" in shown.out
    reported = hft("report", earlier / "run", "--out", earlier / "report")
    assert reported.status == 0, reported.err
    assert "| verified |" in reported.out


def test_unfinished_it_is_continued_with_a_moved_base(earlier, monkeypatch):
    out = RunDir(earlier / "run")
    for path in (out.done, out.results, out.round(2, "copy-train").outcome):
        path.unlink()
    shutil.rmtree(out.model)
    monkeypatch.setenv("XDG_CACHE_HOME", CACHE)
    monkeypatch.chdir(FIXTURE)  # where its rows are
    sealed = read_config(out)
    run(replace(sealed, output_dir=str(out.folder), model=replace(sealed.model, path=str(earlier / "moved"))), [])
    assert json.loads(out.results.read_text())["verification"]["passed"]
    plan = json.loads(out.plan.read_text())
    assert (plan["base"], plan["base_path"]) == (str(earlier / "moved"), str(earlier / "moved"))
    assert all(not proof.faults for proof in verify(out))


def test_its_configuration_gives_the_same_bytes_of_draws_json(earlier, monkeypatch):
    monkeypatch.chdir(FIXTURE)
    old, new = RunDir(earlier / "run"), RunDir(earlier / "new")
    new.folder.mkdir()
    seal(new, prepare(read_config(old), FIXTURE / "base", new), [])
    assert new.draws.read_bytes() == old.draws.read_bytes()
    old_plan, new_plan = (json.loads(run.plan.read_text()) for run in (old, new))
    assert new_plan["base_sha256"] == old_plan["base_sha256"]
    # What later versions add, or say of the data in another form.
    later = {"sources", "parts", "validation", "set_part", "set_parts", "set_name"}
    rounds = [
        [{key: value for key, value in row.items() if key not in later} for row in plan["rounds"]]
        for plan in (old_plan, new_plan)
    ]
    assert rounds[0] == rounds[1]


def test_lora_of_an_earlier_version_is_the_method_of_today(tmp_path):
    config = (FIXTURE / "run/config.yaml").read_text().replace("lora_rank: 8", "lora_rank: 4")
    head, _, tail = config.partition("continual:")
    (tmp_path / "config.yaml").write_text(head + "continual:" + tail.replace("name: seqft", "name: lora", 1))
    read = read_config(RunDir(tmp_path))
    assert (read.method.name, read.continual.name, read.lora.rank) == ("lora", "seqft", 4)
