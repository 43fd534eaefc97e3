"""What a run's models are scored on, and when."""

from __future__ import annotations

from dataclasses import replace

from helpers import BASE

from hft_cli.config.schema import RunConfig
from hft_cli.config.suites import BenchmarkConfig, ProbeConfig
from hft_cli.evaluation.suite import Suite
from hft_cli.launch.jobs import RowsTask
from hft_cli.method.rounds import phases
from hft_cli.runner.prepare import Prepared
from hft_cli.runner.training import tasks_after


def prepared(sets: list[str], **continual: object) -> Prepared:
    """A run over data sets that have a test set each, with a suite of a set of rows, a benchmark and a probe."""
    config = RunConfig()
    config.method.name, config.data.path = "hft", [f"{name}.jsonl" for name in sets]
    config.data.test_path = [f"{name}-test.jsonl" for name in sets]
    for key, value in continual.items():
        setattr(config.continual, key, value)
    suite = Suite(
        config.suite, {"facts": RowsTask("f")}, {"nq_open": BenchmarkConfig()}, {"ranking": ProbeConfig("f")}, {}, ()
    )
    return Prepared(config, BASE, phases(config), (), suite, {}, {})


def scored_after(run: Prepared) -> dict[str, list[str]]:
    """Phase -> names of what is scored after it, for phases after which anything is."""
    names = {}
    for phase in run.phases:
        if (tasks := tasks_after(phase, run)) is not None:
            suite = tasks.suite
            names[phase.name] = [*suite.tasks, *suite.benchmarks, *suite.probes, *tasks.tests]
    return names


def test_benchmarks_and_probes_wait_for_the_last_round():
    assert scored_after(prepared(["a", "b", "c"])) == {
        "a": ["facts", "a"],
        "b": ["facts", "a", "b"],
        "c": ["facts", "nq_open", "ranking", "a", "b", "c"],
    }


def test_unseen_tasks_are_scored_after_each_round_on_request():
    assert scored_after(prepared(["a", "b"], score_unseen=True))["a"] == ["facts", "a", "b"]


def test_a_round_with_replay_is_scored_after_its_replay():
    assert list(scored_after(prepared(["a", "b"], name="replay"))) == ["a", "b-replay"]


def test_parts_of_a_set_are_scored_at_its_end():
    config = prepared(["a", "b"]).config
    config.data.rounds_per_set = 3
    divided = replace(prepared(["a", "b"]), config=config, phases=phases(config))
    assert [phase.number for phase in divided.phases if tasks_after(phase, divided)] == [3, 6]
    config.data.path, config.data.test_path = ["a.jsonl"], ["a-test.jsonl"]
    assert scored_after(replace(divided, phases=phases(config))) == {}


def test_a_single_round_is_scored_at_the_end_only():
    assert scored_after(prepared(["a"])) == {}
