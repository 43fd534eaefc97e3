"""Rows of every shape become chats, and a bad row is named with its fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chats import ONE, TWO, chat, chat_of, turn
from hypothesis import given
from hypothesis import strategies as st

from hft_cli.data.chats import CHATS, Chat, canonical
from hft_cli.data.rows import READERS, count_repeats, each_answer, read_chats
from hft_cli.data.turns import Names
from hft_cli.errors import UserError

PAIR = chat_of(*ONE.turns, prompt_turns=1)

ROWS: dict[str, tuple[dict[str, Any], Chat]] = {
    "messages": ({"dataset": "x", "id": "7", "messages": TWO.turns}, TWO),
    "messages, further keys in a turn": ({"messages": [{**turn, "weight": None} for turn in ONE.turns]}, ONE),
    "prompt_completion": ({"prompt": "Why?", "completion": "Because."}, PAIR),
    "prompt_completion, as lists": ({"prompt": ONE.turns[:1], "completion": ONE.turns[1:]}, PAIR),
    "alpaca": ({"instruction": "Why?", "input": "", "output": "Because."}, ONE),
    "alpaca, no input": ({"instruction": "Why?", "input": None, "output": "Because."}, ONE),
    "alpaca, input": ({"instruction": "Why", "input": "it?", "output": "Because."}, chat("Why\n\nit?", "Because.")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, ONE),
    "sharegpt, other names": (
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TWO.turns]},
        TWO,
    ),
    "trace": ({"prompt": "Why?", "answer": "Because."}, ONE),
    "orca": ({"question": "Why?", "response": "Because."}, ONE),
    "orca, system": (
        {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        chat("Why?", "Because.", system="Be brief."),
    ),
    "text": ({"text": "Because it is."}, chat_of(text="Because it is.")),
    "messages rather than trace": ({"prompt": "p", "answer": "a", "messages": ONE.turns}, ONE),
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_is_known_from_its_keys(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    assert read_chats(write(tmp_path / "a.jsonl", [row, row])) == [expected, expected]


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_can_be_said(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    assert read_chats(write(tmp_path / "a.jsonl", [row]), format=name.split()[0].strip(",")) == [expected]


def test_every_shape_has_a_row_above() -> None:
    assert {name.split(",")[0].split()[0] for name in ROWS} == set(READERS)


def test_a_said_shape_wins_over_the_keys(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "answer": "Because.", "messages": TWO.turns}
    assert read_chats(write(tmp_path / "a.jsonl", [row]), format="trace") == [ONE]


def test_the_hash_tells_order_roles_and_text_apart() -> None:
    others = [[ONE, TWO], [TWO, ONE], [ONE], [ONE, ONE], [chat("Why?Because.", "")], [chat("é", "Because.")]]
    assert len({CHATS.sha256(chats) for chats in others}) == len(others)


def repeats(train: list[Chat], test: list[Chat]) -> tuple[int, int]:
    return count_repeats(*(map(canonical, chats) for chats in (train, test)))


def test_the_hash_tells_prompts_apart_only_where_it_matters() -> None:
    assert CHATS.sha256([PAIR]) == CHATS.sha256([ONE])
    four = chat("q", "a", "q", "b").turns
    chats = [
        chat_of(*four),
        chat_of(*four, prompt_turns=3),
        chat_of(*four, prompt_turns=1),
        chat_of(*four, masked=(1,)),
    ]
    assert len({CHATS.sha256([each]) for each in chats}) == 4


def test_repeated_rows_and_rows_of_the_test_set_are_counted() -> None:
    others = [
        chat_of(turn("user", "Why?"), turn("system", "x"), ONE.turns[1]),
        chat("Why?", "Because. "),
        chat("Why?Because.", "x"),
    ]
    assert repeats([ONE, *others], []) == (0, 0)
    assert repeats([ONE, TWO, chat_of(*(dict(turn) for turn in ONE.turns)), ONE], [TWO]) == (2, 1)
    assert repeats([ONE, TWO, ONE], [chat("Why?", "Because."), *others, ONE]) == (1, 2)
    assert repeats([], [ONE]) == (0, 0)


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_repeats_are_what_a_search_finds(train: list[int], test: list[int]) -> None:
    earlier = sum(number in train[:place] for place, number in enumerate(train))
    both = sum(number in test for number in train)
    rows = [[chat("q", str(number)) for number in numbers] for numbers in (train, test)]
    assert repeats(*rows) == (earlier, both)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "a string": ("Why?", "not an object but a string."),
    "a list": ([1], "not an object but a list."),
    "a key missing": ({"prompt": "p"}, "no 'messages', which the shape 'messages' needs (keys found: prompt)."),
    "no list": ({"messages": 3}, "'messages' is a number, not a list of turns."),
    "null": ({"messages": None}, "'messages' is null, which the shape 'messages' needs (keys found: none)."),
    "an empty list": ({"messages": []}, "'messages' is empty, not a list of turns."),
    "a turn that is text": ({"messages": ["hi"]}, "turn 1 of 'messages' is a string, not an object."),
    "a turn without content": (
        {"messages": [{"role": "user"}]},
        "turn 1 of 'messages' has no 'content' (keys found: role)",
    ),
    "content in parts": (
        {"messages": [turn("user", [{"type": "image_url"}])]},
        "'content' in turn 1 of 'messages' has a part of type 'image_url'; only parts of text",
    ),
    "content a number": (
        {"messages": [turn("user", 3)]},
        "'content' in turn 1 of 'messages' is a number, not a string.",
    ),
    "a role unknown": (
        {"messages": [ONE.turns[0], turn("asistant", "x")]},
        "Unknown role in turn 2 of 'messages': 'asistant'. Did you mean 'assistant'?",
    ),
    "a tool at the end": (
        {"messages": [*ONE.turns, turn("tool", "x")]},
        "the last turn is the tool's, not the assistant's.",
    ),
    "no assistant": ({"messages": ONE.turns[:1]}, "no assistant turn, so nothing to learn."),
    "an empty answer": ({"messages": chat("q", " \n").turns}, "turn 2: the assistant's answer is empty."),
    "a user at the end": ({"messages": chat("q", "a", "q").turns}, "the last turn is the user's, not the assistant's."),
    "an answer at the start": ({"messages": [turn("assistant", "a")]}, "the first turn is the assistant's"),
    "half a surrogate": ({"messages": chat("q", "a\ud83d").turns}, "turn 2: half a surrogate pair at character 1."),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line_and_its_fault(name: str, tmp_path: Path) -> None:
    row, reason = BAD_ROWS[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ONE.turns}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        read_chats(str(path))
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert "\n" not in str(caught.value)


def test_an_unknown_shape_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_chats(write(tmp_path / "a.jsonl", [{"query": "q", "answer": "a"}]))
    assert "line 1: unknown shape (keys found: query, answer). Known: messages (messages), " in str(caught.value)
    assert all(shape in str(caught.value) for shape in READERS)


def test_a_misspelt_format_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown data\.format 'alpca'\. Did you mean 'alpaca'\?"):
        read_chats("x.jsonl", format="alpca")


def test_importing_the_package_imports_no_heavy_module() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "trl", "jinja2", "numpy")
    code = f"import sys, hft_cli.data.tokenization; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_names_of_columns_and_roles_are_given(tmp_path: Path) -> None:
    row = {"dialog": [{"who": "Alice", "says": "Why?"}, {"who": "BOT", "says": "Because."}]}
    path = write(tmp_path / "a.jsonl", [row])
    columns = {"messages": "dialog", "role": "who", "content": "says"}
    assert read_chats(path, names=Names(columns, {"Alice": "user"})) == [ONE]
    with pytest.raises(UserError, match=r"Unknown role in turn 1 .* Another name: data\.roles\.Alice=user\|assistant"):
        read_chats(path, names=Names(columns))
    with pytest.raises(UserError, match=r"Unknown key of data\.columns: 'mesages'\. Did you mean 'messages'"):
        Names({"mesages": "dialog"})
    with pytest.raises(UserError, match=r"role in data\.roles for Alice: 'usr'\. Did you mean 'user'"):
        Names({}, {"Alice": "usr"})
    with pytest.raises(UserError, match=r"data\.columns\.system=sys: no row and no turn has 'sys'"):
        read_chats(write(tmp_path / "b.jsonl", [{"prompt": "q", "answer": "a"}]), names=Names({"system": "sys"}))


def test_a_prompt_that_quotes_a_dialogue_is_one_turn(tmp_path: Path) -> None:
    quoting = "Human: q\n\nAssistant: a\n\nIs it safe?"
    dialogue = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    rows = [{"prompt": text, "completion": "yes"} for text in (quoting, dialogue)]
    chats = read_chats(write(tmp_path / "a.jsonl", rows))
    assert chats[0].turns == (turn("user", quoting), turn("assistant", "yes"))
    assert [each["role"] for each in chats[1].turns] == ["user", "assistant"] * 2
    assert chats.facts[0]["notices"] == {"'prompt' that quotes 'Human:' and 'Assistant:' read as one turn": 1}


def test_an_alpaca_row_without_an_instruction_is_its_input(tmp_path: Path) -> None:
    (each,) = read_chats(write(tmp_path / "a.jsonl", [{"instruction": "", "input": "q", "output": "a"}]))
    assert each.turns == (turn("user", "q"), turn("assistant", "a"))


def test_each_answer_is_the_end_of_a_row(tmp_path: Path) -> None:
    turns = [turn("user", "q1"), {**turn("assistant", "a1"), "weight": 0}, turn("user", "q2"), turn("assistant", "a2"),
             turn("user", "q3"), turn("assistant", "a3")]  # fmt: skip
    prompt = {"prompt": turns[:2] + turns[2:3] + [turn("assistant", "be")], "completion": [turn("assistant", "gin"),
              *turns[4:]]}  # fmt: skip
    path = write(tmp_path / "a.jsonl", [{"messages": turns}, prompt])
    rows = each_answer(read_chats(path))
    assert list(rows.places()) == [
        f"{path}, line 1, turn 4", f"{path}, line 1, turn 6", f"{path}, line 2, turn 4", f"{path}, line 2, turn 6",
    ]  # fmt: skip
    ends = [(len(chat.turns), chat.turns[-1]["content"], chat.trained("last_turn"), chat.prefill) for chat in rows]
    assert ends == [(4, "a2", (3,), 0), (6, "a3", (5,), 0), (4, "begin", (3,), 2), (6, "a3", (5,), 0)]
    assert rows.facts[0]["shapes"] == {"messages": 1, "prompt_completion": 1}
    assert each_answer(read_chats(path)) == rows
    text = read_chats(write(tmp_path / "text.jsonl", [{"text": "raw"}]))
    assert each_answer(text) == text
