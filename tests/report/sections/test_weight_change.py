"""Section: size of the change. How a change is measured is tested in tests/report/test_weight_change.py."""

from __future__ import annotations

import pytest
from report_runs import NAMES, figure, section, sections_of, table, write_run

from hft_cli.report.sections import weight_change
from hft_cli.report.weight_change import TensorChange

TITLE = "Size of the change"


@pytest.fixture
def measured(monkeypatch):
    """Two tensors of layers, one outside; the first moves by half in all runs."""
    changes = [
        TensorChange(NAMES[0], 4.0, 2.0),
        TensorChange(NAMES[1], 3.0, 0.0),
        TensorChange("lm_head.weight", 1, 0.1),
    ]
    monkeypatch.setattr(weight_change, "tensor_changes", lambda run, hash_of: changes)


def test_changes_are_shown_by_tensor_and_category(tmp_path, measured):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed)
    sections = sections_of(tmp_path, norms=True)
    assert len(table(sections, "norms").records) == 6
    (record,) = table(sections, "norms_by_category").records
    assert (record["runs"], record["attention"], record["norm"]) == (2, pytest.approx(2 / 5), None)
    assert record["outside the layers"] == pytest.approx(0.1)
    assert [text.get_text() for text in figure(sections, "norms").axes[0].texts] == ["50", "0"]


def test_the_section_needs_the_option(tmp_path, measured):
    write_run(tmp_path / "run")
    assert TITLE not in [entry.title for entry in sections_of(tmp_path)]


def test_runs_that_cannot_be_measured_say_why(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", passed=None, seed=2)
    text = section(sections_of(tmp_path, norms=True), TITLE).text
    assert text[0].startswith(f"Not measured: The run in {tmp_path}/a started from {tmp_path}/a/gone, which does not")
    assert text[1] == f"Not measured: the run in {tmp_path}/b wrote no model."
