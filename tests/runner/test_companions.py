"""A trained model says what ends its answers, and keeps its named templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hft_cli.run_dir import RoundDir
from hft_cli.runner.companions import companions

END = {"token": "<|im_end|>", "id": 7}


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def phase(tmp_path: Path) -> RoundDir:
    folder = RoundDir(write(tmp_path / "phase", answer_end=END))
    folder.template.write_text("new")
    return folder


def test_the_end_of_an_answer_is_named_where_generation_looks(phase: RoundDir, tmp_path: Path) -> None:
    settings = {"eos_token": {"content": "</s>"}, "model_max_length": 9}
    base = write(tmp_path / "base", generation_config={"eos_token_id": 2, "top_p": 0.9}, tokenizer_config=settings)
    files = {name: json.loads(text) for name, text in companions(phase, base, False).items()}
    assert files == {
        "generation_config.json": {"eos_token_id": [2, 7], "top_p": 0.9},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "model_max_length": 9},
    }


@pytest.mark.parametrize("known", [7, [2, 7]])
def test_a_model_that_knows_its_end_keeps_its_files(known: Any, phase: RoundDir, tmp_path: Path) -> None:
    settings = {"eos_token": "<|im_end|>", "chat_template": "its own"}
    base = write(tmp_path / "base", generation_config={"eos_token_id": known}, tokenizer_config=settings)
    assert companions(phase, base, False) == {}


def test_the_ids_of_the_config_stay_if_generation_has_none(phase: RoundDir, tmp_path: Path) -> None:
    base = write(tmp_path / "base", config={"eos_token_id": 2}, special_tokens_map={"eos_token": "</s>"})
    files = companions(phase, base, False)
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 7]}
    assert json.loads(files["special_tokens_map.json"]) == {"eos_token": "<|im_end|>"}


def test_a_new_template_leaves_no_old_one_and_named_ones_stay(phase: RoundDir, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "for rag"}]
    settings = {"eos_token": "<|im_end|>", "chat_template": named}
    base = write(tmp_path / "base", generation_config={"eos_token_id": 7}, tokenizer_config=settings)
    files = companions(phase, base, True)
    assert files == {
        "chat_template.jinja": "new",
        "additional_chat_templates/rag.jinja": "for rag",
        "tokenizer_config.json": '{\n  "eos_token": "<|im_end|>"\n}\n',
    }
