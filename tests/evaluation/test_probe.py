"""The knowledge probe: which facts, paraphrases, examples and wrong answers its queries have."""

from __future__ import annotations

import json

import pytest

from hft_cli.config.suites import ProbeConfig
from hft_cli.errors import UserError
from hft_cli.evaluation.probe import (
    build_queries,
    probe_settings,
    prompt_and_separator,
    read_relations,
    with_other_subjects,
)

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi",
    "Ghana": "Accra", "Japan": "Tokyo", "Cuba": "Havana", "Iran": "Tehran", "Iraq": "Baghdad", "Egypt": "Cairo",
    "Mali": "Bamako", "Chad": "Ndjamena",
}  # fmt: skip
FACTS = [
    *({"relation": "capital", "sub": sub, "obj": obj} for sub, obj in CAPITALS.items()),
    {"relation": "capital", "sub": "Bolivia", "obj": "Sucre"},
    {"relation": "capital", "sub": "Bolivia", "obj": "Paz"},
    {"relation": "capital", "sub": "Nowhere", "obj": "Limassol"},
    {"relation": "part", "sub": "wheel", "obj": "car"},
]
PATTERNS = [
    {"relation": "capital", "pattern": "The capital of [X] is [Y]."},
    {"relation": "capital", "pattern": "[X], whose capital is [Y] ."},
    {"relation": "capital", "pattern": "[Y] is the capital of [X]."},
    {"relation": "part", "pattern": "[Y] has [X] as a part."},
]


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> ProbeConfig:
    folder = tmp_path_factory.mktemp("data") / "pararel"
    folder.mkdir()
    for name, rows in (("facts", FACTS), ("patterns", PATTERNS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ProbeConfig(facts=str(folder / "facts.jsonl"), patterns=str(folder / "patterns.jsonl"))


def test_only_patterns_that_end_in_the_object_are_used(probe):
    assert {relation: len(patterns) for relation, (_, patterns) in read_relations(probe).items()} == {"capital": 2}


def test_a_fact_is_ranked_with_nine_wrong_answers(probe):
    queries = build_queries(probe, seed=1)
    assert len(queries) == 17 * 2
    objects = {row["obj"] for row in FACTS if row["relation"] == "capital"}
    for query in queries:
        assert len(set(query.answers)) == 10
        assert query.answers[0] == query.fact.answer
        assert set(query.answers) <= objects


def test_no_wrong_answer_is_correct_or_a_prefix_of_a_correct_one(probe):
    for query in build_queries(probe, seed=1):
        if query.fact.subject == "Bolivia":
            assert not {"Sucre", "Paz"} & set(query.answers[1:])
        if query.fact.answer in ("Lima", "Limassol"):
            assert not {"Lima", "Limassol"} & set(query.answers[1:])


def test_examples_contain_neither_the_subject_nor_ranked_answers(probe):
    for query in build_queries(probe, seed=1):
        assert len(query.examples) == 4
        assert query.fact.subject not in {example.subject for example in query.examples}
        assert not {example.answer for example in query.examples} & set(query.answers)


def test_queries_depend_on_the_seed_only(probe):
    assert build_queries(probe, seed=1) == build_queries(probe, seed=1)
    assert build_queries(probe, seed=1) != build_queries(probe, seed=2)
    limited = build_queries(probe, seed=1, limit=3)
    assert len({query.fact for query in limited}) == 3
    assert set(limited) <= set(build_queries(probe, seed=1))


def test_the_prompt_ends_before_the_object_after_whole_examples(probe):
    query = next(query for query in build_queries(probe, seed=1) if query.pattern == "[X], whose capital is [Y] .")
    prompt, separator = prompt_and_separator(query, None)
    *examples, last = prompt.split("\n")
    assert len(examples) == 4
    assert all(line.endswith(" .") for line in examples)
    assert last == f"{query.fact.subject}, whose capital is"
    assert separator == " "


def test_a_row_without_an_object_is_refused_with_its_line(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"relation": "capital", "sub": "France"}\n')
    with pytest.raises(UserError, match="line 1: a fact has relation, sub and obj"):
        read_relations(ProbeConfig(facts=str(tmp_path / "facts.jsonl")))


def test_a_missing_file_is_refused_and_without_data_dir_left_out(tmp_path):
    values = {"facts": "pararel/facts.jsonl", "patterns": "pararel/patterns.jsonl"}
    assert probe_settings("pararel", values, None) is None
    with pytest.raises(UserError, match="there is no file"):
        probe_settings("pararel", values, tmp_path)


def test_the_commonest_object_of_a_relation_is_a_level(tmp_path):
    facts = [("a", "Rome"), ("b", "Rome"), ("c", "Oslo"), ("d", "Bern"), ("e", "Bern"), ("f", "Kyiv")]
    lines = (json.dumps({"relation": "r", "sub": subject, "obj": answer}) for subject, answer in facts)
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    queries = build_queries(ProbeConfig(facts=str(tmp_path / "facts.jsonl"), shots=0), seed=1)
    assert {query.fact.subject: query.commonest for query in queries} == {
        "a": 0.5, "b": 0.5, "c": 0, "d": 0.5, "e": 0.5, "f": 0,
    }  # fmt: skip


def test_another_subject_has_another_object_and_is_no_example(tmp_path):
    lines = (json.dumps({"relation": "r", "sub": f"S{n}", "obj": f"O{n % 9}"}) for n in range(30))
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    queries = build_queries(ProbeConfig(facts=str(tmp_path / "facts.jsonl"), wrong=3, shots=2), seed=1)
    objects = {query.fact.subject: query.fact.answer for query in queries}
    others = with_other_subjects(queries, seed=1)
    assert [*others] == list(dict.fromkeys(query.fact for query in queries))
    for fact, query in others.items():
        assert query.answers[0] == query.fact.answer == fact.answer
        assert objects[query.fact.subject] not in query.answers
        assert query.fact.subject not in {fact.subject, *(example.subject for example in query.examples)}
    assert with_other_subjects(queries[:1], seed=1) == {}
