"""Values and files that are not what they seem are refused, or read as what they mean, and it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import ONE, chat

from hft_cli.data.rows import Names, read_chats
from hft_cli.errors import UserError

TURNS = '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]'

BAD_LINES = {
    "not a number": ('{"prompt": "q", "answer": NaN}', "NaN is not JSON. Write null"),
    "infinite": ('{"prompt": "q", "answer": "a", "score": -Infinity}', "-Infinity is not JSON"),
    "a key twice": ('{"prompt": "q", "answer": "a", "prompt": "r"}', "the key 'prompt' comes twice in an object."),
    "a key twice in a turn": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "the key 'content' comes twice in an object.",
    ),
    "too deep": ("[" * 100_000, "lists and objects are nested too deeply."),
}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_value_that_json_does_not_have_is_refused(name: str, suffix: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[name]
    file = tmp_path / f"a.{suffix}"
    file.write_text(line)
    with pytest.raises(UserError) as caught:
        read_chats(str(file))
    assert str(caught.value).startswith(f"{file}{', line 1' * (suffix == 'jsonl')}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text", "notices"),
    [
        (5.0, "5", {"whole numbers in 'answer' read without .0": 1}),
        (-3, "-3", {}),
        (0.10000000149011612, "0.1", {"float32 numbers in 'answer' read with the digits that they have": 1}),
        (0.1, "0.1", {}),
        (0.5, "0.5", {}),
        (1e-7, "1e-07", {}),
        (3.14159, "3.14159", {}),
    ],
)
def test_a_number_is_read_as_it_was_meant(value: Any, text: str, notices: dict[str, int], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "q", "answer": value}))
    rows = read_chats(str(file), names=Names())
    assert rows == [chat("q", text)]
    assert rows.facts[0]["notices"] == notices


def test_a_column_with_a_gap_in_a_table_has_whole_numbers(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["q", "r"], "answer": [5.0, 7.0], "input": [None, 2.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read_chats(str(tmp_path / "a.parquet")) == [chat("q", "5"), chat("r\n\n2", "7")]


def test_fields_that_a_table_fills_with_null_are_absent(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [
        {"function": {"name": name, "arguments": arguments}}
        for name, arguments in (("f", {"a": "x"}), ("g", {"b": "y"}))
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": [call]}]}
        for call in calls
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_chats(str(tmp_path / "a.parquet"))
    assert [row.turns[1]["tool_calls"][0]["function"]["arguments"] for row in read] == [{"a": "x"}, {"b": "y"}]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"messages": json.loads(TURNS)}, [ONE]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, [ONE]),
        ({"instruction": "Why?", "output": "Because.", "history": []}, [ONE]),
        ({"data": [{"messages": json.loads(TURNS)}] * 2, "version": 1}, [ONE, ONE]),
    ],
)
def test_an_object_that_is_a_row_is_one_row(document: Any, expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert read_chats(str(tmp_path / "a.json")) == expected


LIKE_TRAIN = ["train_extra.jsonl", "TRAIN2.JSONL", "train2.jsonl", "Train.json", "training.jsonl.gz"]


@pytest.mark.parametrize("name", LIKE_TRAIN)
def test_a_file_like_the_splits_is_not_dropped(name: str, tmp_path: Path) -> None:
    for each in ("train.jsonl", name, "test.jsonl", "README.md"):
        (tmp_path / each).write_text(json.dumps({"messages": json.loads(TURNS)}))
    with pytest.raises(UserError) as caught:
        read_chats(str(tmp_path))
    assert f"holds {name} beside train.jsonl" in str(caught.value)
    (tmp_path / name).unlink()
    assert read_chats(str(tmp_path)) == [ONE]


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "rows.JSONL").write_text(json.dumps({"messages": json.loads(TURNS)}))
    assert read_chats(str(tmp_path)) == read_chats(str(tmp_path / "rows.JSONL")) == [ONE]
