"""Suites are checked before anything is scored."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_files import write

from hft_cli.config.schema import ModelConfig
from hft_cli.config.suites import SuiteConfig
from hft_cli.errors import UserError
from hft_cli.evaluation import suite
from hft_cli.evaluation.suite import read_suite, uses_chat_template

FACTS = {"facts": {"facts": "pocket:facts.jsonl"}}


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'hft-cli\[eval\]'"):
        read_suite(SuiteConfig(name="knowledge", benchmarks={"nq_open": {}}))


def test_only_picks_and_probes_get_names_of_their_own(tmp_path):
    read = read_suite(SuiteConfig(name="s", tasks={"facts": "pocket:facts.jsonl"}, probe=FACTS, only=["facts"]))
    assert list(read.hashes) == ["facts", "facts_ranking"]
    assert read.tasks["facts"].special_tokens == "text"
    with pytest.raises(UserError, match="Did you mean 'facts'"):
        read_suite(SuiteConfig(name="s", probe=FACTS, only=["fact"]))


def test_a_probe_without_its_files_is_left_out_with_a_reason():
    read = read_suite(SuiteConfig(name="s", probe={"pararel": {"facts": "pararel/facts.jsonl"}}))
    assert read.probes == {}
    assert read.left_out == ("pararel, whose files are looked for in suite.data_dir, which is not set",)


def test_hashes_follow_the_rows(tmp_path):
    data_dir = write(tmp_path)
    config = SuiteConfig(name="s", benchmarks={"gsm8k": {}, "bbh": {}}, data_dir=str(data_dir))
    before = read_suite(config).hashes
    file = data_dir / "gsm8k" / "train.jsonl"
    file.write_text(file.read_text().replace("Ann", "Eve"))
    after = read_suite(config).hashes
    assert after["gsm8k"] != before["gsm8k"]
    assert after["bbh"] == before["bbh"]
    assert read_suite(SuiteConfig(name="s", benchmarks={"gsm8k": {}})).hashes == {"gsm8k": "hub"}


def test_programs_of_the_model_need_consent(tmp_path):
    config = SuiteConfig(name="s", benchmarks={"humaneval": {}, "gsm8k": {}})
    with pytest.raises(UserError, match=r"suite\.allow_code=true.*suite\.only=\[gsm8k\]"):
        read_suite(config)


def test_root_runs_programs_of_the_model_only_if_it_says_so(tmp_path, monkeypatch):
    config = SuiteConfig(name="s", benchmarks={"humaneval": {}}, allow_code="true", data_dir=str(write(tmp_path)))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert read_suite(config).benchmarks
    monkeypatch.setattr(os, "getuid", lambda: 0)
    with pytest.raises(UserError, match=r"you are root.*suite\.allow_code=root"):
        read_suite(config)
    assert read_suite(replace(config, allow_code="root")).benchmarks


@pytest.mark.parametrize(
    ("chat", "template", "expected"), [("auto", True, True), ("auto", False, False), ("false", True, False)]
)
def test_auto_uses_the_chat_template_if_there_is_one(chat, template, expected, tmp_path: Path):
    config = {"chat_template": "{{ messages }}"} if template else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert uses_chat_template(SuiteConfig(name="s", chat=chat), ModelConfig(), tmp_path) is expected


def test_a_required_chat_template_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"suite\.chat=true, but .* has no chat template"):
        uses_chat_template(SuiteConfig(name="s", chat="true"), ModelConfig(), tmp_path)
    assert uses_chat_template(SuiteConfig(name="s", chat="true"), ModelConfig(chat_template="tulu"), tmp_path)
