"""Model folders: what is missing is named with the fix."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from architectures import random_model

from hft_cli.checkpoint import folders
from hft_cli.checkpoint.folders import known_weights_hash, model_folder, weights_hash
from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.errors import UserError


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "no checkpoint folder"),
        ("no config", "no config.json"),
        ("an adapter", "holds an adapter and no model: merge it"),
        ("no weights", "no model.safetensors"),
        ("only bin", r"safetensors, only pytorch_model.bin. Convert .*save_pretrained"),
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
    elif fault == "an adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
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


def aged(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass: a file that has just changed is not kept in the cache of hashes."""
    now = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns) + 3 * 10**9
    monkeypatch.setattr("hft_cli.checkpoint.folders.time.time_ns", lambda: now)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that are hashed, with a cache of the test's own."""
    names: list[str] = []
    digest = folders._file_digest
    monkeypatch.setattr(folders, "_file_digest", lambda path: (names.append(path.name), digest(path))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def test_a_file_is_hashed_once_until_it_changes(saved, hashed, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    file = folder / "model.safetensors"
    assert known_weights_hash(folder) == weights_hash(folder)
    assert known_weights_hash(folder) == weights_hash(folder)
    assert len(hashed) == 4  # it has just changed
    aged(file, monkeypatch)
    hashed.clear()
    known = [known_weights_hash(folder) for _ in range(3)]
    assert hashed == ["model.safetensors"]
    content, times = bytearray(file.read_bytes()), file.stat()
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of the inode's change stays
    aged(file, monkeypatch)
    assert known_weights_hash(folder) == weights_hash(folder) != known[0]


@pytest.mark.parametrize("broken", ["", "[]", '{"identity": 3}', '{"identity": null, "sha256": "x"}'])
def test_a_broken_entry_of_the_cache_costs_time_only(broken, saved, hashed, tmp_path, monkeypatch):
    folder = saved("llama")
    aged(folder / "model.safetensors", monkeypatch)
    expected = known_weights_hash(folder)
    (entry,) = (tmp_path / "cache/hft/hashes").iterdir()
    entry.write_text(broken)
    assert known_weights_hash(folder) == expected
    assert len(hashed) == 2
