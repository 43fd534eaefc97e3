"""The settings of benchmarks."""

from __future__ import annotations

import pytest

from hft_cli.errors import UserError
from hft_cli.evaluation.benchmarks import benchmark_settings


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nq_open", {"shotts": 3}, "Did you mean 'suite.benchmarks.nq_open.shots'"),
        ("nq_open", {"shots": -1}, "at least 0"),
        ("nq_open", {"samples": 3, "temperature": 1.0}, "are for humaneval"),
        ("nq_opn", {}, "Did you mean 'nq_open'"),
        ("humaneval", {"samples": 3}, "all the same"),
        ("humaneval", {"samples": 3, "temperature": 1.0, "pass_at": [5]}, "k from 1 to"),
    ],
)
def test_wrong_settings_are_refused(name, values, message):
    with pytest.raises(UserError, match=message):
        benchmark_settings(name, values)
