"""Run directories written by hand, for the tests of the report, and access to the parts of a report."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from hft_cli.report.reading import find_runs
from hft_cli.report.sections import build_sections
from hft_cli.report.tables import Plot, Section, Table

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj",
            "mlp.down_proj", "input_layernorm")  # fmt: skip
NAMES = [f"model.layers.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in MATRICES]


def write_run(
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
    data: str = "pocket_capitals",
    model: str = "pocket",
    config: dict | None = None,
    losses: dict[str, list[tuple[int, float]]] | None = None,
) -> Path:
    """A run's directory, with the files that a report reads. `r` is the matrix R of a sequence of tasks, and
    `losses` the entries (step, loss) of metrics.jsonl by round."""
    folder.mkdir(parents=True)
    level = "all" if method == "fft" else level
    updated = updated or (NAMES if level == "all" else NAMES[::2])
    selection = {"level": level, "ratio": ratio, "seed": draw_seed, "embeddings": "update"}
    tasks = ["capitals"] if r is None else [f"task{i}" for i in range(len(r))]
    results = {
        "method": method, "stage": method if method == "half_reset" else "sft", "model": model, "data": data,
        "engine": "single",
        "selection": selection, "ratio": ratio, "seed": seed, "learning_rate": rate,
        "rounds": [_round(i + 1, task) for i, task in enumerate(tasks)],
        "eval": {
            "before": _scores(tasks, 0.0, 1.0), "after": _scores(tasks, skill, retained),
            **({"base": _scores(tasks, 0.0, 1.0)} if method in ("half_reset", "interpolate") else {}),
        },
        "continual": _sequence(continual, tasks, r),
        "verification": {"passed": passed, "faults": [] if passed is not False else ["round 1: a frozen tensor"]},
    }  # fmt: skip
    values = {
        "seed": seed, "output_dir": str(folder), "selection": selection, "method": {"name": method, "stages": ["sft"]},
        "train": {"learning_rate": rate, "max_steps": 10}, "model": {"name": model},
        "data": {"name": data, "path": tasks},
        "continual": {"name": continual, "gem_margin": 0.0}, **(config or {}),
    }  # fmt: skip
    frozen = sorted(set(NAMES) - set(updated))
    draws = [{"name": task, "round": i + 1, "level": level, "updated": updated, "frozen": frozen}
             for i, task in enumerate(tasks)]  # fmt: skip
    plan = [{"number": i + 1, "name": task, "stage": "sft", "data_sha256": "0"} for i, task in enumerate(tasks)]
    for name, value in (
        ("results.json", results), ("draws.json", {"rounds": draws}),
        ("plan.json", {"base": str(folder / "gone"), "base_sha256": "0", "rounds": plan}),
        ("environment.json", {"cpus": 2, "gpus": []}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    if losses:
        logged = ((name, *entry) for name, entries in losses.items() for entry in entries)
        entries = [{"name": name, "step": step, "loss": loss} for name, step, loss in logged]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if done:
        (folder / "DONE").write_text("now\n")
    return folder


def _round(number: int, task: str) -> dict:
    return {"name": task, "round": number, "updated_fraction": 0.59, "frozen_bit_identical": True, "train_seconds": 2.0,
            "tokens_per_second": 1000.0, "peak_memory_bytes": 3 << 20}  # fmt: skip


def _scores(tasks: list[str], skill: float, retained: float) -> dict:
    return {
        "pocket": {"facts": {"exact_match": retained, "exact_match_stderr": 0.01, "items": 4}},
        "data": {task: {"exact_match": skill, "exact_match_stderr": 0.01, "items": 4} for task in tasks},
    }


def _sequence(continual: str, tasks: list[str], r: list[list[float | None]] | None) -> dict:
    if r is None:
        return {"name": continual}
    last = [value or 0 for value in r[-1]]
    changes = [last[i] - (r[i][i] or 0) for i in range(len(r) - 1)]
    return {"name": continual, "tasks": tasks, "metrics": ["exact_match"] * len(r), "R": r, "OP": sum(last) / len(r),
            "BWT": sum(changes) / len(changes)}  # fmt: skip


def write_eval(
    run: Path, suite: str, before: dict[str, list[float]], after: dict[str, list[float]], **more: dict[str, list[float]]
) -> None:
    """What `hft eval run=RUN models=[before,after] suite=SUITE` leaves: item by item, under names with a key."""
    models = {}
    for when, items in {"before": before, "after": after, **more}.items():
        scores, details = {}, {}
        for name, values in items.items():
            file = run / "eval" / when / suite / f"{name}-0123456789ab.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps({"row": f"{name}/{i}", "acc": v}) + "\n" for i, v in enumerate(values)))
            scores[name] = {"acc": sum(values) / len(values), "acc_stderr": 0.1, "items": len(values)}
            details[name] = {"items": str(file.relative_to(run / "eval"))}
        if items:
            models[when] = {"eval": {suite: scores}, "details": details}
    (run / "eval" / f"{suite}.json").write_text(json.dumps({"suite": suite, "left_out": [], "models": models}))


def write_items(run: Path, task: str, before: list[float], after: list[float], base: list[float] = ()) -> None:
    """The scores of single items that training records for SUITE/TASK, and their mean."""
    results = json.loads((run / "results.json").read_text())
    suite, _, name = task.partition("/")
    for when, values in (("before", before), ("after", after), *([("base", base)] if base else ())):
        file = run / "eval" / when / f"{task}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"row": i, "exact_match": float(value), "nll": 9}) for i, value in enumerate(values)]
        file.write_text("\n".join(lines) + "\n")
        results["eval"].setdefault(when, {}).setdefault(suite, {})[name] = {
            "exact_match": sum(values) / len(values), "exact_match_stderr": 0.01, "items": len(values),
        }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))


def sections_of(folder: Path, norms: bool = False) -> list[Section]:
    """The sections of a report on all runs below a folder."""
    return build_sections(find_runs([folder]), norms)


def section(sections: list[Section], title: str) -> Section:
    (match,) = [entry for entry in sections if entry.title == title]
    return match


def table(sections: list[Section], name: str) -> Table:
    (match,) = [part for entry in sections for part in entry.parts if isinstance(part, Table) and part.name == name]
    return match


def figure(sections: list[Section], name: str) -> Figure:
    """The figure of that name, with its axes to look into."""
    (match,) = [part for entry in sections for part in entry.parts if isinstance(part, Plot) and part.name == name]
    return match.draw()
