"""Scores item by item."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import write_eval, write_items, write_run

from hft_cli.report.items import FEWEST_ITEMS, NO_ITEMS, Pairs, flips, item_pairs, score_changes
from hft_cli.report.reading import find_runs


def test_other_items_before_and_after_have_no_change(tmp_path):
    write_items(write_run(tmp_path / "run"), "pocket/facts", before=[1, 1, 1, 1, 0], after=[1, 0, 1, 0])
    assert changes(tmp_path)["pocket/facts"]["change"] is None
    assert changes(tmp_path)["pocket/facts"]["note"].endswith("before and after differ in items (5, 4)")


def changes(folder, start="before"):
    """The records of the only run, by task."""
    return {str(record["task"]): record for record in score_changes(find_runs([folder])[0], start)}


def test_recorded_items_give_the_change_an_interval(tmp_path):
    write_items(write_run(tmp_path / "run", retained=0.5), "pocket/facts", before=[1, 1, 1, 1], after=[1, 0, 1, 0])
    facts, capitals = (changes(tmp_path)[task] for task in ("pocket/facts", "data/capitals"))
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
    change = changes(tmp_path)["knowledge/nq"]
    assert (change["change"], change["change_n"]) == (-0.5, 4)


def write_parts(run, parts, before, after, by_parts):
    """Items of several parts, and their mean: over items, or over parts."""
    results = json.loads((run / "results.json").read_text())
    for when, values in (("before", before), ("after", after)):
        file = run / "eval" / when / "suite" / "task.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"row": n, "task": part, "acc": value} for n, (part, value) in enumerate(zip(parts, values, strict=True))
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        groups = [[row["acc"] for row in rows if row["task"] == part] for part in sorted(set(parts))]
        means = [fmean(values)] if not by_parts else [fmean(group) for group in groups]
        results["eval"][when]["suite"] = {"task": {"acc": fmean(means), "items": len(values)}}
    (run / "results.json").write_text(json.dumps(results))


SCORES = st.sampled_from([0.0, 0.25, 1.0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), SCORES, SCORES), min_size=FEWEST_ITEMS, max_size=25), st.booleans())
def test_the_change_is_that_of_the_scores(tmp_path_factory, items, by_parts):
    """Its interval is about the same mean, whether that is over items or over parts."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    write_parts(run, *zip(*items, strict=True), by_parts)
    record = changes(run)["suite/task"]
    assert record["change"] == record["after"] - record["before"]
    assert record["change_low"] - 1e-9 <= record["change"] <= record["change_high"] + 1e-9
    pairs = item_pairs(find_runs([run])[0], "suite/task")
    for values, when in ((pairs.before, "before"), (pairs.after, "after")):
        mean = sum(w * v for w, v in zip(pairs.weights, values, strict=True)) / sum(pairs.weights)
        assert mean == pytest.approx(record[when])


def test_a_score_that_is_no_mean_has_no_interval(tmp_path):
    run = write_run(tmp_path / "run")
    write_items(run, "pocket/facts", before=[1] * 20, after=[1, 0] * 10)
    results = json.loads((run / "results.json").read_text())
    results["eval"]["after"]["pocket"]["facts"]["exact_match"] = 0.6
    (run / "results.json").write_text(json.dumps(results))
    facts = changes(tmp_path)["pocket/facts"]
    assert (facts["change"], facts["change_low"]) == (pytest.approx(-0.4), None)
    assert facts["note"] == "no interval, because the score is no mean of its items"


@pytest.mark.parametrize(("n", "known"), [(FEWEST_ITEMS - 1, False), (FEWEST_ITEMS, True)])
def test_few_scores_between_0_and_1_have_no_interval(n, known, tmp_path):
    write_items(write_run(tmp_path / "run"), "pocket/facts", before=[0.5] * n, after=[0.5] * n)
    facts = changes(tmp_path)["pocket/facts"]
    assert (facts["change_low"] is not None, facts["note"] == "") == (known, known)


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("limit", (3, 20), "limit (3, 20)"),
        ("rows_sha256", ("a", "b"), "rows"),
        ("rows_sha256", (None, "b"), "rows"),
        ("model", ({"dtype": "float32"}, {"dtype": "bfloat16"}), "model.dtype"),
        ("settings", ({"shots": 1}, {"shots": 2}), "settings"),
    ],
)
def test_scores_of_other_conditions_are_not_compared(key, values, said, tmp_path):
    run = write_run(tmp_path / "run")
    write_eval(run, "knowledge", {"nq": [1.0] * 20}, {"nq": [1.0] * 20})
    assert changes(run)["knowledge/nq"]["note"] == ""
    with_details(run, key, *values)
    record = changes(run)["knowledge/nq"]
    assert (record["change"], record["change_low"]) == (None, None)
    assert record["note"] == f"not comparable, because before and after differ in {said}"


def test_the_place_of_a_probes_facts_does_not_count(tmp_path):
    run = write_run(tmp_path / "run")
    write_eval(run, "knowledge", {"nq": [1.0] * 20}, {"nq": [1.0] * 20})
    with_details(run, "settings", {"facts": "/a", "wrong": 9}, {"facts": "/b", "wrong": 9})
    assert changes(run)["knowledge/nq"]["note"] == ""


def with_details(run, key, before, after):
    file = run / "eval/knowledge.json"
    results = json.loads(file.read_text())
    for when, value in (("before", before), ("after", after)):
        if value is not None:
            results["models"][when]["details"]["nq"][key] = value
    file.write_text(json.dumps(results))


def test_a_half_reset_can_be_compared_with_its_base(tmp_path):
    run = write_run(tmp_path / "run", "half_reset")
    write_items(run, "pocket/facts", before=[0] * 20, after=[0, 1] * 10, base=[1] * 20)
    write_eval(run, "knowledge", {}, {"nq": [1.0, 0.0] * 10}, base={"nq": [1.0] * 20})
    for task in ("pocket/facts", "knowledge/nq"):
        assert changes(run, "base")[task]["change"] == -0.5
        assert changes(run, "base")[task]["change_low"] is not None
    assert changes(run)["pocket/facts"]["change"] == 0.5
    assert changes(run)["knowledge/nq"]["note"] == "no score before"


def test_the_last_round_of_a_sequence_is_after(tmp_path):
    run = write_run(tmp_path / "run")
    write_items(run, "pocket/facts", before=[1, 1], after=[0, 0])
    (run / "eval/after").rename(run / "eval/round-01")
    write_items(run, "pocket/facts", before=[1, 1], after=[1, 0])
    (run / "eval/after").rename(run / "eval/round-02")
    assert item_pairs(find_runs([run])[0], "pocket/facts") == Pairs([1, 1], [1, 0], [1, 1])


def test_a_broken_line_makes_no_records(tmp_path):
    run = write_run(tmp_path / "run")
    write_items(run, "pocket/facts", before=[1], after=[1])
    with (run / "eval/after/pocket/facts.jsonl").open("a") as file:
        file.write("{\n")
    assert item_pairs(find_runs([run])[0], "pocket/facts") == NO_ITEMS
