"""Runs -> tables and figures. Reads run directories, never writes into them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hft_cli.run_dir import RunDir, read_json, write_json, write_text
from hft_cli.schema import UserError

# Okabe and Ito's colours, which people who do not see colours well can tell apart; each method has a marker too.
STYLES = {"fft": ("#D55E00", "o"), "hft": ("#0072B2", "s"), "half_reset": ("#CC79A7", "D")}
OTHER_STYLE = ("#009E73", "^")


@dataclass(frozen=True)
class Row:
    """One run in a table. Shares are in [0, 1]; `skill` and `retained` are means over the tasks, None if not scored."""

    run: str
    status: str  # verified, failed or unfinished
    method: str = ""
    continual: str = ""
    selection: str = ""
    learning_rate: float | None = None
    seed: int | None = None
    draw_seed: int | None = None  # where it is not the seed
    updated: float | None = None
    skill: float | None = None
    retained: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    op: float | None = None  # of a sequence of tasks: overall performance and backward transfer
    bwt: float | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # task -> before, after


def summary(run: RunDir) -> str:
    """What a finished run did and scored, in a few lines."""
    results = read_json(run.results)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "round": lambda entry: entry["name"],
        "updated": lambda entry: f"{entry['updated_fraction']:.1%}",
        "steps": lambda entry: str(entry["steps"]),
        "mean loss": lambda entry: f"{entry['loss']:.3f}",
        "seconds": lambda entry: f"{entry['train_seconds']:.1f}",
        "tokens/s": lambda entry: f"{entry['tokens_per_second']:,.0f}",
        "peak memory": lambda entry: _mebibytes(entry["peak_memory_bytes"]),
        "frozen weights": lambda entry: "bit-identical" if entry["frozen_bit_identical"] else "CHANGED",
    }
    if results["stage"] == "half_reset":  # nothing was trained
        columns = {name: columns[name] for name in ("round", "updated", "seconds")}
    parts = [_text_table(list(columns), [[cell(entry) for cell in columns.values()] for entry in results["rounds"]])]
    if scores := _scores(results["eval"]):
        parts.append(
            _text_table(
                ["score", "metric", "before", "after"],
                [
                    [task, _metric(results, task), _percent(pair["before"]), _percent(pair["after"])]
                    for task, pair in scores.items()
                ],
            )
        )
    unmoved = [name for entry in results["rounds"] for name in entry.get("unmoved", ())]
    if "R" in results["continual"]:
        parts.append(_matrix(results["continual"]))
    for entry in results["rounds"]:
        if "rewards/margins" in entry:
            accuracy = entry["rewards/accuracies"]
            parts.append(f"{entry['name']}: reward margin {entry['rewards/margins']:.3f}, accuracy {accuracy:.1%}.")
    if unmoved:
        parts.append(f"Updated, yet not moved (see hft verify): {len(unmoved)} tensors, such as {unmoved[0]}.")
    dropped = sum(entry.get("rows_dropped", 0) for entry in results["rounds"])
    cut = sum(entry.get("rows_truncated", 0) for entry in results["rounds"])
    if dropped or cut:
        parts.append(f"Rows cut at train.max_length: {cut}; left out (why: results.json): {dropped}.")
    folder = run.folder.relative_to(Path.cwd()) if run.folder.is_relative_to(Path.cwd()) else run.folder
    if run.model.exists():
        parts.append(f"Model: {folder / run.model.name}   everything else: {folder}   check: hft verify {folder}")
    return "\n\n".join(parts)


def _matrix(continual: dict[str, Any]) -> str:
    """R as a table: a row after each round, a column for each task, in %; empty where it was not scored."""
    tasks = continual["tasks"]
    rows = [[f"after {task}", *map(_percent, row)] for task, row in zip(tasks, continual["R"], strict=True)]
    measures = f"OP {100 * continual['OP']:.1f}   BWT {100 * continual['BWT']:+.1f} (absolute points)"
    return f"{_text_table(['R', *tasks], rows)}\n{measures}"


def draws_table(run: RunDir) -> str:
    """The ledger as layers by matrices: a sign for each round, ● updated, ○ frozen."""
    rounds = list({entry["round"]: entry for entry in reversed(read_json(run.draws)["rounds"])}.values())[::-1]
    signs: dict[str, str] = {}
    for entry in rounds:
        for sign, names in (("●", entry["updated"]), ("○", entry["frozen"])):
            for name in names:
                signs[name] = signs.get(name, "") + sign
    cells: dict[int, dict[str, str]] = {}
    outside: list[tuple[str, str]] = []
    for name, sign in signs.items():
        found = re.search(r"\.(\d+)\.(.+?)(\.weight)?$", name)
        if found:
            cells.setdefault(int(found.group(1)), {})[found.group(2)] = sign
        else:
            outside.append((name.removesuffix(".weight"), sign))
    columns = sorted({column for row in cells.values() for column in row})
    short = [column.rsplit(".", 1)[-1] for column in columns]
    heads = [s if short.count(s) == 1 else c for s, c in zip(short, columns, strict=True)]
    inside = [sign for row in cells.values() for sign in row.values()]
    times = [sum(sign.count("●") == count for sign in inside) for count in range(len(rounds) + 1)]
    table = _text_table(["layer", *heads], [[str(n), *(cells[n].get(c, "") for c in columns)] for n in sorted(cells)])
    lines = [
        f"round {e['round']} {e['name']}: {e['level']}, ratio {e['ratio']:g}, seed {e['seed']}; reached "
        f"{e['matrices_reached']:.1%} of the layers' matrices, {e['elements_reached']:.1%} of their elements; "
        f"sha256 {e['sha256'][:12]}"
        for e in rounds
    ]
    return "\n".join(
        [
            *lines,
            "",
            "● updated   ○ frozen   one sign a round",
            "",
            table,
            "",
            *(f"{sign}  {name}" for name, sign in outside),
            "",
            "updated in "
            + ", ".join(f"{n} rounds: {times[n]}" for n in range(len(times))).replace("1 rounds", "1 round"),
            *(_never(signs) if len(rounds) > 1 else []),
        ]
    )


def _never(signs: Mapping[str, str]) -> list[str]:
    never = sorted(name for name, sign in signs.items() if "●" not in sign)
    more = f" and {len(never) - 5} more" if len(never) > 5 else ""
    return [f"never updated: {', '.join(never[:5])}{more}"] if never else []


def report(places: Sequence[Path], out: Path) -> str:
    """Write runs.md, runs.csv, runs.json and, where runs are scored, tradeoff.png and .svg into `out`.

    Every run found is in the tables, an unfinished or unverified one too, and said to be so.

    Returns:
        The table, as Markdown, with the names of the files.

    Raises:
        UserError: if there is no run at a place.
    """
    rows = [_row(run) for place in places for run in _runs(place)]
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(rows)
    write_text(out / "runs.md", table + "\n")
    write_text(out / "runs.csv", _csv(rows))
    write_json(out / "runs.json", [vars(row) for row in rows])
    files = ["runs.md", "runs.csv", "runs.json"]
    if any(row.skill is not None and row.retained is not None for row in rows):
        _tradeoff(rows, out)
        files += ["tradeoff.png", "tradeoff.svg"]
    return f"{table}\n\nIn {out}: {', '.join(files)}"


def _runs(place: Path) -> list[RunDir]:
    found = sorted(path.parent for path in [*place.glob("plan.json"), *place.glob("**/plan.json")])
    if not found:
        raise UserError(f"There is no run in {place}: no plan.json in it or below it.")
    return [RunDir(folder) for folder in dict.fromkeys(found)]


def _row(run: RunDir) -> Row:
    if not run.results.exists():
        return Row(run=str(run.folder), status="unfinished")
    try:
        return _scored_row(run, read_json(run.results))
    except (UserError, KeyError, TypeError):  # one run's broken file does not take the others' table away
        return Row(run=str(run.folder), status="results.json is broken")


def _scored_row(run: RunDir, results: dict[str, Any]) -> Row:
    scores = _scores(results["eval"])
    rounds = results["rounds"]
    selection = results["selection"]
    level = selection["level"]
    status = {True: "verified", False: "failed", None: "no model written"}[results["verification"]["passed"]]
    return Row(
        run=str(run.folder),
        status=status,
        method=results["method"],
        continual=results["continual"]["name"],
        selection=level if level == "all" else f"{level} {selection['ratio']:g}",
        learning_rate=results["learning_rate"],
        seed=results["seed"],
        draw_seed=selection["seed"],
        updated=_mean({entry["round"]: entry["updated_fraction"] for entry in rounds}.values()),
        skill=_mean(pair["after"] for task, pair in scores.items() if task.startswith("data/")),
        retained=_mean(pair["after"] for task, pair in scores.items() if not task.startswith("data/")),
        train_seconds=sum(entry["train_seconds"] for entry in rounds),
        peak_memory_bytes=max((entry.get("peak_memory_bytes", 0) for entry in rounds), default=0) or None,
        op=results.get("continual", {}).get("OP"),
        bwt=results.get("continual", {}).get("BWT"),
        scores=scores,
    )


def _scores(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """SUITE/TASK -> the task's own metric before and after; `data` is the suite of what was trained."""
    return {
        f"{suite}/{task}": {"before": _first(metrics), "after": _first(evaluation["after"][suite][task])}
        for suite, tasks in evaluation["before"].items()
        for task, metrics in tasks.items()
    }


def _first(metrics: Mapping[str, float]) -> float:
    """A task's own metric is the first; what follows is its error and counts."""
    return next(iter(metrics.values()))


def _metric(results: Mapping[str, Any], task: str) -> str:
    suite, _, name = task.partition("/")
    return str(next(iter(results["eval"]["after"][suite][name]))).replace("_", " ")


def markdown(rows: Sequence[Row]) -> str:
    """The runs as a Markdown table, in the order of method, learning rate and seed."""
    heads = ["method", "selection", "learning rate", "seed", "skill learned", "facts retained", "updated", "seconds",
             "peak memory", "status"]  # fmt: skip
    body = [
        [
            row.method or row.run,
            row.selection,
            "" if row.learning_rate is None else f"{row.learning_rate:g}",
            ("" if row.seed is None else str(row.seed)) + ("" if row.draw_seed is None else f", draw {row.draw_seed}"),
            _percent(row.skill),
            _percent(row.retained),
            _percent(row.updated),
            "" if row.train_seconds is None else f"{row.train_seconds:.1f}",
            "" if row.peak_memory_bytes is None else _mebibytes(row.peak_memory_bytes),
            row.status,
        ]
        for row in sorted(rows, key=_order)
    ]
    if any(row.op is not None for row in rows):
        heads = [*heads[:-1], "OP", "BWT", heads[-1]]
        ordered = sorted(rows, key=_order)
        body = [
            [*line[:-1], _percent(row.op), "" if row.bwt is None else f"{100 * row.bwt:+.1f}", line[-1]]
            for line, row in zip(body, ordered, strict=True)
        ]
    if any(row.continual not in ("", "seqft") for row in rows):
        heads = [heads[0], "continual", *heads[1:]]
        body = [[line[0], row.continual, *line[1:]] for line, row in zip(body, sorted(rows, key=_order), strict=True)]
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _order(row: Row) -> tuple[Any, ...]:
    return row.method, row.continual, row.selection, row.learning_rate or 0, row.seed or 0, row.draw_seed or 0


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = [name for name in vars(rows[0]) if name != "scores"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "scores"])
    writer.writerows([*(vars(row)[name] for name in names), json.dumps(row.scores)] for row in rows)
    return text.getvalue()


def _tradeoff(rows: Sequence[Row], out: Path) -> None:
    """Skill and retention against the learning rate, and against each other, where up and right is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = [row for row in rows if row.skill is not None and row.retained is not None]
    rate, skill, retained = "Learning rate", "Skill learned (%)", "Facts retained (%)"
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.1), layout="constrained")
    for axes, (across, up) in zip(panels, ((rate, skill), (rate, retained), (skill, retained)), strict=True):
        for method in sorted({row.method for row in scored}):
            colour, marker = STYLES.get(method, OTHER_STYLE)
            own = sorted((row for row in scored if row.method == method), key=lambda r: r.learning_rate or 0)
            if across == rate:
                own = [row for row in own if row.learning_rate is not None]
            values = {
                rate: [row.learning_rate for row in own],
                skill: [100 * (row.skill or 0) for row in own],
                retained: [100 * (row.retained or 0) for row in own],
            }
            axes.plot(
                values[across],
                values[up],
                color=colour,
                marker=marker,
                linewidth=1.2,
                label=method.upper().replace("_", "-"),
            )
        axes.set(xlabel=across, ylabel=up, ylim=(-3, 103), xscale="log" if across == rate else "linear")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    rates = sorted({row.learning_rate for row in scored if row.learning_rate})
    for axes in panels[:2]:
        axes.set_xticks(rates, [f"{value:.0e}".replace("e-0", "e-") for value in rates])
        axes.minorticks_off()
    panels[2].set_xlim(-3, 103)
    panels[2].legend(frameon=False, loc="lower left")
    for suffix in ("png", "svg"):
        figure.savefig(out / f"tradeoff.{suffix}", dpi=150)
    plt.close(figure)


def _text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *rows]
    )


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
