"""Section: before and after."""

from __future__ import annotations

from report_runs import sections_of, table, write_items, write_run

from hft_cli.report.items import NO_ITEMS


def test_each_task_of_each_run_is_a_row(tmp_path):
    write_items(write_run(tmp_path / "a", "fft", retained=0.5), "pocket/facts", [1, 1, 1, 1], [1, 0, 1, 0])
    write_run(tmp_path / "b")
    body = table(sections_of(tmp_path), "before_after").body
    assert [line[1:] for line in body] == [
        ["FFT", "pocket/facts", "exact_match", "100.0%", "50.0%", "-50.0 [-85.0, +10.2]", "4",
         "2 of 4 [15.0, 85.0]%", "0 of 0", ""],
        ["FFT", "data/capitals", "exact_match", "0.0%", "90.0%", "+90.0", "", "", "", NO_ITEMS],
        ["HFT", "pocket/facts", "exact_match", "100.0%", "70.0%", "-30.0", "", "", "", NO_ITEMS],
        ["HFT", "data/capitals", "exact_match", "0.0%", "90.0%", "+90.0", "", "", "", NO_ITEMS],
    ]  # fmt: skip
