"""Bits per byte of plain text: every token is scored once, with context, and in windows as without them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import composed, hft
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.config.schema import ModelConfig
from hft_cli.data.files import ANY_HUB
from hft_cli.errors import UserError
from hft_cli.evaluation import texts
from hft_cli.evaluation.suite import read_suite
from hft_cli.evaluation.texts import read_texts, score_texts, windows
from hft_cli.evaluation.workers import load_model
from hft_cli.launch.jobs import Progress
from hft_cli.paths import resolve_path

MODEL = resolve_path("pocket:model")
PASSAGES = resolve_path("pocket:text.jsonl")


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(2, 20))
def test_windows_score_every_token_once_after_its_context(tokens, length):
    parts = list(windows(3, tokens, 0, length))
    scored = [token for part in parts for token in part.tokens[len(part.tokens) - part.scored :]]
    assert scored == tokens
    assert parts[0].tokens[0] == 0
    for part in parts:
        assert len(part.tokens) <= length
        assert part.scored < len(part.tokens)
    for part in parts[1:]:
        assert len(part.tokens) - part.scored == min(length // 2, len(tokens))


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL, ModelConfig())


def score(loaded, documents, tmp_path):
    progress = Progress(tmp_path / "progress.json")
    progress.begin(len(documents))
    return score_texts(loaded, documents, progress)


def test_bits_are_those_of_the_models_own_loss(loaded, tmp_path):
    document = "What is the capital of France? Äh, Paris."
    scores, (item,) = score(loaded, [document], tmp_path)
    tokenizer = loaded.tokenizer
    ids = [tokenizer.eos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits[0, :-1]
    nats = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    assert item["nats"] == pytest.approx(nats, rel=1e-5)
    assert item["bytes"] == len(document.encode()) == len(document) + 1
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / item["bytes"], rel=1e-5)


def test_the_score_is_the_mean_over_documents_of_any_length(loaded, tmp_path, monkeypatch):
    documents = ["Paris.", "What is the capital of France? " * 40]
    scores, items = score(loaded, documents, tmp_path)
    assert scores["bits_per_byte"] == pytest.approx(sum(item["bits_per_byte"] for item in items) / 2)
    monkeypatch.setattr(texts, "HELD_LOGITS", 1)  # one window at a time
    alone, _ = score(loaded, documents, tmp_path)
    assert alone["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-5)
    monkeypatch.setattr(texts, "WINDOW", 16)
    windowed, _ = score(loaded, documents, tmp_path)
    assert windowed["bits_per_byte"] != scores["bits_per_byte"]


def test_texts_are_a_file_or_rows(tmp_path):
    (tmp_path / "a.txt").write_text("Ein Satz.\nNoch einer.", encoding="utf-8")
    assert read_texts(str(tmp_path / "a.txt"), ANY_HUB) == ["Ein Satz.\nNoch einer."]
    assert len(read_texts(PASSAGES, ANY_HUB)) == 12
    for line in Path(PASSAGES).read_text().splitlines():
        assert json.loads(line).keys() == {"text", "source"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "cannot be read as text in UTF-8"),
        ("latin.txt", "ä".encode("latin-1"), "cannot be read as text in UTF-8"),
        ("empty.txt", b" \n", "has an empty text"),
        ("rows.jsonl", b'{"messages": []}\n', "text"),
    ],
)
def test_what_is_no_text_is_refused(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_texts(str(tmp_path / name), ANY_HUB)


def test_a_name_of_a_task_and_a_text_is_refused():
    suite = composed("+method=hft", "suite=pocket", "+suite.text.facts=pocket:text.jsonl").suite
    with pytest.raises(UserError, match=r"suite\.tasks and suite\.text both have facts"):
        read_suite(suite)


def test_a_model_without_a_chat_template_is_scored(tmp_path):
    import shutil

    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ended = hft("eval", "model=local", f"model.path={folder}", "suite=text", f"output_dir={tmp_path / 'eval'}")
    assert ended.status == 0, ended.err
    (record,) = json.loads((tmp_path / "eval/eval/text.json").read_text())["models"].values()
    assert record["eval"]["text"]["public_domain"]["items"] == 12
    assert "bits per byte" in ended.out or "bits_per_byte" in ended.out
