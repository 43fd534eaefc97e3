"""`hft eval` on the models of a run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import yaml

from hft_cli.config.schema import EvalConfig, ModelConfig, RunConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.errors import UserError
from hft_cli.runner.evaluation import run_eval, table


def test_a_missing_base_is_not_replaced_by_another_model(tmp_path):
    run = RunConfig(output_dir=str(tmp_path), model=ModelConfig(name="pocket", path="pocket:model"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(run)))
    (tmp_path / "plan.json").write_text('{"base": "/nowhere", "base_sha256": "0"}')
    (tmp_path / "DONE").touch()
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    config = EvalConfig(run=str(tmp_path), output_dir="", models=["before"], suite=suite)
    config.model, config.engine.name = ModelConfig(name="m", path="m"), "single"
    with pytest.raises(UserError, match="does not exist any more"):
        run_eval(config)


def test_a_run_that_trains_has_no_base_to_go_back_to(tmp_path):
    run = RunConfig(output_dir=str(tmp_path), model=ModelConfig(name="pocket", path="pocket:model"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(run)))
    (tmp_path / "DONE").touch()
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    config = EvalConfig(run=str(tmp_path), output_dir="", models=["base"], suite=suite)
    config.model, config.engine.name = ModelConfig(name="m", path="m"), "single"
    with pytest.raises(UserError, match=r"models=\[base\] is for a Half-Reset or an interpolation"):
        run_eval(config)


def test_scores_of_another_model_are_not_overwritten(tmp_path):
    """a/model and b/model have one folder of results by default."""
    (tmp_path / "eval").mkdir()
    old = {"path": "/elsewhere/model", "weights_sha256": "0", "eval": {}, "details": {}}
    (tmp_path / "eval/pocket.json").write_text(json.dumps({"models": {"model": old}}))
    suite = SuiteConfig(name="pocket", tasks={"facts": "pocket:facts.jsonl"})
    config = EvalConfig(run=None, output_dir=str(tmp_path), suite=suite)
    config.model, config.engine.name = ModelConfig(name="pocket", path="pocket:model"), "single"
    with pytest.raises(UserError, match=r"has the scores of /elsewhere/model, which .* would replace.*output_dir="):
        run_eval(config)


def test_only_shares_are_printed_in_percent(tmp_path):
    scores = {
        "mmlu": {"acc": 0.4567, "acc_stderr": 0.01, "items": 10},
        "wikitext": {"word_perplexity": 12.3456, "word_perplexity_stderr": 0.5, "items": 10},
        "bits": {"bits_per_byte": 0.81234, "items": 10},
        "flores": {"bleu": 0.5, "items": 10},
    }
    file = tmp_path / "s.json"
    record = {"eval": {"s": scores}, "details": {}}
    file.write_text(json.dumps({"suite": "s", "left_out": [], "models": {"model": record}}))
    words = {line.split()[0]: line.split()[3:5] for line in table(file).splitlines()[1:5]}
    assert words == {
        "mmlu": ["45.7", "±1.0"], "wikitext": ["12.35", "±0.5"], "bits": ["0.8123", "10"], "flores": ["0.5", "10"],
    }  # fmt: skip


def test_a_table_says_what_its_scores_do_not_show(tmp_path):
    details = {"chat": True, "limit": None, "model": {"dtype": "float32"}}
    models = {
        "before": {
            "eval": {"s": {"mmlu": {"acc": 0.5, "items": 10}}},
            "details": {"mmlu": {
                **details, "rows_sha256": "1", "prompts_cut": 1, "tasks": {"a": {}}, "tasks_without_rows": ["b", "c"],
            }},
        },
        "after": {
            "eval": {"s": {"mmlu": {"acc": 0.5, "items": 10}, "probe": {
                "accuracy": 0.5, "chance": 0.1, "commonest": 0.4, "other_subject": 0.2, "items": 3,
            }}},
            "details": {
                "mmlu": {**details, "rows_sha256": "2", "chat": False}, "probe": {"model": {"dtype": "bfloat16"}},
            },
        },
    }  # fmt: skip
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"suite": "s", "left_out": [], "models": models}))
    assert table(file).splitlines()[4:-1] == [
        'not comparable, with different dtype: before mmlu, after mmlu: "float32"; after probe: "bfloat16"',
        "not comparable, with different mmlu rows: before mmlu; after mmlu",
        "not comparable, with different mmlu chat: before mmlu: true; after mmlu: false",
        "before mmlu: 1 prompt lost the start, because the model takes no more tokens.",
        "before mmlu: 1 of 3 tasks have rows in suite.data_dir.",
        "after probe: 10.0% by drawing an answer, 40.0% by naming each relation's commonest object, 20.0% when asked "
        "about another subject.",
    ]
