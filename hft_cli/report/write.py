"""Runs -> the files of a report. Run directories are read and never written to."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hft_cli.errors import UserError
from hft_cli.files import read_json, write_bytes, write_json, write_text
from hft_cli.report.reading import find_runs
from hft_cli.report.sections import build_sections
from hft_cli.report.tables import Plot, Section, Table, csv_text
from hft_cli.text import plural

# The files that the command names; the others are counted.
MAIN_FILES = ("report.html", "report.md", "report.json", "runs.md", "runs.csv", "runs.json",
              "frontier.png", "tradeoff.png")  # fmt: skip
MOST_ROWS = 60  # of a table on the page; its CSV has all rows


def report(places: Sequence[Path], out: Path, norms: bool = False) -> str:
    """Write the tables, the figures and the page of all runs in `places` into `out`.

    Args:
        places: directories of runs, or folders of such at any depth.
        norms: measure the size of the change of each matrix too, from the weights.

    Returns:
        The verdicts, the table of runs as Markdown, and the names of the files.

    Raises:
        UserError: a place has no run, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Choose a folder.")
    runs = find_runs(places)
    sections = build_sections(runs, norms)
    parts = [part for section in sections for part in section.parts]
    tables = {part.name: part for part in parts if isinstance(part, Table)}
    out.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.csv": table.csv() for name, table in tables.items()}
    texts |= {f"{name}.tex": table.latex() + "\n" for name, table in tables.items() if not table.csv_only}
    texts["runs.csv"] = csv_text([vars(run.row) | {"scores": json.dumps(run.row.scores)} for run in runs])
    texts["runs.md"] = tables["runs"].markdown() + "\n"
    earlier = _files_of_report(out)
    pictures = _write_plots([part for part in parts if isinstance(part, Plot)], out)
    title = f"Half Fine-Tuning: {plural(len(runs), 'run')}"
    for page in ("report.html", "report.md"):
        texts[page] = render_page(f"{page}.jinja", title, sections, pictures)
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / "runs.json", [vars(run.row) for run in runs])
    write_json(out / "report.json", {
        name: {"caption": table.caption, "of_the_paper": table.paper, "rows": list(table.records)}
        for name, table in tables.items()
    })  # fmt: skip
    files = {*texts, "runs.json", "report.json", *(f"{name}.{end}" for name in pictures for end in ("png", "svg"))}
    for name in earlier - files:
        (out / name).unlink(missing_ok=True)
    named = [name for name in MAIN_FILES if name in files]
    verdicts = ["\n".join([entry.title, *entry.text, ""]) for entry in sections if entry.title.startswith("Verdict")]
    return "\n".join(verdicts) + (
        f"{texts['runs.md']}\nIn {out}: {', '.join(named)} and {len(files) - len(named)} more. "
        "All on one page: report.html"
    )


def _files_of_report(out: Path) -> set[str]:
    """The tables and figures of the report in a folder, by what its report.json and report.md name."""
    try:
        tables = [name for name in read_json(out / "report.json") if re.fullmatch(r"[\w-]+", name)]
        text = (out / "report.md").read_text(encoding="utf-8")
        figures = re.findall(r"^!\[.*\]\(([\w-]+)\.svg\)", text, re.MULTILINE)
    except (UserError, OSError, ValueError):
        return set()
    ends = {("csv", "tex"): tables, ("png", "svg"): figures}
    return {f"{name}.{end}" for pair, names in ends.items() for name in names for end in pair}


def _write_plots(plots: Sequence[Plot], out: Path) -> dict[str, bytes]:
    """Write each plot as PNG and SVG. Returns the SVG by name."""
    from hft_cli.report.figures.style import render

    pictures = {}
    for plot in plots:
        png, pictures[plot.name] = render(plot.draw)
        write_bytes(out / f"{plot.name}.png", png)
        write_bytes(out / f"{plot.name}.svg", pictures[plot.name])
    return pictures


def render_page(template: str, title: str, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The report as one page, by a file of templates/.

    `pictures` maps names of plots to SVG. HTML embeds them as images, so that their identifiers do not clash and the
    page needs no file beside it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=".html" in template,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    images = {name: base64.b64encode(svg).decode() for name, svg in pictures.items()}
    page = environment.get_template(template)
    return page.render(title=title, sections=sections, images=images, most_rows=MOST_ROWS)
