"""Runs that cannot start or go wrong: the exit status, what is said, and what is left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import BASE, QUICK, hft
from safetensors.torch import load_file, save_file


def test_a_diverged_run_stops_and_says_so(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", "train.learning_rate=1e20",
                "train.max_steps=30")  # fmt: skip
    assert ended.status == 2
    assert re.search(r"The loss is nan at step \d+: training has diverged\. Lower train\.learning_rate", ended.err)
    assert not (tmp_path / "run/DONE").exists()


def test_a_run_that_diverges_between_two_logs_is_not_done(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", "train.learning_rate=1e20",
                "train.max_steps=9", "train.log_every=10")  # fmt: skip
    assert ended.status == 2
    assert "The loss of a step is not finite: training has diverged. Lower train.learning_rate=1e+20" in ended.err
    assert not (tmp_path / "run/DONE").exists()
    assert not list(tmp_path.glob("run/rounds/*/outcome.json"))


def test_weights_that_the_files_cannot_hold_are_no_model(tmp_path):
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    halves = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(halves, base / "model.safetensors", {"format": "pt"})
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", f"model.path={base}", "train.warmup=0",
                "train.learning_rate=1e6", "train.max_steps=1")  # fmt: skip
    assert ended.status == 2, ended.err
    assert re.search(r"[\w.]+ has values that F16 has no number for: training has diverged", ended.err)
    assert not (tmp_path / "run/model").exists()


def test_a_file_of_the_user_is_not_taken_for_a_part_of_a_run(tmp_path):
    (tmp_path / "movie.mkv.part").write_text("half a film")
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}", "train.max_length=3")
    assert ended.status == 2
    assert "has other files in it (movie.mkv.part)" in ended.err
    assert (tmp_path / "movie.mkv.part").exists()


def test_a_start_that_was_cut_off_is_begun_anew(tmp_path):
    (tmp_path / "plan.json.123.part").write_text('{"ba')
    (tmp_path / "draws.json").write_text("{}")
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}", "train.max_steps=1")
    assert ended.status == 0, ended.err
    assert not list(tmp_path.rglob("*.part"))


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}")
    assert ended.status == 2
    assert "has other files in it (thesis.tex)" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_mistake_that_only_the_worker_sees_leaves_no_run(tmp_path):
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", "train.max_length=3")
    assert ended.status == 2
    assert "Raise train.max_length" in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def _small_vocabulary(model: Path) -> None:
    """As if the tokenizer were that of another model."""
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    change_json(model / "config.json", vocab_size=200)


def _no_end(model: Path) -> None:
    change_json(model / "tokenizer_config.json", eos_token=None, pad_token=None)


def change_json(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [(_small_vocabulary, "has 200 tokens (vocab_size"), (_no_end, "neither a pad nor an end-of-sequence token")],
)
def test_a_tokenizer_that_does_not_fit_leaves_no_run(harm, said, tmp_path):
    harm(Path(shutil.copytree(BASE, tmp_path / "model")))
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", f"model.path={tmp_path}/model")
    assert ended.status == 2
    assert said in ended.err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_worker_that_fails_gives_status_1_and_names_its_log(tmp_path):
    broken = Path(shutil.copytree(BASE, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    ended = hft("train", *QUICK, "+method=hft", f"output_dir={tmp_path}/run", f"model.path={broken}")
    assert ended.status == 1
    assert "no such function" in ended.err
    assert "The whole log: " in ended.err
    assert not (tmp_path / "run/DONE").exists()
