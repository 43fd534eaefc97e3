"""Means, standard errors and records of items from the harness's results."""

from __future__ import annotations

import pytest

from hft_cli.config.suites import BenchmarkConfig
from hft_cli.evaluation.harness_results import item_records, summarize, summarize_unknown


def sample(item: int, filter_name: str, score: float) -> dict:
    return {
        "doc_id": item, "filter": filter_name, "metrics": ["acc"], "acc": score, "target": "t", "resps": [["r"]],
        "arguments": [("prompt", " a"), ("prompt", " b")],
    }  # fmt: skip


SAMPLES = {"one": [sample(0, "none", 1.0), sample(0, "strict", 0.0)], "two": [
    sample(item, name, score) for item in (1, 0) for name, score in (("none", 0.0), ("strict", float(item)))
]}  # fmt: skip


def test_filters_of_an_item_are_scores_of_one_record():
    items = item_records(SAMPLES)
    assert [item["row"] for item in items] == ["one/0", "two/0", "two/1"]
    assert [(item["acc"], item["acc,strict"]) for item in items] == [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
    assert items[0]["prompt"] == "prompt"
    assert items[0]["choices"] == [" a", " b"]


def test_the_mean_is_over_items_or_over_tasks():
    summary = summarize(SAMPLES, BenchmarkConfig(metric="acc,strict"))
    assert list(summary["scores"]) == ["acc,strict", "acc,strict_stderr", "acc", "acc_stderr", "items"]
    assert summary["scores"]["acc,strict"] == pytest.approx(1 / 3)
    assert summary["scores"]["items"] == 3
    assert summary["tasks"]["two"]["acc,strict"] == 0.5
    over_tasks = summarize(SAMPLES, BenchmarkConfig(mean="tasks"))["scores"]
    assert over_tasks["acc"] == 0.5
    assert over_tasks["acc,strict"] == pytest.approx(1 / 4)
    assert over_tasks["acc,strict_stderr"] == pytest.approx(0.5 / 2)  # of the tasks: 0 and 0.5


def test_figures_of_an_unknown_task_keep_each_filter_s_error():
    figures = {
        "name": "t", "alias": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": 0.1,
        "exact_match,strict": 0.2, "exact_match_stderr,strict": 0.3, "bleu_stderr,none": "N/A",
    }  # fmt: skip
    summary = summarize_unknown({"results": {"t": figures}, "n-samples": {"t": {"effective": 4}}}, ["t"])
    assert list(summary["scores"].items()) == [
        ("acc", 0.5), ("acc_stderr", 0.1), ("exact_match,strict", 0.2), ("exact_match,strict_stderr", 0.3),
        ("items", 4),
    ]  # fmt: skip


def test_unknown_tasks_have_the_mean_of_their_shared_metrics():
    results = {
        "results": {"a": {"acc,none": 0.2, "f1,none": 1.0}, "b": {"acc,none": 0.4, "acc_stderr,none": 0.1}},
        "n-samples": {"a": {"effective": 4}, "b": {"effective": 1}},
    }
    summary = summarize_unknown(results, ["a", "b"])
    assert summary["scores"] == {"acc": pytest.approx(0.24), "items": 5}
    assert set(summary["tasks"]) == {"a", "b"}
