"""The embedded model and data: size, facts, skills. Whether the model recalls its facts is a test of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.data.rows import read_chats
from hft_cli.paths import resolve_path

POCKET = Path(resolve_path("pocket:"))
SKILLS = sorted(path.name for path in (POCKET / "skills").iterdir())


def test_the_files_and_the_model_are_small():
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) < 3_000_000
    assert sum(param.elements for param in parameters_from_folder(POCKET / "model")) < 1_000_000


def test_each_fact_is_asked_once_and_has_a_source():
    facts = read_chats(str(POCKET / "facts.jsonl"))
    assert len(facts) >= 900
    assert len({chat.turns[0]["content"] for chat in facts}) == len(facts)
    source = (POCKET / "SOURCE.md").read_text()
    relations = {json.loads(line)["relation"] for line in (POCKET / "facts.jsonl").read_text().splitlines()}
    assert all(f"| {relation} |" in source for relation in relations)
    assert "CC BY 4.0" in source


@pytest.mark.parametrize("skill", SKILLS)
def test_no_test_question_of_a_skill_is_trained_on(skill):
    train, test = (read_chats(str(POCKET / f"skills/{skill}/{part}.jsonl")) for part in ("train", "test"))
    assert len(train) >= 1000
    assert len(test) >= 100
    assert not {chat.turns[0]["content"] for chat in train} & {chat.turns[0]["content"] for chat in test}


def test_the_skills_have_three_shapes():
    keys = {tuple(json.loads((POCKET / f"skills/{s}/test.jsonl").read_text().splitlines()[0])) for s in SKILLS}
    assert keys == {("messages",), ("prompt", "answer"), ("prompt", "completion")}
