"""Which sections a report has, and in which order."""

from __future__ import annotations

from report_runs import sections_of, write_run

from hft_cli.report.sections import SECTIONS


def titles(folder):
    return [entry.title for entry in sections_of(folder)]


def test_one_run_has_no_sweeps_to_show(tmp_path):
    write_run(tmp_path / "a")
    assert titles(tmp_path) == ["Methods", "The runs", "What was updated", "Before and after", "Cost"]


def test_each_data_set_has_its_own_comparison(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=2)
    write_run(tmp_path / "c", r=[[0.8, None], [0.4, 0.6]])
    assert titles(tmp_path) == [
        "Methods: pocket_capitals 1", "Methods: pocket_capitals 2",
        "Sequences of tasks: pocket_capitals 2", "The runs", "What was updated", "Before and after", "Cost",
    ]  # fmt: skip


def test_a_table_of_the_paper_is_shown_once(tmp_path):
    for data in ("tulu_v2", "ultrafeedback"):
        write_run(tmp_path / data, model="llama2_7b", data=data, config={"data": {"name": data, "path": data}})
    names = [part.name for entry in sections_of(tmp_path) for part in entry.parts]
    assert names.count("paper_sft") == 1


def test_sections_are_one_function_of_a_file_each():
    assert {build.__name__ for build, _ in SECTIONS} == {"section"}
    assert len({build.__module__ for build, _ in SECTIONS}) == len(SECTIONS)
