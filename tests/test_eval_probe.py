"""The knowledge probe: which answers are ranked, their likelihoods, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import hft

from hft_cli.probe import ProbeConfig, log_likelihoods, measure, queries, read, settings, text
from hft_cli.schema import PACKAGE, UserError

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


def test_only_patterns_that_end_in_the_object_are_used_and_relations_without_one_are_left_out(probe):
    assert {relation: len(patterns) for relation, (_, patterns) in read(probe).items()} == {"capital": 2}


def test_each_fact_is_ranked_among_nine_wrong_answers_of_its_relation(probe):
    asked = queries(probe, seed=1)
    assert len(asked) == 17 * 2
    objects = {row["obj"] for row in FACTS if row["relation"] == "capital"}
    for query in asked:
        assert len(set(query.answers)) == 10
        assert query.answers[0] == query.fact.answer
        assert set(query.answers) <= objects


def test_a_wrong_answer_is_never_another_right_one_nor_begins_with_the_right_one(probe):
    for query in queries(probe, seed=1):
        if query.fact.subject == "Bolivia":
            assert not {"Sucre", "Paz"} & set(query.answers[1:])
        if query.fact.answer in ("Lima", "Limassol"):
            assert not {"Lima", "Limassol"} & set(query.answers[1:])


def test_the_examples_show_no_answer_that_is_ranked_and_not_the_subject_itself(probe):
    for query in queries(probe, seed=1):
        assert len(query.examples) == 4
        assert query.fact.subject not in {example.subject for example in query.examples}
        assert not {example.answer for example in query.examples} & set(query.answers)


def test_the_choice_hangs_on_the_seed_and_on_nothing_else(probe):
    assert queries(probe, seed=1) == queries(probe, seed=1)
    assert queries(probe, seed=1) != queries(probe, seed=2)
    some = queries(probe, seed=1, limit=3)
    assert len({query.fact for query in some}) == 3
    assert set(some) <= set(queries(probe, seed=1))


def test_the_prompt_is_the_paraphrase_up_to_its_object_after_whole_examples(probe):
    query = next(query for query in queries(probe, seed=1) if query.pattern == "[X], whose capital is [Y] .")
    before, gap = text(query, None)
    *examples, last = before.split("\n")
    assert len(examples) == 4
    assert all(line.endswith(" .") for line in examples)
    assert last == f"{query.fact.subject}, whose capital is"
    assert gap == " "


def test_a_row_that_is_no_fact_is_named(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"relation": "capital", "sub": "France"}\n')
    with pytest.raises(UserError, match="line 1: a fact has relation, sub and obj"):
        read(ProbeConfig(facts=str(tmp_path / "facts.jsonl")))


def test_missing_files_are_a_mistake_and_without_a_data_dir_the_probe_is_left_out(tmp_path):
    values = {"facts": "pararel/facts.jsonl", "patterns": "pararel/patterns.jsonl"}
    assert settings("pararel", values, None) is None
    with pytest.raises(UserError, match="there is no file"):
        settings("pararel", values, tmp_path)


@pytest.fixture(scope="module")
def pocket():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(PACKAGE / "pocket" / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def test_a_likelihood_is_that_of_the_continuation_token_by_token(pocket):
    import torch

    model, tokenizer = pocket
    pairs = [("The capital of Peru is", [" Lima", " Ouagadougou", " L", " Rome"]), ("What is", [" gold?"])]
    found, cut = log_likelihoods(model, tokenizer, pairs, batch_size=2)
    assert cut == 0
    for (before, continuations), own in zip(pairs, found, strict=True):
        for continuation, value in zip(continuations, own, strict=True):
            start = len(tokenizer(before)["input_ids"])
            ids = tokenizer(before + continuation)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert value == pytest.approx(expected, abs=1e-4)


def test_a_row_longer_than_the_model_loses_its_start_and_is_counted(pocket):
    model, tokenizer = pocket
    long = "gold " * 600
    found, cut = log_likelihoods(model, tokenizer, [(long, [" iron"]), ("short", [" iron"])], batch_size=2)
    assert cut == 1
    assert all(own[0] < 0 for own in found)


def item(relation: str, subject: str, right: bool) -> dict:
    return {"relation": relation, "subject": subject, "answer": "x", "answers": ["x", "y"], "right": float(right)}


def test_intervals_are_over_facts_so_that_repeating_paraphrases_adds_no_certainty():
    once = [item("a", str(n), n % 2 == 0) for n in range(40)]
    often = [one for one in once for _ in range(5)]
    assert measure(once, seed=0)["scores"] == measure(often, seed=0)["scores"]
    scores = measure(once, seed=0)["scores"]
    assert scores["accuracy"] == 0.5
    assert scores["accuracy_high"] - scores["accuracy_low"] == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)


def test_the_mean_is_over_relations_and_not_over_facts():
    items = [item("large", str(n), True) for n in range(30)] + [item("small", str(n), False) for n in range(3)]
    measured = measure(items, seed=0)
    assert measured["scores"]["accuracy"] == 0.5
    assert measured["relations"]["large"]["accuracy"] == 1.0
    assert measured["scores"]["chance"] == 0.5


def test_the_suite_scores_the_embedded_facts_both_ways_and_pararel_from_files(probe, tmp_path):
    data = Path(probe.facts).parents[1]
    done = hft("eval", "suite=probe", f"suite.data_dir={data}", "suite.limit=5", f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "eval" / "probe" / "results.json").read_text())["models"]["model"]
    scores = results["eval"]["probe"]
    assert scores["pocket_facts"]["exact_match"] > 0.99
    assert scores["pocket_facts_ranking"]["accuracy"] > 0.9
    assert scores["pocket_facts_ranking"]["items"] == 30  # five facts of each of six relations
    assert scores["pararel_ranking"]["items"] == 5
    assert set(results["details"]["pararel_ranking"]["relations"]["capital"]) >= {"accuracy", "accuracy_low", "chance"}
