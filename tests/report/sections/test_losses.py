"""Section: the loss while training."""

from __future__ import annotations

from report_runs import figure, section, sections_of, write_run


def logged(first: float) -> dict[str, list[tuple[int, float]]]:
    return {"capitals": [(1, first), (10, first / 2)]}


def test_losses_are_a_line_for_each_run_and_a_panel_a_rate(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"hft{seed}", seed=seed, rate=1e-3, losses=logged(seed))
    write_run(tmp_path / "fft", "fft", rate=2e-3, losses=logged(8.0))
    low, high = figure(sections_of(tmp_path), "losses").axes
    assert (low.get_title(), high.get_title()) == ("Learning rate 0.001", "Learning rate 0.002")
    assert [line.get_label() for line in low.lines] == ["HFT", "HFT"]
    assert [line.get_xydata().tolist() for line in low.lines] == [[[1, 1], [10, 0.5]], [[1, 2], [10, 1]]]
    assert [line.get_xydata().tolist() for line in high.lines] == [[[1, 8], [10, 4]]]
    assert low.get_ylim() == high.get_ylim()


def test_of_many_rates_some_are_shown_and_the_ends_are(tmp_path):
    for number in range(1, 12):
        write_run(tmp_path / str(number), rate=number * 1e-4, losses=logged(2.0))
    sections = sections_of(tmp_path)
    titles = [axes.get_title() for axes in figure(sections, "losses").axes if axes.get_visible()]
    assert (len(titles), titles[0], titles[-1]) == (6, "Learning rate 0.0001", "Learning rate 0.0011")
    assert "Of 11 learning rates 6 are shown" in section(sections, "Training").parts[0].caption


def test_runs_without_losses_have_no_such_section(tmp_path):
    write_run(tmp_path / "run")
    write_run(tmp_path / "one", seed=2, losses={"capitals": [(1, 2.0)]})  # a point is no line
    assert "Training" not in [entry.title for entry in sections_of(tmp_path)]
