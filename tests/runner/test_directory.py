"""A run is continued with the inputs that it began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import BASE, QUICK, composed

from hft_cli.errors import UserError
from hft_cli.run_dir import RunDir
from hft_cli.runner.directory import continue_run, seal
from hft_cli.runner.prepare import Prepared, prepare

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def prepared(folder: Path) -> tuple[RunDir, Prepared]:
    """A run of the model in `folder`/base, with the chat template of a file beside it."""
    run = RunDir(folder / "run")
    run.folder.mkdir(exist_ok=True)
    settings = (f"model.path={folder / 'base'}", f"model.chat_template={folder / 'mine.jinja'}")
    config = composed("+method=hft", *QUICK, *settings, f"output_dir={run.folder}")
    return run, prepare(config, folder / "base", run)


@pytest.fixture
def begun(tmp_path) -> Path:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "mine.jinja").write_text((BASE / "chat_template.jinja").read_text())
    seal(*prepared(tmp_path), [])
    return tmp_path


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("base/config.json", "config.json in "),
        ("base/tokenizer.json", "tokenizer.json in "),
        ("base/chat_template.jinja", "chat_template.jinja in "),
        ("mine.jinja", "model.chat_template="),
    ],
)
def test_a_changed_file_of_the_base_is_refused(begun, file, named):
    (begun / file).write_text((begun / file).read_text() + " ")
    with pytest.raises(UserError, match=rf"^{named}\S+ has changed since \S+ was begun. Restore it"):
        continue_run(*prepared(begun))


def test_a_file_without_an_effect_may_change(begun):
    (begun / "base/generation_config.json").write_text("{}")
    (begun / "base/LICENSE.txt").write_text("text")
    continue_run(*prepared(begun))


def test_a_run_of_an_earlier_version_is_continued(begun):
    run = RunDir(begun / "run")
    plan = json.loads(run.plan.read_text())
    del plan["base_files"], plan["template_sha256"]
    run.plan.write_text(json.dumps(plan))
    (begun / "base/config.json").write_text((begun / "base/config.json").read_text() + " ")
    continue_run(*prepared(begun))
