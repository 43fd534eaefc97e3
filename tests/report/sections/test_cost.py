"""Section: cost."""

from __future__ import annotations

from report_runs import sections_of, table, write_run


def test_cost_is_over_runs_with_their_hardware(tmp_path):
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2)
    cost = table(sections_of(tmp_path), "cost")
    (record,) = cost.records
    assert (record["train_seconds"], record["tokens_per_second"]) == (2, 1000)
    assert (record["peak_memory_bytes"], record["hardware"], record["runs"]) == (3 << 20, "2 CPUs", 2)
    assert cost.body == [["HFT", "2", "2 CPUs", "2.0 (2.0 to 2.0) [2.0, 2.0]", "1,000", "3"]]


def test_runs_that_trained_nothing_have_no_cost(tmp_path):
    results = write_run(tmp_path / "run", "half_reset") / "results.json"
    results.write_text(results.read_text().replace('"train_seconds": 2.0', '"train_seconds": 0.0'))
    assert "Cost" not in [entry.title for entry in sections_of(tmp_path)]
