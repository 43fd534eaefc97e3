"""The worker of probes: log-likelihoods, records of facts, and intervals."""

from __future__ import annotations

import json

import pytest
import torch

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import ProbeConfig
from hft_cli.evaluation.probe import Fact, Query
from hft_cli.evaluation.probe_worker import fact_records, log_likelihoods, score_probes, summarize
from hft_cli.evaluation.workers import load_model
from hft_cli.launch.jobs import ProbeJob, Progress
from hft_cli.paths import resolve_path
from hft_cli.run_dir import RoundDir

MODEL = resolve_path("pocket:model")


@pytest.fixture(scope="module")
def pocket():
    return load_model(MODEL, ModelConfig(dtype="float32"))


def test_a_log_likelihood_is_the_sum_over_the_tokens(pocket):
    pairs = [("The capital of Peru is", [" Lima", " Ouagadougou", " L", " Rome"]), ("What is", [" gold?"])]
    results = log_likelihoods(pocket, pairs, batch_size=2)
    for (prompt, continuations), (values, truncated) in zip(pairs, results, strict=True):
        assert truncated == 0
        for continuation, value in zip(continuations, values, strict=True):
            start = len(pocket.tokenizer(prompt)["input_ids"])
            ids = pocket.tokenizer(prompt + continuation)["input_ids"]
            with torch.inference_mode():
                logits = pocket.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert value == pytest.approx(expected, abs=1e-4)


def test_a_row_longer_than_the_model_loses_its_start(pocket):
    pairs = [("short", [" iron"]), ("gold " * 600, [" iron"])]
    (short_values, short_truncated), (long_values, long_truncated) = log_likelihoods(pocket, pairs, batch_size=2)
    assert (long_truncated, short_truncated) == (1, 0)
    assert long_values[0] < 0
    assert short_values[0] < 0


def query(subject: str, pattern: str) -> Query:
    return Query(Fact("capital", subject, "Lima"), pattern, (), ("Lima", "Rome"))


def test_a_record_of_a_fact_has_its_paraphrases_and_accuracy():
    queries = [query("Peru", "a"), query("Peru", "b"), query("Italy", "a"), query("Italy", "b")]
    first, second = fact_records(queries, [[-1.0, -2.0], [-2.0, -2.0], [-1.0, -2.0], [-1.0, -3.0]])
    assert first["accuracy"] == 0.5  # a tie counts as wrong
    assert second["accuracy"] == 1.0
    assert [paraphrase["right"] for paraphrase in first["paraphrases"]] == [True, False]
    assert first["row"] != second["row"]


def item(relation: str, subject: str, *right: bool) -> dict:
    accuracy = {"accuracy": sum(right) / len(right), "paraphrases": [{"right": one} for one in right]}
    return {
        "relation": relation,
        "subject": subject,
        "answer": "x",
        "answers": ["x", "y"],
        "commonest": 0.0,
        **accuracy,
    }


def test_repeated_paraphrases_do_not_narrow_an_interval():
    once = [item("a", str(n), n % 2 == 0) for n in range(40)]
    often = [item("a", str(n), *[n % 2 == 0] * 5) for n in range(40)]
    scores = summarize(once, seed=0)["scores"]
    assert scores == summarize(often, seed=0)["scores"]
    assert scores["accuracy"] == 0.5
    assert scores["accuracy_high"] - scores["accuracy_low"] == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.15)


def test_the_mean_is_over_relations_not_over_facts():
    items = [item("large", str(n), True) for n in range(30)] + [item("small", str(n), False) for n in range(3)]
    summary = summarize(items, seed=0)
    assert summary["scores"]["accuracy"] == 0.5
    assert summary["relations"]["large"]["accuracy"] == 1.0
    assert summary["scores"]["chance"] == 0.5


def test_a_probe_from_files_is_scored_by_relation(tmp_path):
    facts = [{"relation": "capital", "sub": f"Land {n}", "obj": f"City {n}"} for n in range(12)]
    facts += [{"relation": "river", "sub": f"Land {n}", "obj": f"River {n}"} for n in range(3)]
    patterns = [{"relation": name, "pattern": f"The {name} of [X] is [Y]."} for name in ("capital", "river")]
    for name, lines in (("facts", facts), ("patterns", patterns)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    probe = ProbeConfig(facts=str(tmp_path / "facts.jsonl"), patterns=str(tmp_path / "patterns.jsonl"))
    out = tmp_path / "scores.json"
    job = ProbeJob(
        ModelConfig(), MODEL, probes={"p": probe}, outs={"p": str(out)}, limit=5, chat=False, batch_size=8, seed=42
    )
    score_probes(job, RoundDir(tmp_path), Progress(tmp_path / "progress.json"))
    written = json.loads(out.read_text())
    assert written["scores"]["items"] == 5 + 3
    assert set(written["relations"]) == {"capital", "river"}
    levels = {"chance", "commonest", "other_subject"}
    assert set(written["relations"]["capital"]) >= {"accuracy", "accuracy_low", *levels}
    assert set(written["scores"]) >= levels
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 8
