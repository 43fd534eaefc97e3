"""Errors of the harness in one line, with the key to set."""

from __future__ import annotations

import pytest
import torch

from hft_cli.errors import UserError
from hft_cli.evaluation.harness_errors import explain
from hft_cli.launch.jobs import HarnessTask

OURS, THEIRS = (HarnessTask("gsm8k", settings, None, True, "") for settings in ({}, None))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class ConnectError(Exception):
    """As httpx names it."""


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "Lower suite.batch_size."),
        (RuntimeError("CUDA error: out of memory"), "Lower suite.batch_size."),
        (ConnectError("[Errno -2] Name or service not known"), "suite.data_dir=…"),
        (caused(ValueError("Couldn't find the data set"), ConnectError("no route")), "suite.data_dir=…"),
        (
            ValueError(
                "Invalid configuration: requested max tokens to generate (512) must be less than model's maximum "
                "sequence length (512)."
            ),
            "Lower suite.benchmarks.gsm8k.max_new_tokens.",
        ),
        (ValueError("Sample larger than population or is negative"), "Lower suite.benchmarks.gsm8k.shots."),
        (UserError("gsm8k: there is no file"), "gsm8k: there is no file"),
        (UserError("Unknown metric 'x'."), "gsm8k: Unknown metric 'x'."),
        (KeyError("answer"), "gsm8k: KeyError: 'answer'"),
    ],
)
def test_an_error_names_the_benchmark_and_the_key(error, key):
    line = explain(OURS, error)
    assert line.startswith("gsm8k: ")
    assert line.endswith(key) or key in line
    assert "\n" not in line


def test_a_task_without_our_settings_has_no_keys_of_ours():
    assert explain(THEIRS, ValueError("Sample larger than population")).endswith("Leave it out.")
