"""`make versions` runs the tests marked `versions` with the lowest and the newest versions that pyproject.toml admits.

Those of this file, those of every test_compat.py, and the pinned draws carry the mark.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BASE, changed, environment, hft, ledger, on_one_worker

PACKAGE = Path(__file__).parents[1] / "hft_cli"
PLUGINS = ("integrations/axolotl.py", "integrations/swift.py")  # of programs that are not installed here
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py" and path.parent.name + "/" + path.name not in PLUGINS
)
DRAW = "1e834ba63fd0e05243215d4c1cb483992453b72e5a1df65b7b8c6c9e53e92420"

pytestmark = pytest.mark.versions


def test_every_module_can_be_imported():
    code = "\n".join(f"import {name}" for name in MODULES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.end_to_end
@pytest.mark.parametrize("engine", ["single", on_one_worker("zero2")])
def test_runs_on_one_and_two_ranks_have_the_pinned_draw(hft_run, begun, engine):
    run = hft_run if engine == "single" else begun(engine)[0]
    (draw,) = ledger(run)
    assert draw["sha256"] == DRAW
    assert changed(BASE, run / "model") == set(draw["updated"])
    assert hft("verify", run).status == 0
