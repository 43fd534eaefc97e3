"""The examples in scripts/examples: each trains the embedded model, and proves that its frozen bits are the base's."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from helpers import BASE

from hft_cli import half_finetune
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.config.schema import SelectionConfig
from hft_cli.method.selection import draw
from hft_cli.runner.model_proof import compare_models

EXAMPLES = sorted((Path(__file__).parents[2] / "scripts" / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_the_drawn_half(example, tmp_path, monkeypatch, capsys):
    if example.stem.startswith("lightning"):
        pytest.importorskip("lightning")
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip().endswith("True")
    params = parameters_from_folder(BASE)
    drawn = [draw(params, SelectionConfig(), round, 42) for round in (1, 2)]
    assert names["half_finetune"] is half_finetune
    model = tmp_path if (tmp_path / "model.safetensors").exists() else tmp_path / "model"
    moved = compare_models(BASE, model).moved
    expected = {name for each in drawn[: 1 + (example.stem == "trainer")] for name in each.updated}
    assert moved <= expected
    assert len(moved) > 0.9 * len(expected)
