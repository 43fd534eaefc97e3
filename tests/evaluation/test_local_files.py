"""Rows of benchmarks from the files that they are published as."""

from __future__ import annotations

import json

import pytest
from benchmark_files import write

from hft_cli.errors import UserError
from hft_cli.evaluation.local_files import available_parts, read_splits


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(UserError, match="has no folder nq_open"):
        available_parts("nq_open", tmp_path)
    (tmp_path / "nq_open").mkdir()
    with pytest.raises(UserError, match=r"NQ-open.dev.jsonl or validation.jsonl"):
        available_parts("nq_open", tmp_path)
    (tmp_path / "nq_open" / "validation.jsonl").write_text('{"question": "who"}\n')
    with pytest.raises(UserError, match="does not have the shape of nq_open"):
        read_splits("nq_open", "", tmp_path, 0)


def test_parts_come_from_the_names_of_the_files(tmp_path):
    write(tmp_path)
    assert available_parts("mmlu", tmp_path) == ("anatomy",)
    assert available_parts("bbh", tmp_path) == ("boolean_expressions",)
    assert available_parts("gsm8k", tmp_path) == ("",)
    assert "fi" in available_parts("tydiqa", tmp_path)


def test_examples_are_split_off_the_scored_rows(tmp_path):
    splits = read_splits("hotpotqa", "", write(tmp_path), 3)
    assert [len(splits[split]) for split in ("validation", "train")] == [5, 3]


def test_triviaqa_s_release_gives_the_rows_of_the_hub(tmp_path):
    data_dir = write(tmp_path)
    rows = read_splits("triviaqa", "", data_dir, 0)["validation"]
    answers = [{"Value": row["answer"]["value"], "Aliases": row["answer"]["aliases"]} for row in rows]
    entries = [{"Question": row["question"], "Answer": answer} for row, answer in zip(rows, answers, strict=True)]
    (data_dir / "triviaqa" / "unfiltered-web-dev.json").write_text(json.dumps({"Data": entries}))
    (data_dir / "triviaqa" / "validation.jsonl").unlink()
    assert read_splits("triviaqa", "", data_dir, 0)["validation"] == rows


def test_tydiqa_s_release_gives_the_rows_of_the_hub(tmp_path):
    data_dir = write(tmp_path)
    rows = read_splits("tydiqa", "fi", data_dir, 0)["validation"]
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        question = {"id": row["id"], "question": row["question"], "answers": answers}
        paragraphs.append({"context": row["context"], "qas": [question]})
    release = {"data": [{"title": rows[0]["title"], "paragraphs": paragraphs}]}
    (data_dir / "tydiqa" / "tydiqa-goldp-v1.1-dev.json").write_text(json.dumps(release))
    (data_dir / "tydiqa" / "validation.jsonl").unlink()
    assert read_splits("tydiqa", "fi", data_dir, 0)["validation"] == rows
