"""The short form of scripts/torture.py: a few kills before file operations of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import environment

SCRIPT = Path(__file__).parents[2] / "scripts/torture.py"


def test_no_fault_before_a_file_operation_loses_a_run():
    ended = subprocess.run([sys.executable, SCRIPT, "--short"], capture_output=True, text=True, env=environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SIGKILL before a file operation" in ended.stdout
