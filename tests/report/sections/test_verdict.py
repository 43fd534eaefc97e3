"""Section: the verdict, in five lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import figure, section, sections_of, table, write_run

from hft_cli.report.groups import compare
from hft_cli.report.reading import find_runs
from hft_cli.report.sections.verdict import judge

RATES = tuple(1e-4 * 1.5**i for i in range(7))


def write_sweep(folder: Path, method: str, better: float, seeds: int = 5, noise: float = 0.01) -> None:
    """Runs that learn more and retain less with the rate; a method keeps `better` more at the same skill."""
    for seed in range(seeds):
        for i, rate in enumerate(RATES):
            wobble = noise * ((seed * 7 + i * 3 + len(method)) % 5 - 2) / 2
            write_run(folder / f"{method}{seed}{i}", method, seed=seed, rate=rate, skill=0.3 + 0.08 * i,
                      retained=0.9 - 0.08 * i + better + wobble)  # fmt: skip


def lines(folder: Path) -> list[str]:
    return [*section(sections_of(folder), "Verdict").text]


@pytest.mark.parametrize(("better", "word"), [(0.06, "better"), (-0.06, "worse"), (0.0, "cannot tell")])
def test_the_verdict_is_that_at_equal_skill(tmp_path, better, word):
    write_sweep(tmp_path, "fft", 0)
    write_sweep(tmp_path, "hft", better)
    one_rate, equal_skill, size, power, verdict = lines(tmp_path)
    assert verdict == f"Verdict at equal skill: {word}: HFT."
    assert one_rate.startswith("At one learning rate (0.00113906, at which FFT learns most), against FFT: HFT retains ")
    assert f"HFT retains {100 * better:+.1f} [" in equal_skill.replace("-0.0 [", "+0.0 [")
    assert "in 5 seeds" in equal_skill or "of 5 seeds" in equal_skill
    assert size == "This rests on 70 runs: 5 data seeds, 5 draws, 4 items of what was known."
    assert power.startswith("A difference at equal skill of ")
    assert figure(sections_of(tmp_path), "frontier")


def test_a_coarse_grid_is_said_in_the_verdict(tmp_path):
    for method in ("fft", "hft"):
        for i, rate in enumerate((1e-4, 1e-3)):
            write_run(tmp_path / f"{method}{i}", method, rate=rate, skill=0.2 + 0.6 * i, retained=0.9 - 0.3 * i)
    assert "coarse, with steps of up to 60 points of skill" in lines(tmp_path)[1]
    write_sweep(tmp_path / "fine", "fft", 0)
    write_sweep(tmp_path / "fine", "hft", 0)
    assert "coarse" not in lines(tmp_path / "fine")[1]


def test_what_a_design_could_have_seen_shrinks_with_its_seeds(tmp_path):
    found = {}
    for seeds in (3, 8):
        write_sweep(tmp_path / str(seeds), "fft", 0, seeds)
        write_sweep(tmp_path / str(seeds), "hft", 0.02, seeds)
        found[seeds] = float(lines(tmp_path / str(seeds))[3].split(" of ")[1].split()[0])
    assert found[8] < found[3]


def test_what_could_have_been_seen_is_more_than_the_half_width(tmp_path):
    write_sweep(tmp_path, "fft", 0)
    write_sweep(tmp_path, "hft", 0.02)
    (gap,) = table(sections_of(tmp_path), "gaps").records
    half = 100 * (gap["gap_high"] - gap["gap_low"]) / 2
    assert float(lines(tmp_path)[3].split(" of ")[1].split()[0]) == pytest.approx(half * (1.96 + 0.84) / 1.96, abs=0.06)


def test_many_methods_are_judged_together(tmp_path):
    write_sweep(tmp_path, "fft", 0)
    write_sweep(tmp_path, "hft", 0.06)
    write_sweep(tmp_path, "lora", 0.0)
    (comparison,) = compare(find_runs([tmp_path]))
    assert judge(comparison).at_equal_skill == {"HFT": "better", "LoRA": "cannot tell"}
    assert lines(tmp_path)[-1] == "Verdict at equal skill: better: HFT; cannot tell: LoRA."


def test_one_rate_and_one_seed_tell_nothing_of_equal_skill(tmp_path):
    write_run(tmp_path / "f", "fft", skill=0.9, retained=0.4)
    write_run(tmp_path / "h", "hft", skill=0.8, retained=0.6)
    one_rate, equal_skill, _, power, verdict = lines(tmp_path)
    assert one_rate.endswith("against FFT: HFT retains +20.0 points and learns -10.0 points.")
    assert equal_skill.startswith("At equal skill: not known. Run several learning rates")
    assert power.endswith("is not known: no two methods were compared at equal skill.")
    assert verdict == "Verdict: cannot tell."


def test_one_seed_says_that_it_is_one(tmp_path):
    write_sweep(tmp_path, "fft", 0, seeds=1)
    write_sweep(tmp_path, "hft", 0.06, seeds=1)
    assert lines(tmp_path)[3].endswith("is not known: there is one seed.")


def test_one_method_has_no_verdict(tmp_path):
    write_sweep(tmp_path, "hft", 0, seeds=1)
    assert not [entry for entry in sections_of(tmp_path) if entry.title.startswith("Verdict")]
