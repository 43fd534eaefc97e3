"""The paper's results."""

from __future__ import annotations

from report_runs import sections_of, table, write_run

from hft_cli.report.published import GENERAL, KNOWLEDGE, paper_table


def test_the_papers_numbers_are_marked_as_the_papers():
    sft = paper_table("paper_sft")
    assert sft.paper
    assert "not of these runs" in sft.caption
    by_model = {record["model"]: record for record in sft.records}
    hft = by_model["7B HFT"]
    assert (hft["general avg"], hft["knowledge avg"], by_model["13B FFT"]["NQ"]) == (42.9, 18.1, 0.7)


def test_averages_are_those_of_the_benchmarks():
    for record in paper_table("paper_sft").records:
        for names, average in ((GENERAL, "general avg"), (KNOWLEDGE, "knowledge avg")):
            mean = sum(record[name] for name in names.values()) / len(names)
            assert abs(mean - record[average]) < 0.11, record["model"]


def test_backward_transfer_has_its_sign():
    assert paper_table("paper_trace").body[2] == ["Replay 7B", "54.3", "54.1", "+1.4", "+2.1"]


def test_our_tables_do_not_mention_the_papers_model(tmp_path):
    write_run(tmp_path / "run", model="llama2_7b", data="tulu_v2")
    sections = sections_of(tmp_path)
    ours = [part for entry in sections for part in entry.parts if not getattr(part, "paper", False)]
    assert not any("Llama" in part.caption for part in ours)
    assert table(sections, "paper_sft").paper


def test_the_papers_numbers_need_its_models_and_data(tmp_path):
    for name, model, data in (("a", "pocket", "tulu_v2"), ("b", "llama2_7b", "pocket_capitals")):
        write_run(tmp_path / name / "run", model=model, data=data)
        assert not any(getattr(part, "paper", False) for entry in sections_of(tmp_path / name) for part in entry.parts)
