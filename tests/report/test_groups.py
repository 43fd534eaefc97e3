"""Runs by setting and by data."""

from __future__ import annotations

import json

import pytest
from report_runs import write_run

from hft_cli.report.groups import batches, compare, full_counterpart, group_runs
from hft_cli.report.reading import find_runs


def test_runs_that_differ_in_their_seeds_are_one_group(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, draw_seed=7)
    write_run(tmp_path / "c", config={"train": {"learning_rate": 1e-3, "max_steps": 99}})
    groups = group_runs(find_runs([tmp_path]))
    assert {group.label: len(group.runs) for group in groups} == {"HFT max_steps 10": 2, "HFT max_steps 99": 1}


def test_keys_without_effect_do_not_separate_runs(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", config={"continual": {"name": "seqft", "gem_margin": 0.5}})  # GEM's key without GEM
    write_run(tmp_path / "c", "fft")
    balanced = {
        "level": "all",
        "ratio": 0.3,
        "balance": "elements",
        "embeddings": "update",
    }  # where everything is updated
    write_run(tmp_path / "d", "fft", ratio=0.3, config={"selection": balanced})
    assert {group.label: len(group.runs) for group in group_runs(find_runs([tmp_path]))} == {"FFT": 2, "HFT": 2}


def test_a_key_that_is_younger_than_a_run_has_its_default(tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", config={"data": {"name": "pocket_capitals", "path": ["capitals"], "rounds_per_set": 1}})
    write_run(tmp_path / "two", config={"data": {"name": "pocket_capitals", "path": ["capitals"], "rounds_per_set": 2}})
    groups = group_runs(find_runs([tmp_path]))
    assert {group.label: len(group.runs) for group in groups} == {"HFT rounds_per_set 1": 2, "HFT rounds_per_set 2": 1}


def test_sets_of_a_mix_are_told_apart_by_what_differs(tmp_path):
    for name, share in (("a", 0.01), ("b", 0.1)):
        write_run(tmp_path / name, config={"data": {"mix": [{"path": "general.jsonl", "share": share}]}})
    assert [group.label for group in group_runs(find_runs([tmp_path]))] == ["HFT share 0.01", "HFT share 0.1"]


def test_long_values_stay_different_labels(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, config={"data": {"validation": "folder/" * 20 + name}})
    assert len({group.label for group in group_runs(find_runs([tmp_path]))}) == 2


def test_only_counted_runs_are_grouped(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", passed=False, seed=2)
    write_run(tmp_path / "c", done=False, seed=3)
    write_run(tmp_path / "d", passed=None, seed=4)
    (group,) = group_runs(find_runs([tmp_path]))
    assert [run.row.seed for run in group.runs] == [1, 4]


def test_groups_are_in_the_order_of_methods(tmp_path):
    for method in ("hft_dpo", "half_reset", "dpo", "hft", "fft"):
        write_run(tmp_path / method, method)
    labels = [group.row.label for group in group_runs(find_runs([tmp_path]))]
    assert labels == ["FFT", "HFT", "Half-Reset", "DPO", "HFT-DPO"]


def test_the_counterpart_differs_in_the_selection_only(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "fft", rate=9.0)
    groups = group_runs(find_runs([tmp_path]))
    assert full_counterpart(groups[-1], groups) is None
    write_run(tmp_path / "c", "fft")
    groups = group_runs(find_runs([tmp_path]))
    assert full_counterpart(groups[-1], groups).row.learning_rate == 1e-3


def test_runs_on_different_data_are_not_compared(tmp_path):
    for name, data, path in (("a", "x", "1"), ("b", "y", "1"), ("c", "y", "2")):
        write_run(tmp_path / name, data=data, config={"data": {"path": path}})
    write_run(tmp_path / "d", seed=2, data="x", config={"data": {"path": "1"}})
    comparisons = compare(find_runs([tmp_path]))
    assert [(c.name, c.stem("methods"), len(c.runs)) for c in comparisons] == [
        ("x", "methods", 2), ("y 1", "methods_y_1", 1), ("y 2", "methods_y_2", 1),
    ]  # fmt: skip
    (only,) = compare(find_runs([tmp_path / "a"]))
    assert only.title("Methods") == "Methods"


def test_batches_have_stems_of_their_own():
    assert [(stem, len(batch)) for stem, batch in batches("r", list(range(14)))] == [("r", 6), ("r_2", 6), ("r_3", 2)]


def test_a_half_reset_is_compared_with_the_runs_of_its_base(tmp_path):
    write_run(tmp_path / "a", "fft")
    write_run(tmp_path / "b", "half_reset", model="local")  # which starts from a model that was tuned
    (comparison,) = compare(find_runs([tmp_path]))
    assert len(comparison.runs) == 2


def test_models_and_suites_are_never_compared(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "fft", model="smol")
    (tmp_path / "b/plan.json").write_text('{"base_sha256": "1", "rounds": []}')
    other = write_run(tmp_path / "c", seed=2)
    results = json.loads((other / "results.json").read_text())
    for scores in results["eval"].values():
        scores["knowledge"] = {"nq": scores["pocket"]["facts"]}
    (other / "results.json").write_text(json.dumps(results))
    comparisons = compare(find_runs([tmp_path]))
    assert sorted(len(c.runs) for c in comparisons) == [1, 1, 1]
    assert {c.name for c in comparisons} >= {"pocket_capitals, smol"}


def with_rows(run, taken, digest, test="t"):
    """The record of the rows in plan.json: how many of 100 are taken, and their hash."""
    plan = json.loads((run / "plan.json").read_text())
    part = {"path": "train.jsonl", "read": 100, "repeats": 0, "taken": taken, "held_out": 0}
    plan["rounds"][0] |= {"data_sha256": digest, "test_sha256": test, "parts": [part]}
    (run / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        ((100, "a"), (100, "a"), 1),
        ((100, "a"), (100, "b"), 2),  # an edited file, or one of the same path in another folder
        ((50, "a"), (50, "b"), 1),  # each seed draws its own rows
        ((50, "a", "t"), (50, "b", "u"), 2),
    ],
)
def test_seeds_on_other_rows_are_not_pooled(first, second, groups, tmp_path):
    for seed, rows in enumerate((first, second)):
        with_rows(write_run(tmp_path / str(seed), seed=seed), *rows)
    found = group_runs(find_runs([tmp_path]))
    assert len(found) == len({group.label for group in found}) == groups
