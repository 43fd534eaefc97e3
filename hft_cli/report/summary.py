"""A run's summary and its draws, as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hft_cli.files import read_json
from hft_cli.report.runs import read_run
from hft_cli.report.sections.overview import before_after
from hft_cli.report.tables import interval
from hft_cli.report.write import share
from hft_cli.run_dir import RunDir
from hft_cli.text import mebibytes, percent_text, text_table


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
        "peak memory": lambda entry: mebibytes(entry["peak_memory_bytes"]),
        "frozen weights": lambda entry: "bit-identical" if entry["frozen_bit_identical"] else "CHANGED",
    }
    if results["stage"] == "half_reset":  # nothing was trained
        columns = {name: columns[name] for name in ("round", "updated", "seconds")}
    parts = [text_table(list(columns), [[cell(entry) for cell in columns.values()] for entry in results["rounds"]])]
    if changes := before_after(read_run(run)):
        change = interval("change")
        parts.append(
            text_table(
                ["score", "metric", "before", "after", "change in points [95%]"],
                [
                    [
                        str(c["task"]),
                        str(c["metric"]).replace("_", " "),
                        share("before")(c),
                        share("after")(c),
                        change(c),
                    ]
                    for c in changes
                ],
            )
        )
    unmoved = [name for entry in results["rounds"] for name in entry.get("unmoved", ())]
    if "R" in results["continual"]:
        parts.append(_matrix(results["continual"]))
    for entry in results["rounds"]:
        if "checkpoint_bytes" in entry:
            cost = f"{entry['checkpoint_seconds']:.1f} s and {mebibytes(entry['checkpoint_bytes'])}"
            parts.append(f"{entry['name']}: a checkpoint took {cost}.")
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
    rows = [[f"after {task}", *map(percent_text, row)] for task, row in zip(tasks, continual["R"], strict=True)]
    measures = f"OP {100 * continual['OP']:.1f}   BWT {100 * continual['BWT']:+.1f} (absolute points)"
    return f"{text_table(['R', *tasks], rows)}\n{measures}"


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
    table = text_table(["layer", *heads], [[str(n), *(cells[n].get(c, "") for c in columns)] for n in sorted(cells)])
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
