"""Section: time, speed and memory of training."""

from __future__ import annotations

from hft_cli.report.groups import Comparison, group_runs
from hft_cli.report.measures import sample_note, setting_fields
from hft_cli.report.stats import estimate
from hft_cli.report.tables import (
    Record,
    Section,
    Table,
    columns,
    estimate_cell,
    estimate_fields,
    formatted,
    plain,
)

TEXT = "The paper reports about 30% less training time for HFT than for FFT (Llama 2; read from a summary of it)."

CAPTION = (
    "Cost of training without evaluation: mean ± standard deviation [95% t interval] over runs. Peak memory is that of "
    "the rank that used most. Times of runs that ran side by side, or on different hardware, cannot be compared."
)

MEASURED = ("train_seconds", "tokens_per_second", "peak_memory_bytes")


def section(comparison: Comparison) -> Section | None:
    groups = group_runs(run for run in comparison.runs if run.row.train_seconds)
    if not groups:
        return None
    records: list[Record] = []
    for group in groups:
        record = setting_fields(group) | {"hardware": " / ".join(sorted({run.hardware for run in group.runs})) or None}
        for key in MEASURED:
            values = [value for run in group.runs if (value := getattr(run.row, key)) is not None]
            record |= estimate_fields(key, estimate(values))
        records.append(record)
    shown = [
        *columns("setting", "runs"), ("on", plain("hardware")),
        ("training (s)", estimate_cell("train_seconds", scale=1)),
        ("tokens/s", formatted("tokens_per_second", ",.0f")),
        ("peak memory (MiB)", formatted("peak_memory_bytes", ",.0f", 1 / 2**20)),
    ]  # fmt: skip
    return Section("Cost", [TEXT], [Table("cost", f"{CAPTION} {sample_note(groups)}", shown, records)])
