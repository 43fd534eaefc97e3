"""Model folders: what is missing is named with the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from architectures import random_model

from hft_cli.checkpoint.folders import model_folder
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.errors import UserError


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "no checkpoint folder"),
        ("no config", "no config.json"),
        ("no weights", "no model.safetensors"),
        ("only bin", r"only pytorch_model.bin. Convert .*save_pretrained"),
        ("lost shard", r"lacks model-00002-of-.*Fetch"),
        ("wrong index", "is not in model-00001-of"),
        ("broken index", "index.json is not JSON"),
    ],
)
def test_an_incomplete_folder_is_refused_with_the_fix(fault: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder, max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    if fault == "no folder":
        shutil.rmtree(folder)
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault in ("no weights", "only bin"):
        for file in folder.glob("model*"):
            file.unlink()
        if fault == "only bin":
            (folder / "pytorch_model.bin").touch()
    elif fault == "lost shard":
        next(folder.glob("model-00002-of-*")).unlink()
    elif fault == "wrong index":
        shards = json.loads(index.read_text())
        first = next(folder.glob("model-00001-of-*")).name
        index.write_text(json.dumps({"weight_map": dict.fromkeys(shards["weight_map"], first)}))
    else:
        index.write_text("{")
    with pytest.raises(UserError, match=message):
        parameters_from_folder(folder)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_model_path_that_is_no_folder_is_refused(path):
    with pytest.raises(UserError, match=f"model.path={path} is not a folder"):
        model_folder(path)
