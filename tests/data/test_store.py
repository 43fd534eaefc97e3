"""Rows in the cache are read once, and are the same rows."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from chats import ONE, TWO, chat, chat_of, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from hft_cli.data import rows, store
from hft_cli.data.chats import CHATS, Chat
from hft_cli.data.preferences import PAIRS, Preference
from hft_cli.data.rows import read_chats
from hft_cli.data.store import Rows
from hft_cli.errors import UserError

FULL = chat_of(
    turn("user", "q\u2028\n"),
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"é": None}}}]},
    masked=(1,), prompt_turns=1, prefill=3, tools=({"name": "f"},), options={"enable_thinking": False},
)  # fmt: skip


def stored(folder: Path, chats: list[Chat]) -> Rows[Chat]:
    places = ((f"a.jsonl, line {number}", each) for number, each in enumerate(chats, 1))
    return store.store(folder / "rows", places, CHATS, lambda: {"unused": {"id": 3}})


def write(path: Path, answer: str = "a", rows: int = 1) -> str:
    path.write_text(f'{{"prompt": "q", "answer": "{answer}"}}\n' * rows)
    return str(path)


def test_rows_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    chats = [ONE, TWO, FULL, chat_of(text="raw"), *(chat("q", str(number)) for number in range(2500))]
    kept = stored(tmp_path, chats)
    assert list(kept) == chats
    assert (len(kept), kept[2], kept[-1], kept[1500:1502]) == (2504, FULL, chats[-1], chats[1500:1502])
    assert kept.sha256() == CHATS.sha256(chats)
    assert list(kept.places())[2400] == "a.jsonl, line 2401"
    assert kept.facts[0]["unused"] == {"id": 3}
    assert pickle.loads(pickle.dumps(kept)) == chats


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2499), max_size=20), st.lists(st.integers(0, 9), max_size=20))
def test_a_selection_is_what_a_list_would_give(first: list[int], second: list[int]) -> None:
    chats, others = ([chat("q", f"{name}{number}") for number in range(2500)] for name in "ab")
    folder = Path(os.environ["HF_DATASETS_CACHE"])
    kept, more = stored(folder / "selection/a", chats), stored(folder / "selection/b", others)
    joined = Rows.joined([kept.select(first), more.select(second)])
    expected = [chats[index] for index in first] + [others[index] for index in second]
    assert joined == expected
    assert joined.sha256() == CHATS.sha256(expected)
    if expected:
        assert joined.select([len(expected) - 1]) == expected[-1:]


def test_pairs_come_back_as_they_were() -> None:
    pair = Preference.of([turn("user", "q")], turn("assistant", "yes"), turn("assistant", "no"))
    assert PAIRS.decode(PAIRS.encode(pair)) == pair
    assert PAIRS.canonical(pair) != PAIRS.canonical(Preference(pair.rejected, pair.chosen))
    assert PAIRS.sha256([pair]) == PAIRS.sha256([PAIRS.decode(PAIRS.encode(pair))])


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = rows.read_rows

    def counted(path: str, *args: Any, **options: Any) -> Any:
        reads.append(path)
        yield from original(path, *args, **options)

    monkeypatch.setattr(rows, "read_rows", counted)
    path = write(tmp_path / "a.jsonl")
    assert read_chats(path) == read_chats(path) == [chat("q", "a")]
    assert len(reads) == 1
    assert read_chats(path, max_rows=1) == [chat("q", "a")]
    assert len(reads) == 2
    write(tmp_path / "a.jsonl", "another")
    assert read_chats(path) == [chat("q", "another")]
    assert len(reads) == 3


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", "one"))
    assert read_chats(str(path)) == [chat("q", "one")]
    state = path.stat()
    while path.stat().st_ctime_ns == state.st_ctime_ns:  # times of files have steps
        write(path, "two")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_mtime_ns == state.st_mtime_ns
    assert read_chats(str(path)) == [chat("q", "two")]


def test_what_a_row_has_besides_is_known_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "answer": "a", "source": "x"}\n' * 2)
    for _ in range(2):
        assert read_chats(str(path)).facts[0]["unused"] == {"source": 2}


def test_a_bad_file_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.jsonl", rows=1500)
    with Path(path).open("a") as file:
        file.write("{}\n")
    for _ in range(2):
        with pytest.raises(UserError, match="line 1501"):
            read_chats(path)
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()]


def test_without_a_cache_rows_are_kept_for_this_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    path = write(tmp_path / "a.jsonl")
    rows = list(read_chats(path))
    assert len(rows) == 1
    assert list(read_chats(path)) == rows
    (message,) = caplog.messages  # once
    assert re.match(r"The cache .*file/hft cannot be written \(.*\): .* Set HF_DATASETS_CACHE to a folder", message)
    assert os.environ["HF_DATASETS_CACHE"].startswith(tempfile.gettempdir())
