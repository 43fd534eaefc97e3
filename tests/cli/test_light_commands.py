"""The commands that compute with files and plans start without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import BASE, environment
from model_types import tiny_config
from transformers import AutoModelForCausalLM

from hft_cli.checkpoint.parameters import parameters_from_folder

# Raises ImportError for what takes seconds to import.
BLOCKED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "trl", "deepspeed", "datasets", "peft", "accelerate"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Finder())
from hft_cli.cli.main import main
sys.argv = ["hft", *sys.argv[1:]]
main()
"""


def light(*words: object) -> str:
    """The output of a command that may not import torch."""
    command = [sys.executable, "-c", BLOCKED, *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr  # a gate may be closed
    return done.stdout


@pytest.mark.parametrize("model", ["pocket", "llama2_7b", "mixtral_8x7b", "qwen3_8b"])
def test_plans_and_draws_of_models_that_ship_need_no_torch(model):
    assert "Memory of each GPU" in light("plan", "+method=hft", f"model={model}", "rows=100")
    assert "layers.0." in light("draw", model)


def test_a_model_of_any_type_that_was_read_once_needs_no_torch(monkeypatch, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", environment()["XDG_CACHE_HOME"])
    parameters_from_folder(tmp_path)
    assert "h.0." in light("draw", tmp_path)
    assert "Memory of each GPU" in light("plan", "+method=hft", f"model.path={tmp_path}", "rows=100")


def test_commands_on_a_run_need_no_torch(hft_run, tmp_path):
    assert "verified: 1 round" in light("verify", hft_run)
    assert "updated in" in light("show", "draws", hft_run)
    assert "verified" in light("verify", BASE, hft_run / "model", "--draw", hft_run / "draws.json")
    light("materialize", hft_run, "--out", tmp_path / "model")
    light("publish", hft_run, "--out", tmp_path / "delta")
    light("materialize", tmp_path / "delta", "--base", "pocket:model", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()
    light("report", hft_run, "--out", tmp_path / "report")
    light("gate", hft_run, "--max-loss", 2)
    assert "KEY=VALUE" in light("train", "--help") + light("--help")
