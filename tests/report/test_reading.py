"""Runs in any state, read for the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from report_runs import write_eval, write_run

from hft_cli.errors import UserError
from hft_cli.report.reading import find_runs


def rows(folder: Path) -> dict:
    return {Path(run.row.run).name: run.row for run in find_runs([folder])}


def test_each_run_has_a_status(tmp_path):
    write_run(tmp_path / "deep/er/good")
    write_run(tmp_path / "failed", passed=False, done=False, seed=9)
    write_run(tmp_path / "explored", "half_reset", passed=None)
    write_run(tmp_path / "cut off", done=False)
    (write_run(tmp_path / "half way", done=False) / "results.json").unlink()
    (write_run(tmp_path / "broken") / "results.json").write_text('{"method": "hft"')
    assert {name: row.status for name, row in rows(tmp_path).items()} == {
        "good": "verified", "failed": "failed", "explored": "no model written", "cut off": "unfinished",
        "half way": "unfinished", "broken": "results.json is broken",
    }  # fmt: skip
    assert "a frozen tensor" in rows(tmp_path)["failed"].note


def test_an_unfinished_run_has_its_progress_and_last_error(tmp_path):
    run = write_run(tmp_path / "run", done=False)
    (run / "results.json").unlink()
    log = run / "rounds/01-capitals/worker.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback\nValueError: early\n[rank1]: RuntimeError: out of memory\nbye\n")
    assert rows(tmp_path)["run"].note == "0 of 1 rounds trained; [rank1]: RuntimeError: out of memory"
    (run / "rounds/01-capitals/outcome.json").write_text("{}")
    log.unlink()
    assert rows(tmp_path)["run"].note == "1 of 1 rounds trained"
    (run / "plan.json").write_text("[")
    assert rows(tmp_path)["run"].note == "plan.json is broken"


def test_a_score_that_is_not_finite_breaks_its_run_only(tmp_path):
    results = write_run(tmp_path / "nan") / "results.json"
    results.write_text(results.read_text().replace("0.7,", "NaN,"))
    write_run(tmp_path / "good")
    assert rows(tmp_path)["nan"].status == "results.json is broken"
    assert "nan" in rows(tmp_path)["nan"].note
    assert rows(tmp_path)["good"].status == "verified"


@pytest.mark.parametrize("text", ["", "[1]", '{"rounds": [{"round": 1}]}'])
def test_a_broken_ledger_is_noted(tmp_path, text):
    (write_run(tmp_path / "run") / "draws.json").write_text(text)
    (run,) = find_runs([tmp_path])
    assert (run.row.status, run.row.note, run.draws) == ("verified", "draws.json is missing or broken", ())


def test_a_replay_shares_the_draw_of_its_round(tmp_path):
    file = write_run(tmp_path / "run", r=[[0.5, None], [0.5, 0.5]]) / "draws.json"
    rounds = json.loads(file.read_text())["rounds"]
    file.write_text(json.dumps({"rounds": [*rounds, {**rounds[1], "name": "task1-replay"}]}))
    (run,) = find_runs([tmp_path])
    assert [(draw.round, draw.name) for draw in run.draws] == [(1, "task0"), (2, "task1")]


def test_runs_that_a_sweep_did_not_start_are_missing(tmp_path):
    write_run(tmp_path / "method=fft,seed=1")
    write_run(tmp_path / "method=fft,seed=2")
    hydra = {"sweeper": {"params": {"+method": "fft,hft", "x": "9"}},
             "overrides": {"task": ["seed=1,2", "data.path=[a,b]"]}}  # fmt: skip
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    missing = {name: row.note for name, row in rows(tmp_path).items() if row.status == "missing"}
    assert missing.keys() == {"method=hft,seed=1", "method=hft,seed=2"}
    assert "+method=hft x=9 seed=1 data.path=[a,b]" in missing["method=hft,seed=1"]


def test_a_run_that_is_given_twice_is_read_once(tmp_path):
    run = write_run(tmp_path / "run")
    assert len(find_runs([tmp_path, run, tmp_path / "run/../run"])) == 1


def test_a_place_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"There is no run in .*: no plan\.json in it or below it\."):
        find_runs([tmp_path])


def test_later_scores_are_no_part_of_retention(tmp_path):
    run = write_run(tmp_path / "run", retained=0.7)
    write_eval(run, "knowledge", {"nq_open": [1.0, 1.0]}, {"nq_open": [0.0, 1.0]})
    (read,) = find_runs([tmp_path])
    assert read.row.retained == 0.7
    assert read.row.scores["knowledge/nq_open"] == {"before": 1.0, "after": 0.5}


@pytest.mark.parametrize("text", ["{", "[]", '{"suite": "knowledge"}', '{"suite": "s", "models": {"after": {}}}'])
def test_a_broken_evaluation_does_not_break_its_run(tmp_path, text):
    run = write_run(tmp_path / "run", retained=0.7)
    write_eval(run, "probe", {"facts": [1.0, 1.0]}, {"facts": [0.0, 1.0]})
    (run / "eval/knowledge.json").write_text(text)
    (read,) = find_runs([tmp_path])
    assert (read.row.status, read.row.retained, read.broken) == ("verified", 0.7, ("knowledge",))
    assert read.row.scores["probe/facts"] == {"before": 1.0, "after": 0.5}
    assert read.row.note.startswith("eval/knowledge.json is broken (")


def test_losses_are_over_all_rounds_and_the_last_entry_holds(tmp_path):
    losses = {"a": [(1, 3.0), (4, 9.0), (4, 2.0)], "b": [(1, 5.0), (2, 4.0)]}
    (run,) = find_runs([write_run(tmp_path / "run", losses=losses)])
    assert run.losses == ((1, 3.0), (4, 2.0), (5, 5.0), (6, 4.0))


def test_broken_losses_are_noted_and_the_run_counts(tmp_path):
    folder = write_run(tmp_path / "run", losses={"a": [(1, 3.0)]})
    (folder / "metrics.jsonl").write_text('{"name": "a", "st')
    (run,) = find_runs([folder])
    assert (run.row.note, run.losses, run.counted) == ("metrics.jsonl is broken", (), True)


def test_gpus_are_counted_by_name(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "environment.json").write_text(
        json.dumps({"cpus": 8, "gpus": ["H100, 80 GiB", "H100, 80 GiB", "L4, 24 GiB"]})
    )
    assert find_runs([run])[0].hardware == "2 x H100, 1 x L4"


def change_scores(run: Path, when: str, suite: str, scores: dict) -> None:
    results = json.loads((run / "results.json").read_text())
    results["eval"][when][suite] = scores
    (run / "results.json").write_text(json.dumps(results))


def test_what_is_learned_and_retained_is_relative_to_before(tmp_path):
    run = write_run(tmp_path / "run", skill=0.5, retained=0.6)
    change_scores(run, "before", "data", {"capitals": {"exact_match": 0.2}})
    change_scores(run, "before", "pocket", {"facts": {"exact_match": 0.8}, "text": {"bits_per_byte": 0.9}})
    change_scores(run, "after", "pocket", {"facts": {"exact_match": 0.6}, "text": {"bits_per_byte": 1.2}})
    row = rows(tmp_path)["run"]
    assert row.skill == pytest.approx(0.3)
    assert row.retained == pytest.approx(0.75)  # of both: less bits per byte are better


def test_a_test_set_learns_when_its_loss_falls(tmp_path):
    run = write_run(tmp_path / "run")
    change_scores(run, "before", "data", {"capitals": {"perplexity": 0.9}})
    change_scores(run, "after", "data", {"capitals": {"perplexity": 0.7}})
    assert rows(tmp_path)["run"].skill == pytest.approx(0.2)


def test_a_task_that_nothing_was_known_of_retains_nothing(tmp_path):
    run = write_run(tmp_path / "run", retained=0.6)
    change_scores(run, "before", "pocket", {"facts": {"exact_match": 0.0}})
    assert rows(tmp_path)["run"].retained is None


def test_a_half_reset_is_relative_to_its_base(tmp_path):
    run = write_run(tmp_path / "run", "half_reset", skill=0.5, retained=0.6)
    change_scores(run, "before", "pocket", {"facts": {"exact_match": 0.5}})  # of the tuned model
    assert rows(tmp_path)["run"].retained == pytest.approx(0.6)
    results = json.loads((run / "results.json").read_text())
    del results["eval"]["base"]  # as earlier versions wrote it
    (run / "results.json").write_text(json.dumps(results))
    assert (rows(tmp_path)["run"].skill, rows(tmp_path)["run"].retained) == (None, None)
