"""Runs -> tables and figures. Reads run directories, never writes into them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hft_cli.gather import Row, gather, natural, read_run
from hft_cli.page import markdown as as_markdown
from hft_cli.page import page
from hft_cli.run_dir import RunDir, read_json, write_json, write_text
from hft_cli.schema import UserError
from hft_cli.sections import as_json, before_after, sections
from hft_cli.tables import Column, Record, Table, grid, interval, plain, short


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
    if changes := before_after(read_run(run)):
        change = interval("change")
        parts.append(
            _text_table(
                ["score", "metric", "before", "after", "change in points [95%]"],
                [
                    [
                        str(c["task"]),
                        str(c["metric"]).replace("_", " "),
                        _share("before")(c),
                        _share("after")(c),
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
            cost = f"{entry['checkpoint_seconds']:.1f} s and {_mebibytes(entry['checkpoint_bytes'])}"
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


def report(places: Sequence[Path], out: Path, norms: bool = False) -> str:
    """Write the tables, figures and the page of all runs in `places` into `out`.

    Every run found is in the tables, an unfinished or unverified one too, and said to be so. With `norms` the weights
    are read as well, for the size of their change.

    Returns:
        The table of runs, as Markdown, with the names of the files.

    Raises:
        UserError: if there is no run at a place, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Choose a folder.")
    runs = gather(places)
    rows = [run.row for run in runs]
    made = sections(runs, norms)
    runs_table = Table(
        "runs", "Every run found. " + HEADS, _columns(rows), [_record(r) for r in sorted(rows, key=_order)]
    )
    made[0] = replace(made[0], parts=[*made[0].parts, runs_table])
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(rows)
    write_text(out / "runs.md", table + "\n")
    write_text(out / "runs.csv", _csv(rows))
    write_json(out / "runs.json", [vars(row) for row in rows])
    files = ["report.html", "report.md", "report.json", "runs.md", "runs.csv", "runs.json"]
    pictures: dict[str, bytes] = {}
    for part in (part for section in made for part in section.parts if part is not runs_table):
        if isinstance(part, Table):
            write_text(out / f"{part.name}.csv", part.csv())
            files.append(f"{part.name}.csv")
            continue
        from hft_cli.figures import rendered

        png, pictures[part.name] = rendered(part.draw())
        for suffix, data in ((".png", png), (".svg", pictures[part.name])):
            (out / f"{part.name}{suffix}").write_bytes(data)
            files.append(part.name + suffix)
    title = f"Half Fine-Tuning: {len(runs)} run{'s' * (len(runs) != 1)}"
    write_text(out / "report.html", page(title, made, pictures))
    write_text(out / "report.md", as_markdown(title, made))
    write_text(out / "report.json", as_json(made))
    main = [name for name in files if name.startswith(("report.", "runs.", "tradeoff."))]
    return f"{table}\n\nIn {out}: {', '.join(main)} and {len(files) - len(main)} more. All on one page: {main[0]}"


HEADS = "Scores are in %; updated is the share of all elements, embeddings and head included; OP and BWT of sequences."


def _columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the table of runs: those that every report has, and those that some run of these has."""
    return [
        ("method", lambda r: str(r["label"] or r["run"])),
        ("selection", plain("selection")),
        ("learning rate", short("learning_rate")),
        ("seed", plain("seeds")),
        ("skill learned", _share("skill")),
        ("facts retained", _share("retained")),
        ("updated", _share("updated")),
        ("seconds", short("train_seconds", ".1f")),
        ("peak memory", plain("memory")),
        *([("OP", _share("op")), ("BWT", plain("bwt_points"))] if any(row.op is not None for row in rows) else []),
        ("status", plain("status")),
    ]


def _record(row: Row) -> Record:
    seed = "" if row.seed is None else str(row.seed)
    return {
        "run": row.run,
        "label": row.method + (f" + {row.continual}" if row.continual in ("replay", "gem", "lora") else ""),
        "selection": row.selection,
        "learning_rate": row.learning_rate,
        "seeds": seed + ("" if row.draw_seed is None else f", draw {row.draw_seed}"),
        "skill": row.skill,
        "retained": row.retained,
        "updated": row.updated,
        "train_seconds": row.train_seconds,
        "memory": None if row.peak_memory_bytes is None else _mebibytes(row.peak_memory_bytes),
        "op": row.op,
        "bwt_points": None if row.bwt is None else f"{100 * row.bwt:+.1f}",
        "status": row.status,
    }


def _share(key: str) -> Callable[[Record], str]:
    return lambda record: _percent(value) if isinstance(value := record.get(key), int | float) else ""


def markdown(rows: Sequence[Row]) -> str:
    """The runs as a Markdown table, in the order of method, learning rate and seed."""
    columns, records = _columns(rows), [_record(row) for row in sorted(rows, key=_order)]
    return grid([head for head, _ in columns], [[cell(record) for _, cell in columns] for record in records])


def _order(row: Row) -> tuple[Any, ...]:
    where = (row.learning_rate or 0, row.seed or 0, row.draw_seed or 0, natural(row.run))
    return not row.method, row.method, row.continual, row.selection, *where


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    names = [name for name in vars(rows[0]) if name != "scores"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "scores"])
    writer.writerows([*(vars(row)[name] for name in names), json.dumps(row.scores)] for row in rows)
    return text.getvalue()


def _text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *rows]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
