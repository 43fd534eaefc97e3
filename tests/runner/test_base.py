"""The base of a run is recorded as it was given and where it was, and is found again by its hash."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import pytest
import yaml
from helpers import BASE, composed

from hft_cli.data import model_template
from hft_cli.errors import UserError
from hft_cli.files import write_json
from hft_cli.run_dir import RunDir
from hft_cli.runner.base import base_record, find_base, recorded_revision
from hft_cli.runner.directory import find_unfinished
from hft_cli.runner.prepare import fetch_model, with_date
from hft_cli.runner.verify import verify


def record(run: RunDir, **changes: object) -> RunDir:
    """Change entries of plan.json; None removes one."""
    plan = json.loads(run.plan.read_text()) | changes
    run.plan.write_text(json.dumps({key: value for key, value in plan.items() if value is not None}))
    return run


@pytest.fixture
def copied(two_rounds, tmp_path) -> RunDir:
    return RunDir(Path(shutil.copytree(two_rounds, tmp_path / "run")))


def test_a_run_records_its_base_as_given_and_where_it_was(two_rounds):
    plan = json.loads((two_rounds / "plan.json").read_text())
    assert (plan["base"], plan["base_path"]) == (str(BASE), "pocket:model")
    assert plan["base_revision"] is None
    assert len(plan["base_sha256"]) == 64


@pytest.mark.parametrize("path", ["pocket:model", None])
def test_a_run_of_the_embedded_model_outlives_a_move_of_it(copied, path):
    """None: as earlier versions recorded it, when the embedded model was in another folder."""
    run = record(copied, base="/old/hft_cli/pocket/model", base_path=path, base_revision=None)
    assert find_base(run) == BASE
    assert all(not proof.faults for proof in verify(run))


def test_a_moved_base_is_taken_from_where_the_user_says(copied, tmp_path):
    run = record(copied, base="/nowhere", base_path="/nowhere")
    moved = shutil.copytree(BASE, tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"started from /nowhere, which does not exist any more .*: --base FOLDER"
    ) as error:
        find_base(run)
    assert "\n" not in str(error.value)
    assert find_base(run, moved) == moved


def test_other_weights_are_refused_as_the_base(copied, tmp_path):
    with pytest.raises(UserError, match=r"The weights in .*/run/model are not those that the run in .* started from"):
        find_base(copied, copied.model)
    run = record(copied, base=str(copied.model), base_path="/nowhere")
    with pytest.raises(UserError, match=r"which holds other weights now .* --base FOLDER"):
        find_base(run)


def test_a_folder_that_is_no_checkpoint_is_not_the_base(copied, tmp_path):
    assert find_base(record(copied, base=str(tmp_path))) == BASE


def test_a_model_of_the_hub_starts_at_the_revision_asked_for(tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(path: str, revision: str | None, **options: object) -> str:
        fetched.append((path, revision))
        return str(BASE)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = composed("+method=hft", "model.path=org/model", "model.revision=v1.0", "data=pocket_order")
    assert fetch_model(config, RunDir(tmp_path / "new"))[1] == BASE
    run = RunDir(tmp_path)
    write_json(run.plan, {"base_path": "org/model", "base_revision": "0123abcd"})
    fetch_model(config, run)
    assert fetched == [("org/model", "v1.0"), ("org/model", "0123abcd")]
    local = composed("+method=hft", f"model.path={BASE}", "model.revision=v1.0", "data=pocket_order")
    with pytest.raises(UserError, match=r"is a folder, so it has no revision 'v1\.0': leave out model\.revision"):
        fetch_model(local, run)


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    template = model / "chat_template.jinja"
    config = composed("+method=hft", f"model.path={model}", "data=pocket_order", f"output_dir={tmp_path}/a/b/new")
    run = RunDir(tmp_path / "a/b/run")
    run.folder.mkdir(parents=True)
    assert with_date(config, model, run).model.date is None
    template.write_text("{{ strftime_now('%d') }}" + template.read_text())
    monkeypatch.setattr(model_template, "date", type("Day", (date,), {"today": lambda: date(2025, 3, 2)}))
    begun = with_date(config, model, run)
    assert begun.model.date == "2025-03-02"
    run.config.write_text(yaml.safe_dump(asdict(begun)))
    write_json(run.plan, {})
    monkeypatch.setattr(model_template, "date", type("Day", (date,), {"today": lambda: date(2025, 3, 3)}))
    assert with_date(config, model, run) == begun
    assert find_unfinished(config) == run
    typed = replace(config, model=replace(config.model, date="2025-03-03"))
    assert with_date(typed, model, run) == typed
    with pytest.raises(UserError, match="There is no unfinished run of this configuration"):
        find_unfinished(typed)


def test_a_model_of_the_hub_is_fetched_at_its_recorded_commit(copied, tmp_path, monkeypatch):
    snapshot = Path(shutil.copytree(BASE, tmp_path / "hub/snapshots/0123abcd"))
    assert base_record("org/model", snapshot)["base_revision"] == "0123abcd"
    fetched = []

    def snapshot_download(path: str, revision: str | None, **options: object) -> str:
        fetched.append((path, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    run = record(copied, base="/cache/snapshots/0123abcd", base_path="org/model", base_revision="0123abcd")
    assert find_base(run) == snapshot
    assert fetched == [("org/model", "0123abcd")]
    assert recorded_revision(run, "org/model") == "0123abcd"
    assert recorded_revision(run, "org/other") is None
