"""Preparation on several processes and from the cache gives the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, chat, tokenizer_of, trained_text

from hft_cli.data import preparation, tokenization
from hft_cli.data.chats import Chat
from hft_cli.data.rows import read_chats
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError

CHATS = [chat(f"q{number}", f"a{number}", "and?", "the cat " * (number % 7) + "no") for number in range(2300)]


def write(path: Path, chats: list[Chat]) -> str:
    path.write_text("".join(json.dumps({"messages": each.turns}) + "\n" for each in chats))
    return str(path)


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each batch that is tokenized in this process."""
    sizes: list[int] = []
    original = tokenization.tokenize_chats

    def counted(chats: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(chats))
        return original(chats, *args, **options)

    monkeypatch.setattr(tokenization, "tokenize_chats", counted)
    return sizes


@pytest.mark.parametrize("parallel", [False, True])
def test_rows_of_a_file_have_the_tokens_of_a_list(
    parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PARALLEL", 100 if parallel else 10_000)
    tokenizer = tokenizer_of(template=CHATML)
    path = write(tmp_path / "a.jsonl", CHATS)
    of_file, of_list = (tokenize(rows, tokenizer, max_length=74) for rows in (read_chats(path), CHATS))
    assert of_file.dataset[:] == of_list.dataset[:]
    assert of_file.summary == replace(of_list.summary, shapes={"messages": 2300})
    assert 0 < of_file.summary.truncated < of_file.summary.used


def test_the_same_rows_and_settings_are_tokenized_once(tmp_path: Path, works: list[int]) -> None:
    tokenizer = tokenizer_of(template=CHATML)
    paths = [write(tmp_path / name, CHATS[:50]) for name in ("a.jsonl", "b.jsonl")]
    for path in (*paths, *paths):
        result = tokenize(read_chats(path), tokenizer, max_length=100)
        assert trained_text(tokenizer, result.dataset[1]["labels"]) == "a1<|im_end|>the cat no<|im_end|>"
    assert works == [50]


def test_another_setting_or_template_is_another_entry(tmp_path: Path, works: list[int]) -> None:
    rows = read_chats(write(tmp_path / "a.jsonl", CHATS[:50]))
    texts = set()
    for template, options in (
        (CHATML, {}), (CHATML, {"loss": "last_turn"}), ("tulu", {}), (CHATML, {"long_prompts": "cut"}),
    ):  # fmt: skip
        tokenizer = tokenizer_of(template=template)
        labels = tokenize(rows, tokenizer, max_length=99, **options).dataset[1]["labels"]
        texts.add(trained_text(tokenizer, labels))
    tokenize(rows, tokenizer_of("bos", CHATML), max_length=99)
    tokenize(rows.select([1, 2]), tokenizer_of(template=CHATML), max_length=99)
    assert works == [50, 50, 50, 50, 50, 2]
    assert len(texts) == 3


def test_a_bad_row_in_another_process_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "PARALLEL", 100)
    chats = [*CHATS[:2200], chat("stop", "x")]
    template = "{% if messages[0].content == 'stop' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    path = write(tmp_path / "a.jsonl", chats)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2201: the chat template fails: no$"):
        tokenize(read_chats(path), tokenizer_of(template=template), max_length=99)
