"""The embedded model and data are what the README says of them. That the model recalls its facts, test_run shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hft_cli.checkpoint.parameters import parameters_from_folder
from hft_cli.data.rows import read_chats
from hft_cli.paths import resolve_path

POCKET = Path(resolve_path("pocket:"))
SKILLS = sorted(path.name for path in (POCKET / "skills").iterdir())


def test_all_of_it_is_under_3_megabytes_and_the_model_under_a_million_parameters():
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) < 3_000_000
    assert sum(param.elements for param in parameters_from_folder(POCKET / "model")) < 1_000_000


def test_there_are_900_facts_or_more_each_asked_once_with_a_source():
    facts = read_chats(str(POCKET / "facts.jsonl"))
    assert len(facts) >= 900
    assert len({chat[0]["content"] for chat in facts}) == len(facts)
    source = (POCKET / "SOURCE.md").read_text()
    relations = {json.loads(line)["relation"] for line in (POCKET / "facts.jsonl").read_text().splitlines()}
    assert all(f"| {relation} |" in source for relation in relations)
    assert "CC BY 4.0" in source


@pytest.mark.parametrize("skill", SKILLS)
def test_a_skills_test_questions_are_not_among_those_trained_on(skill):
    train, test = (read_chats(str(POCKET / f"skills/{skill}/{part}.jsonl")) for part in ("train", "test"))
    assert len(train) >= 1000
    assert len(test) >= 100
    assert not {chat[0]["content"] for chat in train} & {chat[0]["content"] for chat in test}


def test_the_skills_come_in_several_shapes():
    keys = {tuple(json.loads((POCKET / f"skills/{s}/test.jsonl").read_text().splitlines()[0])) for s in SKILLS}
    assert keys == {("messages",), ("prompt", "answer"), ("prompt", "completion")}
