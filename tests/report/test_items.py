"""Scores item by item."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import write_eval, write_items, write_run

from hft_cli.report.items import change_cell, flips, item_scores, score_changes
from hft_cli.report.reading import find_runs


def test_items_without_a_pair_are_left_out(tmp_path):
    write_items(write_run(tmp_path / "run"), "pocket/facts", before=[1, 1, 1, 1, 0], after=[1, 0, 1, 0])
    assert item_scores(find_runs([tmp_path])[0], "pocket/facts") == ([1, 1, 1, 1], [1, 0, 1, 0], [1] * 4)


def test_recorded_items_give_the_change_an_interval(tmp_path):
    write_items(write_run(tmp_path / "run", retained=0.5), "pocket/facts", before=[1, 1, 1, 1], after=[1, 0, 1, 0])
    changes = {record["task"]: record for record in score_changes(find_runs([tmp_path])[0])}
    facts, capitals = changes["pocket/facts"], changes["data/capitals"]
    assert (facts["change"], facts["change_n"]) == (-0.5, 4)
    assert (facts["change_low"], facts["change_high"]) == pytest.approx((-0.85, 0.102), abs=0.001)
    assert (capitals["change"], capitals["change_low"]) == (0.9, None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_what_is_lost_and_gained_makes_the_change(pairs):
    before, after = ([float(pair[part]) for pair in pairs] for part in (0, 1))
    counts = flips(before, after)
    (lost, right), (gained, wrong) = (map(int, counts[key].split(" [")[0].split(" of ")) for key in ("lost", "gained"))
    assert (right, right + wrong) == (sum(before), len(pairs))
    assert gained - lost == sum(after) - sum(before)
    assert lost == sum(b > a for b, a in zip(before, after, strict=True))


def test_scores_between_right_and_wrong_are_not_counted():
    assert flips([0.5, 1.0], [1.0, 1.0]) == {}


def test_later_evaluations_are_paired_too(tmp_path):
    write_eval(write_run(tmp_path / "run"), "knowledge", {"nq": [1.0, 0.0, 1.0, 1.0]}, {"nq": [0.0, 0.0, 1.0, 0.0]})
    (change,) = [c for c in score_changes(find_runs([tmp_path])[0]) if c["task"] == "knowledge/nq"]
    assert (change["change"], change["change_n"]) == (-0.5, 4)


def test_a_change_in_bits_per_byte_is_that_of_all_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    lines = {"before": [(1.0, 100), (2.0, 300), (1.5, 600)], "after": [(1.5, 100), (2.0, 300), (1.6, 600)]}
    for when, passages in lines.items():
        whole = sum(bits * size for bits, size in passages) / 1000
        results["eval"][when]["text"] = {"book": {"bits_per_byte": whole}}
        file = run / "eval" / when / "text" / "book.jsonl"
        file.parent.mkdir(parents=True)
        records = [{"row": n, "bits_per_byte": bits, "bytes": size} for n, (bits, size) in enumerate(passages)]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "results.json").write_text(json.dumps(results))
    (record,) = [each for each in score_changes(find_runs([run])[0]) if each["task"] == "text/book"]
    assert record["change"] == pytest.approx(record["after"] - record["before"])
    assert record["change"] == pytest.approx(0.11)  # the mean of the passages would be 0.2
    assert record["change_low"] < 0.11 < record["change_high"]
    assert re.fullmatch(r"\+0\.11 \[\+0\.?\d*, \+0\.\d+\]", change_cell(record))


def test_the_last_round_of_a_sequence_is_after(tmp_path):
    run = write_run(tmp_path / "run")
    write_items(run, "pocket/facts", before=[1, 1], after=[0, 0])
    (run / "eval/after").rename(run / "eval/round-01")
    write_items(run, "pocket/facts", before=[1, 1], after=[1, 0])
    (run / "eval/after").rename(run / "eval/round-02")
    assert item_scores(find_runs([run])[0], "pocket/facts") == ([1, 1], [1, 0], [1, 1])


def test_a_broken_line_makes_no_records(tmp_path):
    run = write_run(tmp_path / "run")
    write_items(run, "pocket/facts", before=[1], after=[1])
    with (run / "eval/after/pocket/facts.jsonl").open("a") as file:
        file.write("{\n")
    assert item_scores(find_runs([run])[0], "pocket/facts") is None
