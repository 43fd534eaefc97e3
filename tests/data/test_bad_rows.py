"""All bad rows are named in one go, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import CHATML, chat, tokenizer_of

from hft_cli.data import preparation
from hft_cli.data.pairs import prepare_pairs
from hft_cli.data.preferences import read_preferences
from hft_cli.data.rows import Names, read_chats
from hft_cli.data.tokenization import tokenize
from hft_cli.errors import UserError

GOOD = {"prompt": "q", "answer": "a"}
CALLS = [{"function": {"name": "f", "arguments": "{}"}}]
UNRENDERED = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": CALLS}]
}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def skip() -> Names:
    return Names(bad_rows="skip")


def test_every_bad_row_is_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "{not JSON", {"prompt": "q", "answer": ""}, "[1]", GOOD)
    with pytest.raises(UserError) as caught:
        read_chats(path)
    first, *others = str(caught.value).splitlines()
    assert first == f"3 of 5 rows of {path} are bad. Mend them, or leave them out with data.bad_rows=skip:"
    assert [line.partition(": ")[0] for line in others] == [f"  {path}, line {number}" for number in (2, 3, 4)]


def test_skipped_rows_are_left_out_and_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "{not JSON", {"prompt": "q", "answer": ""}, UNRENDERED, GOOD)
    for _ in range(2):  # the second time from the cache
        rows = read_chats(path, names=skip())
        assert len(rows) == 3
        result = tokenize(rows, tokenizer_of(template=CHATML), max_length=99, bad_rows="skip")
        assert (len(result.dataset), result.summary.rows, result.summary.used) == (2, 5, 2)
        assert result.summary.dropped == {"bad": 3}
        assert [place for place, _ in result.summary.bad] == [f"{path}, line {number}" for number in (2, 3, 4)]
        assert "leaves out 'tool_calls'" in result.summary.bad[2][1]
        with pytest.raises(UserError, match=r"^.*a\.jsonl, line 4: the chat template leaves out 'tool_calls'"):
            tokenize(rows, tokenizer_of(template=CHATML), max_length=99)


@pytest.mark.parametrize("parallel", [False, True])
def test_rows_that_the_template_refuses_are_listed_in_order(
    parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PARALLEL", 100 if parallel else 10_000)
    lines = [UNRENDERED if number % 700 == 5 else GOOD for number in range(2500)]
    rows = read_chats(write(tmp_path / "a.jsonl", *lines))
    with pytest.raises(UserError) as caught:
        tokenize(rows, tokenizer_of(template=CHATML), max_length=99, where="a.jsonl")
    first, *others = str(caught.value).splitlines()
    assert first.startswith("4 of 2,500 rows of a.jsonl are bad.")
    assert [line.partition("line ")[2].partition(":")[0] for line in others] == ["6", "706", "1406", "2106"]
    assert len(tokenize(rows, tokenizer_of(template=CHATML), max_length=99, bad_rows="skip").dataset) == 2496


def test_pairs_are_skipped_as_well(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    call = {"role": "assistant", "content": "a", "tool_calls": CALLS}
    path = write(tmp_path / "a.jsonl", pair, {"prompt": "q", "chosen": "a"}, {**pair, "rejected": [call]}, pair)
    preferences = read_preferences(path, names=skip())
    result = prepare_pairs(preferences.rows, tokenizer_of(template=CHATML), 99, "x", "skip")
    assert (len(result.dataset), result.summary.rows, result.summary.dropped) == (2, 4, {"bad": 2})
    with pytest.raises(UserError, match="no 'rejected'"):
        read_preferences(path)


def test_nothing_but_bad_rows_stops_in_any_case(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "[1]", "[2]")
    with pytest.raises(UserError, match=r"line 1: not an object but a list\. All 2 rows of .*a\.jsonl are bad\.$"):
        read_chats(path, names=skip())
    with pytest.raises(UserError, match="tool_calls"):
        tokenize(
            read_chats(write(tmp_path / "b.jsonl", UNRENDERED)),
            tokenizer_of(template=CHATML), max_length=99, bad_rows="skip",
        )  # fmt: skip


def test_a_template_that_is_wrong_is_not_a_bad_row() -> None:
    with pytest.raises(UserError, match=r"^The chat template writes nothing after an answer"):
        tokenize(
            [chat("q", "a")] * 3,
            tokenizer_of(template="{% for m in messages %}{{ m.role + m.content }}{% endfor %}"),
            max_length=99, bad_rows="skip",
        )  # fmt: skip
