"""The knowledge probe: which answers are ranked, their likelihoods, and what is reported."""

from __future__ import annotations

import json

import pytest

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import ProbeConfig
from hft_cli.errors import UserError
from hft_cli.evaluation.probe import queries, read, settings, text
from hft_cli.evaluation.probe_worker import facts, log_likelihoods, measure, score
from hft_cli.launch.jobs import ProbeJob, Progress
from hft_cli.paths import PACKAGE
from hft_cli.run_dir import RoundDir

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

    folder = str(PACKAGE / "assets" / "pocket" / "model")
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


def item(relation: str, subject: str, *right: bool) -> dict:
    shares = {"accuracy": sum(right) / len(right), "paraphrases": [{"right": one} for one in right]}
    return {"relation": relation, "subject": subject, "answer": "x", "answers": ["x", "y"], **shares}


def test_a_record_of_a_fact_holds_its_paraphrases_and_the_share_that_is_right(probe):
    asked = queries(probe, seed=1)[:4]
    assert asked[0].fact == asked[1].fact != asked[2].fact
    first, second = facts(asked, [[-1.0, -2.0], [-2.0, -2.0], [-1.0, -2.0], [-1.0, -3.0]])
    assert first["accuracy"] == 0.5  # a tie is not knowing
    assert second["accuracy"] == 1.0
    assert [one["right"] for one in first["paraphrases"]] == [True, False]
    assert first["row"] != second["row"]


def test_intervals_are_over_facts_so_that_repeating_paraphrases_adds_no_certainty():
    once = [item("a", str(n), n % 2 == 0) for n in range(40)]
    often = [item("a", str(n), *[n % 2 == 0] * 5) for n in range(40)]
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


def test_a_probe_from_files_is_scored_by_relation(probe, tmp_path):
    out = tmp_path / "scores.json"
    job = ProbeJob(
        ModelConfig(), str(PACKAGE / "assets" / "pocket" / "model"), {"p": probe}, {"p": str(out)}, 5, False, 8, 42
    )
    score(job, RoundDir(tmp_path), Progress(tmp_path / "progress.json"))
    found = json.loads(out.read_text())
    assert found["scores"]["items"] == 5
    assert set(found["relations"]["capital"]) >= {"accuracy", "accuracy_low", "chance"}
    assert found["relations"]["capital"]["paraphrases"] == 2
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 5
