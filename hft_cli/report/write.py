"""Runs -> tables and figures. Reads run directories, never writes into them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hft_cli.errors import UserError
from hft_cli.files import write_json, write_text
from hft_cli.report.html import markdown as as_markdown
from hft_cli.report.html import page
from hft_cli.report.runs import RunRow, find_runs
from hft_cli.report.sections.overview import as_json, sections
from hft_cli.report.tables import Column, Record, Table, plain, short
from hft_cli.text import markdown_table, mebibytes, natural_order, percent_text


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
    runs = find_runs(places)
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
        from hft_cli.report.figures import rendered

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


def _columns(rows: Sequence[RunRow]) -> list[Column]:
    """The columns of the table of runs: those that every report has, and those that some run of these has."""
    return [
        ("method", lambda r: str(r["label"] or r["run"])),
        ("selection", plain("selection")),
        ("learning rate", short("learning_rate")),
        ("seed", plain("seeds")),
        ("skill learned", share("skill")),
        ("facts retained", share("retained")),
        ("updated", share("updated")),
        ("seconds", short("train_seconds", ".1f")),
        ("peak memory", plain("memory")),
        *([("OP", share("op")), ("BWT", plain("bwt_points"))] if any(row.op is not None for row in rows) else []),
        ("status", plain("status")),
    ]


def _record(row: RunRow) -> Record:
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
        "memory": None if row.peak_memory_bytes is None else mebibytes(row.peak_memory_bytes),
        "op": row.op,
        "bwt_points": None if row.bwt is None else f"{100 * row.bwt:+.1f}",
        "status": row.status,
    }


def share(key: str) -> Callable[[Record], str]:
    return lambda record: percent_text(value) if isinstance(value := record.get(key), int | float) else ""


def markdown(rows: Sequence[RunRow]) -> str:
    """The runs as a Markdown table, in the order of method, learning rate and seed."""
    columns, records = _columns(rows), [_record(row) for row in sorted(rows, key=_order)]
    return markdown_table([head for head, _ in columns], [[cell(record) for _, cell in columns] for record in records])


def _order(row: RunRow) -> tuple[Any, ...]:
    where = (row.learning_rate or 0, row.seed or 0, row.draw_seed or 0, natural_order(row.run))
    return not row.method, row.method, row.continual, row.selection, *where


def _csv(rows: Sequence[RunRow]) -> str:
    text = io.StringIO()
    names = [name for name in vars(rows[0]) if name != "scores"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "scores"])
    writer.writerows([*(vars(row)[name] for name in names), json.dumps(row.scores)] for row in rows)
    return text.getvalue()
