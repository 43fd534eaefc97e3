"""Estimates over seeds, and what is said of the runs behind them."""

from __future__ import annotations

import pytest
from report_runs import write_run

from hft_cli.report.groups import group_runs
from hft_cli.report.measures import MEASURES, measure_fields, measured_in, over_seeds, point, sample_note, seed_scores
from hft_cli.report.reading import find_runs

RETAINED = MEASURES["retained"].score


def groups_of(folder):
    return group_runs(find_runs([folder]))


def test_runs_that_share_seeds_are_not_independent(tmp_path):
    for draw in (1, 2, 3):
        for data in (1, 2, 3):
            write_run(tmp_path / f"{draw}{data}", seed=data, draw_seed=draw, retained=0.3 + 0.1 * draw)
    (group,) = groups_of(tmp_path)
    estimate, interval = over_seeds(group, RETAINED)
    assert interval == "mixed model"
    assert estimate.high - 0.5 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-3)  # of 3 draws, not of 9 runs


def test_seeds_that_are_not_crossed_give_a_t_interval(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / str(seed), seed=seed, retained=0.1 * seed)
    (group,) = groups_of(tmp_path)
    estimate, interval = over_seeds(group, RETAINED)
    assert (interval, estimate.n) == ("t", 3)
    assert estimate.high - 0.2 == pytest.approx(4.302653 * 0.1 / 3**0.5)


def test_a_point_has_the_interval_of_the_table(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / str(seed), seed=seed, retained=0.2 + 0.1 * seed)
    (group,) = groups_of(tmp_path)
    fields, found = measure_fields(group, ["retained"]), point(group, "retained", 2)
    assert (found.x, found.mean) == (2, pytest.approx(40))
    ends = (100 * fields["retained_low"], 100 * fields["retained_high"])
    assert (found.low, found.high) == pytest.approx(ends)
    assert sorted(found.values) == pytest.approx([30, 40, 50])


def test_measures_are_labelled_with_their_units():
    assert {key: measure.label for key, measure in MEASURES.items()} == {
        "skill": "Learned (points)", "retained": "Retained (% of before)", "op": "OP (%)", "bwt": "BWT (points)",
    }  # fmt: skip
    assert [key for key, measure in MEASURES.items() if not measure.share] == ["skill", "bwt"]


def test_seeds_that_were_run_twice_count_once(tmp_path):
    for name, retained in (("a", 0.4), ("b", 0.6)):
        write_run(tmp_path / name, retained=retained)
    (group,) = groups_of(tmp_path)
    assert seed_scores(group, RETAINED) == {(1, 1): 0.5}
    assert over_seeds(group, RETAINED)[1] == "none, n = 1"


def test_the_skill_of_sequences_is_their_op(tmp_path):
    write_run(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]])
    assert measured_in(groups_of(tmp_path)) == ["retained", "op", "bwt"]
    write_run(tmp_path / "b")
    assert measured_in(groups_of(tmp_path)) == ["skill", "retained", "op", "bwt"]


def test_the_note_counts_runs_and_seeds(tmp_path):
    write_run(tmp_path / "a", "fft")
    assert sample_note(groups_of(tmp_path)) == (
        "Based on 1 run, 1 data seed (1); each setting has one run and therefore no interval."
    )
    for seed in (2, 3):
        write_run(tmp_path / f"b{seed}", seed=seed, draw_seed=7)
    assert sample_note(groups_of(tmp_path)) == (
        "Based on 3 runs, 3 data seeds (1, 2, 3), 2 draw seeds (1, 7); settings with one run have no interval."
    )
