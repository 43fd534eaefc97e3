"""Preference data: every shape gives the same rows, what is left out is counted, and mistakes name their row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hft_cli.data.preferences import PAIRS, Preference, Preferences, read_preferences
from hft_cli.errors import UserError


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ONE = {"prompt": [user("Why?")], "chosen": [assistant("Because.")], "rejected": [assistant("No.")]}
LONG = {"prompt": [SYSTEM, user("Why?"), assistant("Because."), user("Why so?")], **{k: ONE[k] for k in list(ONE)[1:]}}
PAIR, LONG_PAIR = (
    Preference.of(row["prompt"], row["chosen"][0], row["rejected"][0])  # type: ignore[arg-type]
    for row in (ONE, LONG)
)
TEXT = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
CHATS = {key: ONE["prompt"] + ONE[key] for key in ("chosen", "rejected")}

SHAPES: dict[str, tuple[dict[str, Any], Preference]] = {
    "text": (TEXT, PAIR),
    "turns": (ONE, PAIR),
    "turns of a longer chat": (LONG, LONG_PAIR),
    "a prompt as text, answers as turns": ({**ONE, "prompt": "Why?"}, PAIR),
    "an answer as text, the other as turns": ({**ONE, "chosen": "Because."}, PAIR),
    "UltraFeedback": ({"prompt": "Why?", "prompt_id": "7", "messages": [], **CHATS, "score_chosen": 8.0}, PAIR),
    "UltraFeedback, a blank more in the prompt": ({"prompt": "Why? ", **CHATS}, PAIR),
    "whole chats, no prompt": (CHATS, PAIR),
    "whole chats, the prompt is null": ({"prompt": None, **CHATS}, PAIR),
    "whole longer chats, the prompt is their last question": (
        {"prompt": "Why so?", **{key: LONG["prompt"] + LONG[key] for key in ("chosen", "rejected")}},
        LONG_PAIR,
    ),
}


def read(tmp_path: Path, *rows: Any, **options: Any) -> Preferences:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(str(file), **options)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_known_from_the_row(name: str, tmp_path: Path) -> None:
    row, expected = SHAPES[name]
    found = read(tmp_path, row)
    assert found.rows == [expected]
    assert sum(found.left_out.values()) == 0


def test_shapes_may_be_mixed_and_have_one_hash(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT, CHATS).rows == [PAIR, PAIR]
    assert PAIRS.sha256(read(tmp_path, TEXT).rows) == PAIRS.sha256(read(tmp_path, CHATS).rows)


def test_the_hash_tells_the_answers_and_the_order_apart() -> None:
    swapped = Preference(PAIR.rejected, PAIR.chosen)
    others = [[PAIR], [swapped], [PAIR, swapped], [swapped, PAIR], [LONG_PAIR], []]
    assert len({PAIRS.sha256(rows) for rows in others}) == len(others)


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    same, blank = {**TEXT, "rejected": " Because.\n"}, {**TEXT, "chosen": " "}
    empty_turn = {"chosen": CHATS["chosen"], "rejected": [user("Why?"), assistant("")]}
    found = read(tmp_path, same, TEXT, blank, empty_turn)
    assert found.rows == [PAIR]
    assert found.left_out == {"equal answers": 1, "empty answer": 2, "tied scores": 0}


@pytest.mark.parametrize(("ties", "rows"), [("keep", 2), ("drop", 1)])
def test_ties_are_kept_or_left_out(ties: str, rows: int, tmp_path: Path) -> None:
    tied, clear = ({**TEXT, "score_chosen": 7, "score_rejected": score} for score in (7.0, 3.0))
    found = read(tmp_path, tied, clear, ties=ties)
    assert (len(found.rows), found.left_out["tied scores"]) == (rows, 2 - rows)


def test_max_rows_counts_what_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, {**TEXT, "chosen": ""}, TEXT, "not read", max_rows=2)
    assert found.rows == [PAIR]


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    for split, row in (("train_prefs", TEXT), ("test_prefs", LONG)):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    assert read_preferences(str(tmp_path), split="test_prefs").rows == [LONG_PAIR]


BAD: list[tuple[Any, str]] = [
    ("text", "not an object but a string."),
    ({"prompt": "Why?", "completion": "Because."}, "no 'chosen': preferences are rows of 'chosen' and 'rejected', "),
    ({"prompt": "Why?", "chosen": "Because."}, "no 'rejected': "),
    ({"chosen": "Because.", "rejected": "No."}, "no 'prompt', and 'chosen' is only an answer."),
    ({**TEXT, "prompt": True}, "'prompt' is a boolean, not a list of turns."),
    ({**TEXT, "prompt": []}, "'prompt' is empty, not a list of turns."),
    ({**TEXT, "rejected": None}, "'rejected' is null, not a list of turns."),
    ({**ONE, "chosen": [{"role": "assistant"}]}, "turn 1 of 'chosen' has no 'content' (keys found: role)."),
    ({**ONE, "chosen": [{"role": "asistant", "content": "x"}]}, "Did you mean 'assistant'?"),
    ({**ONE, "chosen": [user("x")]}, "'chosen' is a chat that does not hold the 'prompt' before its last turn."),
    ({**CHATS, "prompt": "What?"}, "'chosen' is a chat that does not hold the 'prompt' before its last turn."),
    ({**CHATS, "rejected": [user("What?"), assistant("No.")]}, "'chosen' and 'rejected' differ before their last turn"),
    ({**CHATS, "rejected": CHATS["chosen"] + [user("Ah")]}, "'rejected': the last turn is the user's, not"),
    ({**TEXT, "prompt": [assistant("Hi")]}, "'chosen': the first turn is the assistant's"),
    ({**TEXT, "rejected": "\ud800"}, "'rejected': turn 2: half a surrogate pair at character 0."),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_one_line_with_file_line_and_reason(row: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, TEXT, row)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert reason in said
    assert "\n" not in said


@pytest.mark.parametrize("scores", [{}, {"score_chosen": 7}, {"score_chosen": 7, "score_rejected": None}])
def test_ties_cannot_be_dropped_without_scores(scores: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: dpo\.ties=drop needs a number as 'score_"):
        read(tmp_path, {**TEXT, **scores}, ties="drop")


def test_nothing_left_is_a_mistake_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"All 3 rows of .* \(2 with equal answers, 1 with empty answer\): nothing to"):
        read(tmp_path, {**TEXT, "rejected": "Because."}, {**TEXT, "chosen": ""}, {**TEXT, "rejected": "Because."})
    with pytest.raises(UserError, match="No rows in"):
        read(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'drop'"):
        read(tmp_path, TEXT, ties="drops")
