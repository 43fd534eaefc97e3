"""Fixtures of the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = ({"prompt": f"What is {number} plus {number}?", "completion": str(2 * number)} for number in range(8))
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file
