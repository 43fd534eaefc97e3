"""A report as one HTML page and as Markdown. The page needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from hft_cli.report.tables import Plot, Section, Table

MOST_ROWS = 60  # of a table on the page; its CSV has all

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 Georgia, 'Times New Roman', serif; color: #1a1a1a; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1, h2, nav, table, figcaption, caption { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #ccc; }
nav { background: #f5f5f5; padding: .75rem 1.25rem; font-size: .9rem; }
nav ul { margin: .25rem 0; padding-left: 1.1rem; columns: 2; }
a { color: #0b5394; }
figure { margin: 1.25rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #333; margin: .4rem 0; max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
thead th { text-align: left; border-bottom: 2px solid #444; padding: .25rem .7rem .25rem 0; vertical-align: bottom; }
td { border-bottom: 1px solid #e2e2e2; padding: .22rem .7rem .22rem 0; vertical-align: top; }
td.n { white-space: nowrap; }
.paper { border-left: 4px solid #888; background: #f3f3f3; padding: .5rem 0 .5rem .9rem; }
.paper figcaption::before { content: 'From the paper, not from these runs. '; font-weight: 600; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  nav ul { columns: 3; }
  figure, tr { break-inside: avoid; }
  h2, figcaption { break-after: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
}
"""


def page(title: str, made: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures`: a plot's name -> its SVG, put in as an image so that no two share an identifier."""
    nav, body = [], []
    tables = figures = 0
    for number, section in enumerate(made, 1):
        nav.append(f"<li><a href='#s{number}'>{html.escape(section.title)}</a></li>")
        body.append(f"<section>\n<h2 id='s{number}'>{number}. {html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(text)}</p>" for text in section.text]
        for part in section.parts:
            caption = html.escape(part.caption)
            if isinstance(part, Plot):
                figures += 1
                source = base64.b64encode(pictures[part.name]).decode()
                body.append(
                    f"<figure id='figure-{part.name}'>\n<img alt='{html.escape(part.caption, quote=True)}' "
                    f"src='data:image/svg+xml;base64,{source}'>\n"
                    f"<figcaption><strong>Figure {figures}.</strong> {caption}</figcaption>\n</figure>"
                )
                continue
            if part.data:
                body.append(f"<p><code>{part.name}.csv</code>: {caption} {len(part.records)} rows.</p>")
                continue
            tables += 1
            left = len(part.records) - MOST_ROWS
            more = f" The first {MOST_ROWS} of {len(part.records)} rows; {part.name}.csv has all." if left > 0 else ""
            mark = " class='paper'" if part.paper else ""
            body.append(
                f"<figure id='table-{part.name}'{mark}>\n<figcaption><strong>Table {tables}.</strong> {caption}{more}"
                f"</figcaption>\n<div class='wide'>{part.html(MOST_ROWS)}</div>\n</figure>"
            )
        body.append("</section>")
    heads = (
        f"<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>\n<title>{html.escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<nav aria-label='Contents'><strong>Contents</strong>\n<ul>\n{chr(10).join(nav)}\n</ul></nav>\n"
    )
    return heads + "\n".join(body) + "\n</body>\n</html>\n"


def markdown(title: str, made: Sequence[Section]) -> str:
    """The same report as Markdown, with the figures beside it."""
    parts = [f"# {title}"]
    for section in made:
        parts.append(f"## {section.title}")
        parts += section.text
        for part in section.parts:
            if isinstance(part, Plot):
                parts += [f"![{part.name}]({part.name}.svg)", part.caption]
                continue
            if part.data:
                parts.append(f"`{part.name}.csv`: {part.caption} {len(part.records)} rows.")
                continue
            few = Table(part.name, part.caption, part.columns, part.records[:MOST_ROWS])
            left = len(part.records) - MOST_ROWS
            more = f" The first {MOST_ROWS} of {len(part.records)} rows; {part.name}.csv has all." if left > 0 else ""
            parts += [f"{part.caption}{more}", few.markdown()]
    return "\n\n".join(parts) + "\n"
