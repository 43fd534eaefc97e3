"""Section: benchmarks."""

from __future__ import annotations

from report_runs import sections_of, table, write_eval, write_run

KNOWLEDGE = ("nq_open", "triviaqa", "hotpotqa")


def test_later_scores_are_arranged_as_in_the_paper(tmp_path):
    for method, after in (("fft", [0.0, 0.0, 1.0, 0.0]), ("hft", [1.0, 0.0, 1.0, 0.0])):
        before = {name: [1.0, 0.0, 1.0, 1.0] for name in KNOWLEDGE}
        write_eval(write_run(tmp_path / method, method), "knowledge", before, dict.fromkeys(KNOWLEDGE, after))
    benchmarks = table(sections_of(tmp_path), "benchmarks")
    assert benchmarks.headings == ["setting", "NQ", "TriviaQA", "HotpotQA", "knowledge avg"]
    averages = {str(record["setting"]).split()[0]: record["knowledge avg"] for record in benchmarks.records}
    assert averages == {"pocket": 0.75, "FFT": 0.25, "HFT": 0.5}


def test_an_average_needs_all_of_its_benchmarks(tmp_path):
    items = {name: [1.0] for name in KNOWLEDGE}
    two = {name: [1.0] for name in KNOWLEDGE[:2]}
    write_eval(write_run(tmp_path / "hft"), "knowledge", two, two)
    assert table(sections_of(tmp_path), "benchmarks").headings == ["setting", "NQ", "TriviaQA"]
    write_eval(write_run(tmp_path / "fft", "fft"), "knowledge", items, items)
    averages = [record["knowledge avg"] for record in table(sections_of(tmp_path), "benchmarks").records[1:]]
    assert averages == [1.0, None]
