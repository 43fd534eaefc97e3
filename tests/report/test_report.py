"""`hft report` on run directories made by hand: the numbers in its tables and figures, and what is wrong with a run."""

from __future__ import annotations

import csv
import html.parser
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import environment, hft

from hft_cli.errors import UserError
from hft_cli.report import html as report_html
from hft_cli.report.groups import groups
from hft_cli.report.runs import find_runs, item_scores
from hft_cli.report.sections import overview, weight_change
from hft_cli.report.write import report

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj",
            "mlp.down_proj", "input_layernorm")  # fmt: skip
NAMES = [f"model.layers.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in MATRICES]


def make(
    folder: Path,
    method: str = "hft",
    *,
    skill: float = 0.9,
    retained: float = 0.7,
    seed: int = 1,
    draw_seed: int | None = None,
    level: str = "category",
    ratio: float = 0.5,
    rate: float = 1e-3,
    r: list[list[float | None]] | None = None,
    continual: str = "seqft",
    updated: list[str] | None = None,
    passed: bool | None = True,
    done: bool = True,
    config: dict | None = None,
) -> Path:
    """A run's directory, with the files that a report reads."""
    folder.mkdir(parents=True)
    level = "all" if method == "fft" else level
    selection = {"level": level, "ratio": ratio, "seed": draw_seed, "embeddings": "update"}
    tasks = ["capitals"] if r is None else [f"task{i}" for i in range(len(r))]
    if updated is None:
        updated = NAMES if level == "all" else NAMES[::2]
    rounds = [
        {"name": task, "round": i + 1, "updated_fraction": 0.59, "frozen_bit_identical": True, "train_seconds": 2.0,
         "tokens_per_second": 1000.0, "peak_memory_bytes": 3 << 20}
        for i, task in enumerate(tasks)
    ]  # fmt: skip
    sequence: dict = {"name": continual}
    if r is not None:
        last = [value or 0 for value in r[-1]]
        sequence |= {"tasks": tasks, "metrics": ["exact_match"] * len(r), "R": r, "OP": sum(last) / len(r),
                     "BWT": sum(last[i] - (r[i][i] or 0) for i in range(len(r) - 1)) / (len(r) - 1)}  # fmt: skip

    def scores(own: float, kept: float) -> dict:
        return {
            "pocket": {"facts": {"exact_match": kept, "exact_match_stderr": 0.01, "items": 4}},
            "data": {task: {"exact_match": own, "exact_match_stderr": 0.01, "items": 4} for task in tasks},
        }

    results = {
        "method": method, "stage": "sft", "model": "pocket", "data": "pocket_capitals", "engine": "single",
        "selection": selection, "ratio": ratio, "seed": seed, "learning_rate": rate, "rounds": rounds,
        "eval": {"before": scores(0.0, 1.0), "after": scores(skill, retained)}, "continual": sequence,
        "verification": {"passed": passed, "faults": [] if passed is not False else ["round 1: a frozen tensor"]},
    }  # fmt: skip
    whole = {
        "seed": seed, "output_dir": str(folder), "selection": selection, "method": {"name": method, "stages": ["sft"]},
        "train": {"learning_rate": rate, "max_steps": 10}, "model": {"name": "pocket"},
        "data": {"name": "pocket_capitals" if r is None else "sequence", "path": tasks},
        "continual": {"name": continual, "gem_margin": 0.0}, **(config or {}),
    }  # fmt: skip
    frozen = sorted(set(NAMES) - set(updated))
    draws = [{"name": task, "round": i + 1, "level": level, "updated": updated, "frozen": frozen}
             for i, task in enumerate(tasks)]  # fmt: skip
    plan = [{"number": i + 1, "name": task, "stage": "sft"} for i, task in enumerate(tasks)]
    for name, value in (
        ("results.json", results), ("draws.json", {"rounds": draws}),
        ("plan.json", {"base": str(folder / "gone"), "base_sha256": "0", "rounds": plan}),
        ("environment.json", {"cpus": 2, "gpus": []}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    if done:
        (folder / "DONE").write_text("now\n")
    return folder


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    return pytest.approx(float(text), abs=1e-9)


def plotted(out: list, name: str):
    """The figure of that name, with its axes to look into."""
    (plot,) = [part for section in out for part in section.parts if part.name == name and hasattr(part, "draw")]
    return plot.draw()


def titles(made: list) -> list[str]:
    return [section.title for section in made]


def part(made: list, name: str):
    (found,) = [p for section in made for p in section.parts if p.name == name and not hasattr(p, "draw")]
    return found


# ------------------------------------------------------------------------------------------------ what is wrong is said


def test_every_run_is_in_the_table_with_what_is_wrong_with_it(tmp_path):
    make(tmp_path / "deep/er/good")
    make(tmp_path / "failed", passed=False, done=False, seed=9)
    make(tmp_path / "explored", "half_reset", passed=None)
    make(tmp_path / "cut off", done=False)
    (make(tmp_path / "half way", done=False) / "results.json").unlink()
    log = tmp_path / "half way/rounds/01-capitals/worker.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback\nRuntimeError: out of memory\n")
    (make(tmp_path / "broken") / "results.json").write_text('{"method": "hft"')
    bad = make(tmp_path / "nan")
    (bad / "results.json").write_text((bad / "results.json").read_text().replace("0.7,", "NaN,"))
    said = report([tmp_path], tmp_path / "out")
    rows = {Path(row["run"]).name: row for row in table(tmp_path / "out", "runs")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "verified", "failed": "failed", "explored": "no model written", "cut off": "unfinished",
        "half way": "unfinished", "broken": "results.json is broken", "nan": "results.json is broken",
    }  # fmt: skip
    assert "RuntimeError: out of memory" in rows["half way"]["note"]
    assert "0 of 1 rounds" in rows["half way"]["note"]
    assert "a frozen tensor" in rows["failed"]["note"]
    assert "nan" in rows["nan"]["note"]
    assert all(row["status"] in said for row in rows.values())
    problems = (tmp_path / "out/report.html").read_text()
    assert all(name in problems for name in rows)


def test_runs_that_are_not_verified_count_in_no_mean(tmp_path):
    make(tmp_path / "a", skill=0.8)
    make(tmp_path / "b", skill=0.1, passed=False, seed=2)
    make(tmp_path / "c", skill=0.1, done=False, seed=3)
    report([tmp_path], tmp_path / "out")
    (row,) = table(tmp_path / "out", "methods")
    assert (float(row["skill"]), row["runs"]) == (0.8, "1")


def test_jobs_that_a_sweep_never_began_are_missing_by_name(tmp_path):
    make(tmp_path / "method=fft,seed=1")
    make(tmp_path / "method=fft,seed=2")
    hydra = {"sweeper": {"params": {"+method": "fft,hft", "x": "9"}},
             "overrides": {"task": ["seed=1,2", "data.path=[a,b]"]}}  # fmt: skip
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    missing = {Path(run.row.run).name: run.row.note for run in find_runs([tmp_path]) if run.row.status == "missing"}
    assert missing.keys() == {"method=hft,seed=1", "method=hft,seed=2"}
    assert "+method=hft x=9 seed=1 data.path=[a,b]" in missing["method=hft,seed=1"]


def eval_later(run: Path, suite: str, before: dict[str, list[float]], after: dict[str, list[float]]) -> None:
    """What `hft eval run=RUN models=[before,after] suite=SUITE` leaves: item by item, under names with a key."""
    models = {}
    for when, own in (("before", before), ("after", after)):
        scores, details = {}, {}
        for name, values in own.items():
            file = run / "eval" / when / suite / f"{name}-0123456789ab.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps({"row": f"{name}/{i}", "acc": v}) + "\n" for i, v in enumerate(values)))
            scores[name] = {"acc": sum(values) / len(values), "acc_stderr": 0.1, "items": len(values)}
            details[name] = {"items": str(file.relative_to(run / "eval"))}
        models[when] = {"eval": {suite: scores}, "details": details}
    (run / "eval" / f"{suite}.json").write_text(json.dumps({"suite": suite, "left_out": [], "models": models}))


def test_what_was_scored_later_is_beside_the_papers_table_and_paired_item_by_item(tmp_path):
    knowledge = ("nq_open", "triviaqa", "hotpotqa")
    for method, own in (("fft", [0.0, 0.0, 1.0, 0.0]), ("hft", [1.0, 0.0, 1.0, 0.0])):
        make(tmp_path / method, method=method)
        before = {name: [1.0, 0.0, 1.0, 1.0] for name in knowledge}
        eval_later(tmp_path / method, "knowledge", before, dict.fromkeys(knowledge, own))
    report([tmp_path], tmp_path / "out")
    rows = {row["setting"].split()[0]: row for row in table(tmp_path / "out", "benchmarks")}
    assert [float(rows[name]["knowledge avg"]) for name in ("pocket", "FFT", "HFT")] == [0.75, 0.25, 0.5]
    assert float(rows["HFT"]["NQ"]) == 0.5
    assert "general avg" not in rows["HFT"]
    changes = {(row["method"], row["task"]): row for row in table(tmp_path / "out", "before_after")}
    assert float(changes["FFT", "knowledge/nq_open"]["change"]) == -0.5
    assert changes["FFT", "knowledge/nq_open"]["change_n"] == "4"
    (fft,) = (run for run in find_runs([tmp_path]) if run.row.method == "fft")
    assert fft.row.retained == 0.7  # of the suite that all runs of a sweep have


def test_a_run_given_twice_is_there_once(tmp_path):
    run = make(tmp_path / "run")
    assert len(find_runs([tmp_path, run, tmp_path / "run/../run"])) == 1


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="There is no run in"):
        report([tmp_path / "nowhere"], tmp_path / "out")
    make(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report([tmp_path / "run"], tmp_path / "file")
    ended = hft("report", tmp_path / "nowhere")
    assert (ended.status, ended.err.count("\n")) == (2, 1)


# ------------------------------------------------------------------------------------------------------------- settings


def test_runs_that_differ_in_seeds_alone_are_one_setting_and_others_are_told_apart(tmp_path):
    make(tmp_path / "a", seed=1)
    make(tmp_path / "b", seed=2, draw_seed=7)
    make(tmp_path / "c", config={"train": {"learning_rate": 1e-3, "max_steps": 99}})
    make(tmp_path / "d", config={"continual": {"name": "seqft", "gem_margin": 0.5}})  # GEM's key without GEM
    make(tmp_path / "e", "fft")
    make(tmp_path / "f", "fft", ratio=0.3)  # a ratio where all is updated
    found = {group.label: len(group.runs) for group in groups(find_runs([tmp_path]))}
    assert found == {"FFT max_steps 10": 2, "HFT max_steps 10": 3, "HFT max_steps 99": 1}


def test_the_table_of_methods_has_means_deviations_and_t_intervals(tmp_path):
    for seed, (skill, kept) in enumerate([(0.9, 0.5), (0.8, 0.6), (0.7, 0.7)]):
        make(tmp_path / f"h{seed}", skill=skill, retained=kept, seed=seed)
    make(tmp_path / "f", "fft", skill=0.6)
    report([tmp_path], tmp_path / "out")
    full, half = table(tmp_path / "out", "methods")
    assert (full["method"], full["skill_n"], full["skill_low"], full["interval"]) == ("fft", "1", "", "none, n = 1")
    assert (half["method"], half["skill_n"], half["interval"]) == ("hft", "3", "t")
    assert number(half["skill"]) == 0.8
    assert number(half["retained_sd"]) == 0.1
    assert float(half["retained_high"]) == pytest.approx(0.6 + 4.302653 * 0.1 / 3**0.5)
    shown = part(overview.sections(find_runs([tmp_path]), False), "methods").markdown()
    assert "60.0 ± 10.0 [35.2, 84.8]" in shown


def test_differences_from_fft_are_paired_by_data_seed(tmp_path):
    for seed, base in ((1, 0.2), (2, 0.6)):
        make(tmp_path / f"f{seed}", "fft", seed=seed, retained=base)
        for draw in (1, 2):
            make(tmp_path / f"h{seed}{draw}", seed=seed, draw_seed=draw, retained=base + 0.1 * draw)
    make(tmp_path / "h3", seed=3, draw_seed=1, retained=0.9)  # no FFT to compare with
    make(tmp_path / "other", "fft", rate=7.0)
    (record,) = part(overview.sections(find_runs([tmp_path]), False), "differences").records
    assert (record["setting"], record["against"], record["retained_n"]) == ("HFT lr 0.001", "FFT lr 0.001", 2)
    assert (record["retained"], record["retained_sd"]) == pytest.approx((0.15, 0))


def test_crossed_seeds_are_not_taken_for_independent_runs(tmp_path):
    for draw in (1, 2, 3):
        for data in (1, 2, 3):
            make(tmp_path / f"{draw}{data}", seed=data, draw_seed=draw, retained=0.3 + 0.1 * draw)
    report([tmp_path], tmp_path / "out")
    (row,) = table(tmp_path / "out", "methods")
    assert row["interval"] == "crossed"
    assert float(row["retained_high"]) - 0.5 == pytest.approx(4.302653 * 0.1 / 3**0.5)  # of 3 draws, not of 9 runs


def test_the_methods_figure_shows_the_same_numbers(tmp_path):
    make(tmp_path / "a", "fft", skill=0.6, retained=0.3)
    make(tmp_path / "b", skill=0.5, retained=0.8, seed=1)
    make(tmp_path / "c", skill=0.7, retained=0.8, seed=2)
    figure = plotted(overview.sections(find_runs([tmp_path]), False), "methods")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["FFT", "HFT"]
    points = {(round(x, 6), y) for line in left.lines if line.get_marker() in "os" for x, y in line.get_xydata()}
    assert points == {(60, 0), (60, 1)}
    assert {round(line.get_xdata()[0], 6) for line in right.lines if line.get_marker() in "os"} == {30, 80}


def test_the_tradeoff_figure_is_means_over_seeds_by_learning_rate(tmp_path):
    for seed in (1, 2):
        for rate in (1e-4, 1e-3):
            make(tmp_path / f"{seed}{rate}", seed=seed, rate=rate, skill=0.1 * seed + 100 * rate)
    figure = plotted(overview.sections(find_runs([tmp_path]), False), "tradeoff")
    line = next(line for line in figure.axes[0].lines if line.get_label() == "HFT")
    assert list(line.get_xdata()) == [1e-4, 1e-3]
    assert line.get_ydata() == pytest.approx([16, 25])


# ---------------------------------------------------------------------------------------------------- ratios and levels


def test_the_ratio_curve_ends_in_the_run_that_updates_everything(tmp_path):
    for ratio in (0.25, 0.5, 0.75):
        for seed in (1, 2):
            make(tmp_path / f"{ratio}{seed}", ratio=ratio, seed=seed, skill=ratio + 0.01 * seed)
    make(tmp_path / "fft", "fft", skill=0.99)
    make(tmp_path / "other", "fft", skill=0.11, rate=9e-3)  # not the same in the rest
    made = overview.sections(find_runs([tmp_path]), False)
    records = part(made, "ratio").records
    assert [(record["ratio"], record["runs"]) for record in records] == [(0.25, 2), (0.5, 2), (0.75, 2), (1.0, 1)]
    assert [record["skill"] for record in records] == pytest.approx([0.265, 0.515, 0.765, 0.99])
    line = next(line for line in plotted(made, "ratio").axes[0].lines if line.get_label().startswith("HFT"))
    assert line.get_xydata() == pytest.approx(np.array([[0.25, 26.5], [0.5, 51.5], [0.75, 76.5], [1, 99]]))


def test_levels_stand_beside_each_other_and_beside_the_papers(tmp_path):
    for level, kept in (("category", 0.9), ("layer", 0.8), ("model", 0.7)):
        make(tmp_path / level, level=level, retained=kept)
    make(tmp_path / "fft", "fft", retained=0.5)
    made = overview.sections(find_runs([tmp_path]), False)
    records = part(made, "levels").records
    assert [(r["level"], r["retained"]) for r in records] == [
        ("all", 0.5), ("model", 0.7), ("layer", 0.8), ("category", 0.9)
    ]  # fmt: skip
    theirs = part(made, "paper_levels")
    assert theirs.paper
    assert [r["OP"] for r in theirs.records] == [45.7, 46.9, 47.9, 51.3]


def test_one_ratio_one_level_and_one_rate_make_no_such_sections(tmp_path):
    make(tmp_path / "a")
    found = titles(overview.sections(find_runs([tmp_path]), False))
    assert found == ["The runs", "Methods", "What was updated", "Before and after", "Cost"]


# ------------------------------------------------------------------------------------------------------------- frontier


def test_retention_at_equal_skill_is_read_off_each_seeds_path(tmp_path):
    # On straight lines: FFT keeps 1.0 - 0.5 s, HFT 1.1 - 0.5 s and, with seed 2, 0.1 more each.
    for seed in (1, 2):
        for i, rate in enumerate((1e-4, 1e-3, 1e-2)):
            for method, start in (("fft", 1.0), ("hft", 1.1)):
                skill = 0.2 + 0.3 * i
                kept = start - 0.5 * skill + 0.1 * (seed - 1)
                make(tmp_path / f"{method}{seed}{i}", method, seed=seed, rate=rate, skill=skill, retained=kept)
    made = overview.sections(find_runs([tmp_path]), False)
    records = part(made, "frontier").records
    assert [record["skill"] for record in records] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    for record in records:
        assert record["FFT"] == pytest.approx(1.05 - 0.5 * record["skill"])
        assert record["HFT"] == pytest.approx(1.15 - 0.5 * record["skill"])
        assert (record["HFT - FFT"], record["HFT - FFT_sd"]) == pytest.approx((0.1, 0))
        assert record["HFT - FFT_n"] == 2
    paths = [line.get_xdata() for line in plotted(made, "frontier").axes[0].lines]
    assert len(paths) == 4
    assert all(list(path) == pytest.approx([20, 50, 80]) for path in paths)


def test_methods_without_a_common_skill_are_said_to_have_none(tmp_path):
    for i, rate in enumerate((1e-4, 1e-3)):
        make(tmp_path / f"f{i}", "fft", rate=rate, skill=0.8 + 0.1 * i)
        make(tmp_path / f"h{i}", "hft", rate=rate, skill=0.2 + 0.1 * i)
    (section,) = [s for s in overview.sections(find_runs([tmp_path]), False) if s.title == "Retention at equal skill"]
    assert "no skill that every method and seed reached" in section.text[-1]


# ------------------------------------------------------------------------------------------------------------ sequences


def test_r_is_averaged_cell_by_cell_with_op_bwt_and_blanks(tmp_path):
    make(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]], seed=1)
    make(tmp_path / "b", r=[[0.6, None], [0.6, 0.8]], seed=2)
    make(tmp_path / "c", r=[[0.6, 0.1], [0.5, 0.7]], continual="replay")
    made = overview.sections(find_runs([tmp_path]), False)
    plain, replay = part(made, "sequences").records
    assert (plain["op"], plain["bwt"]) == pytest.approx((0.6, -0.2))
    assert (replay["setting"], replay["op"], replay["bwt"]) == ("HFT + replay", pytest.approx(0.6), pytest.approx(-0.1))
    first, second, _ = plotted(made, "r").axes
    assert [text.get_text() for text in first.texts] == ["70", "50", "70"]
    assert [text.get_text() for text in second.texts] == ["60", "10", "50", "70"]
    assert first.get_title() == "HFT\nOP 60.0, BWT -20.0, n = 2"
    cells = part(made, "r").records
    assert len(cells) == 12
    assert sum(cell["score"] is None for cell in cells) == 2
    assert part(made, "paper_trace").paper


# ------------------------------------------------------------------------------------------------- variance and effects


def test_shares_of_the_variance_of_crossed_seeds(tmp_path):
    for draw in (1, 2, 3):
        for data in (1, 2):
            make(tmp_path / f"{draw}{data}", seed=data, draw_seed=draw, retained=0.5 + 0.1 * draw,
                 skill=0.5 + 0.1 * data)  # fmt: skip
    records = part(overview.sections(find_runs([tmp_path]), False), "variance").records
    skill, kept = records
    assert (skill["measure"], skill["grid"], kept["measure"]) == ("skill", "3 x 2", "retained")
    assert (skill["draw"], skill["data"], skill["rest"]) == pytest.approx((0, 1, 0))
    assert (kept["draw"], kept["data"], kept["rest"]) == pytest.approx((1, 0, 0))
    assert kept["sd"] == pytest.approx(0.1)


def test_effects_of_updating_a_layer_are_found_again(tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(14):
        updated = [name for name in NAMES if rng.random() < 0.5]
        lost = sum(".layers.1." in name for name in updated)
        make(tmp_path / str(seed), level="model", draw_seed=seed, updated=updated, retained=0.9 - 0.05 * lost)
    records = part(overview.sections(find_runs([tmp_path]), False), "effects").records
    layers = {r["term"]: r for r in records if r["family"] == "layer" and r["measure"] == "retained"}
    assert layers["layer 1"]["effect"] == pytest.approx(-0.05)
    assert layers["layer 0"]["effect"] == pytest.approx(0)
    assert {r["term"] for r in records if r["family"] == "category"} == {"attention", "feed-forward", "norm"}


def test_a_draw_under_several_data_seeds_counts_once_among_the_draws(tmp_path):
    for draw in range(5):
        updated = [name for i, name in enumerate(NAMES) if i != draw]
        for data in (1, 2):
            make(tmp_path / f"{draw}{data}", level="model", draw_seed=draw, seed=data, updated=updated)
    (section,) = [s for s in overview.sections(find_runs([tmp_path]), False) if s.title == "Draws against data"]
    assert "HFT: effects by matrix need 7 different draws or more; there are 5." in section.text


def test_too_few_draws_for_effects_are_said(tmp_path):
    for seed in range(3):
        make(tmp_path / str(seed), level="model", draw_seed=seed, updated=NAMES[seed : 2 * seed + 5])
    (section,) = [s for s in overview.sections(find_runs([tmp_path]), False) if s.title == "Draws against data"]
    assert "HFT: effects by layer need 4 different draws or more; there are 3." in section.text


# ---------------------------------------------------------------------------------------------------- draws and weights


def test_the_draws_figure_marks_what_was_updated(tmp_path):
    make(tmp_path / "run", updated=["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    made = overview.sections(find_runs([tmp_path]), False)
    (axes,) = plotted(made, "draws").axes
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == ["q", "k", "v", "o", "up", "down", "input_norm"]
    (dots,) = axes.lines
    assert {(columns[int(x)], int(y)) for x, y in dots.get_xydata()} == {("q", 0), ("up", 1)}
    (record,) = part(made, "draws").records
    assert (record["updated"], record["frozen"], record["share"]) == (2, 12, pytest.approx(1 / 7))


def save(path: Path, tensors: dict[str, np.ndarray], bfloat16: bool = False) -> None:
    """A safetensors file; bfloat16 takes the upper halves of float32."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.astype("<f4")
        own = (raw.view("<u4") >> 16).astype("<u2").tobytes() if bfloat16 else raw.tobytes()
        offsets = [len(data), len(data) + len(own)]
        header[name] = {"dtype": "BF16" if bfloat16 else "F32", "shape": list(values.shape), "data_offsets": offsets}
        data += own
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_norms_are_those_of_the_last_delta_against_the_base(tmp_path, bfloat16, monkeypatch):
    from hft_cli.checkpoint.folders import weights_hash

    monkeypatch.setattr(weight_change, "CHUNK", 3)  # several chunks a tensor
    run, base = make(tmp_path / "run", r=[[0.5, None], [0.5, 0.5]]), tmp_path / "base"
    start = {NAMES[0]: np.full((2, 4), 2.0), NAMES[1]: np.full(4, 1.0), "lm_head.weight": np.full(4, 3.0)}
    save(base / "model.safetensors", start, bfloat16)
    (base / "config.json").write_text("{}")
    save(run / "rounds/01-task0/delta.safetensors", {NAMES[0]: np.full((2, 4), 9.0), NAMES[1]: np.full(4, 1.5)},
         bfloat16)  # fmt: skip
    save(run / "rounds/02-task1/delta.safetensors", {NAMES[0]: np.full((2, 4), 3.0)}, bfloat16)
    plan = json.loads((run / "plan.json").read_text()) | {"base": str(base), "base_sha256": weights_hash(base)}
    (run / "plan.json").write_text(json.dumps(plan))
    found = {record["tensor"]: record["relative"]
             for record in part(overview.sections(find_runs([tmp_path / "run"]), True), "norms").records}  # fmt: skip
    assert found == {NAMES[0]: pytest.approx(0.5), NAMES[1]: pytest.approx(0.5), "lm_head.weight": 0}
    axes = plotted(overview.sections(find_runs([tmp_path / "run"]), True), "norms").axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "50"]
    save(base / "model.safetensors", start | {"lm_head.weight": np.zeros(4)}, bfloat16)
    (section,) = [s for s in overview.sections(find_runs([run]), True) if s.title == "Size of the change"]
    assert "holds other weights now" in section.text[0]


def test_norms_without_the_base_say_why_there_are_none(tmp_path):
    make(tmp_path / "run")
    (section,) = [s for s in overview.sections(find_runs([tmp_path]), True) if s.title == "Size of the change"]
    assert "does not exist any more" in section.text[0]


# ---------------------------------------------------------------------------------------------------- items, cost, page


def test_items_give_a_paired_interval_and_other_rows_are_left_out(tmp_path):
    run = make(tmp_path / "run", retained=0.5)
    for when, values in (("before", [1, 1, 1, 1, 0]), ("after", [1, 0, 1, 0])):
        folder = run / "eval" / when / "pocket"
        folder.mkdir(parents=True)
        lines = [json.dumps({"row": i, "exact_match": float(value), "nll": 9}) for i, value in enumerate(values)]
        (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
    (found,) = find_runs([tmp_path])
    assert item_scores(found, "pocket/facts") == ([1, 1, 1, 1], [1, 0, 1, 0])
    records = {r["task"]: r for r in part(overview.sections([found], False), "before_after").records}
    facts = records["pocket/facts"]
    assert (facts["change"], facts["change_n"]) == (-0.5, 4)
    assert facts["change_low"] == -1
    assert facts["change_high"] == 0
    assert records["data/capitals"]["change"] == 0.9
    assert records["data/capitals"]["change_low"] is None


def test_cost_is_over_runs_with_what_they_ran_on(tmp_path):
    make(tmp_path / "a", seed=1)
    make(tmp_path / "b", seed=2)
    (record,) = part(overview.sections(find_runs([tmp_path]), False), "cost").records
    assert (record["train_seconds"], record["tokens_per_second"]) == (2, 1000)
    assert (record["peak_memory_bytes"], record["hardware"], record["runs"]) == (3 << 20, "2 CPUs", 2)


class Page(html.parser.HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.alternatives: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for key in ("src", "href") if (value := given.get(key))]
        self.ids += [given["id"]] if given.get("id") else []
        self.alternatives += [given.get("alt") or ""] if tag == "img" else []
        if tag not in ("meta", "img", "br", "link"):
            self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.tags.pop() == tag


def test_the_page_needs_nothing_else_and_its_contents_lead_somewhere(tmp_path):
    make(tmp_path / "a<script>alert(1)", "fft")
    make(tmp_path / "b", r=[[0.8, None], [0.4, 0.6]])
    report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    read = Page()
    read.feed(text)
    assert read.tags == []
    assert "<script" not in text
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in read.links)
    inner = [link[1:] for link in read.links if link.startswith("#")]
    assert inner
    assert set(inner) <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert all(read.alternatives)
    assert "From the paper" in text


def test_the_same_runs_give_the_same_bytes(tmp_path):
    make(tmp_path / "runs/a", "fft", r=[[0.8, None], [0.4, 0.6]])
    make(tmp_path / "runs/b", seed=1)
    make(tmp_path / "runs/c", seed=2)
    report([tmp_path / "runs"], tmp_path / "one")
    assert hft("report", tmp_path / "runs", "--out", tmp_path / "two").status == 0  # in a process with other hashes
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one.keys() >= {"tradeoff.svg", "tradeoff.png", "report.html", "runs.md", "runs.csv", "runs.json"}
    assert one == two


def test_tables_of_the_paper_are_apart_and_said_to_be_the_papers(tmp_path):
    make(tmp_path / "a")
    made = overview.sections(find_runs([tmp_path]), False)
    own = [p for section in made for p in section.parts if not getattr(p, "paper", False)]
    assert "Llama" not in report_html.markdown("x", [overview.Section("x", (), own)])
    theirs = part(made, "paper_sft")
    assert "not of these runs" in theirs.caption
    by = {record["model"]: record for record in theirs.records}
    assert (by["7B HFT"]["general avg"], by["7B HFT"]["knowledge avg"], by["13B FFT"]["NQ"]) == (42.9, 18.1, 0.7)


def test_columns_that_others_read_are_still_there(tmp_path):
    make(tmp_path / "a", r=[[0.8, None], [0.4, 0.6]])
    report([tmp_path], tmp_path / "out")
    (row,) = table(tmp_path / "out", "runs")
    assert {"run", "status", "method", "selection", "learning_rate", "seed", "draw_seed", "updated", "skill",
            "retained", "train_seconds", "peak_memory_bytes", "op", "bwt", "scores"} <= row.keys()  # fmt: skip
    assert json.loads(row["scores"])["pocket/facts"] == {"before": 1.0, "after": 0.7}
    (same,) = json.loads((tmp_path / "out/runs.json").read_text())
    assert same["op"] == pytest.approx(0.5)


def test_a_hundred_runs_take_seconds_and_neither_torch_nor_a_figure_too_early(tmp_path):
    for i in range(100):
        make(tmp_path / str(i), ("fft", "hft")[i % 2], seed=i // 20, rate=1e-4 * (1 + i % 20 // 2), skill=i / 100)
    begun = time.perf_counter()
    report([tmp_path], tmp_path / "out")
    assert time.perf_counter() - begun < 20
    code = (
        "import sys, hft_cli.report.write, hft_cli.report.sections.overview; "
        "print(sorted({'torch','matplotlib','scipy'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert ended.stdout == "[]\n"
