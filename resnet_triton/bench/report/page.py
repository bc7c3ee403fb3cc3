"""Results as one HTML file: no script, nothing loaded, light or dark as the reader's browser is set."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from ..results import Results
from . import charts
from .canvas import GRID, INK, PAPER, svg
from .charts import Chart
from .headline import headlines
from .tables import Table, details, others, places, summaries

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1e21; --soft: #565c63; --grid: #d5d8dc; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #121416; --ink: #e6e7e8; --soft: #a2a8ae; --grid: #3a3f45; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
figure { margin: 2rem 0; }
p { max-width: 50rem; color: var(--soft); font-size: .9rem; }
.headline { color: var(--ink); font-size: 1rem; }
figcaption { max-width: 50rem; padding-bottom: .6rem; color: var(--soft); font-size: .9rem; }
figcaption b, caption b, p b { color: var(--ink); }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; max-width: 50rem; height: auto; color: var(--ink); }
svg text { font-family: inherit !important; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; font-weight: normal; vertical-align: top; }
th, td { white-space: nowrap; }
td:last-child { min-width: 12rem; max-width: 32rem; white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft); }
tbody tr { border-bottom: 1px solid var(--grid); }
.right { text-align: right; }
.red { color: #d55e00; font-weight: 600; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(results: Results) -> str:
    """The whole page."""
    shown = summaries(results, "model", every=False)
    folded = [table for suite in ("model", "kernel") for table in summaries(results, suite) if table not in shown]
    parts = [
        "<h1>resnet-triton: benchmark results</h1>",
        *(_place(table) for table in places(results)),
        *(f'<p class="headline">{_text(line)}</p>' for line in headlines(results) or ["No results."]),
        *(_table(table, f"<caption><b>{_text(table.title)}</b></caption>\n") for table in shown),
        *_section("Charts", (_figure(chart, number) for number, chart in enumerate(charts.charts(results)))),
        *_section("More tables", (_folded(table) for table in [*folded, *details(results), *others(results)])),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>resnet-triton: benchmark results</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, parts: Iterable[str]) -> list[str]:
    found = list(parts)
    return [f"<h2>{title}</h2>", *found] if found else []


def _text(value: str) -> str:
    return html.escape(value)


def _place(table: Table) -> str:
    return f"<p><b>{_text(table.title)}</b>: {_text('; '.join(f'{name} {value}' for name, value in table.rows))}.</p>"


def _table(table: Table, caption: str) -> str:
    """The first column names the row. What is WRONG or failed stands out, by more than its words."""
    sides = ["right" if name.startswith(">") else "left" for name in table.columns]
    head = "".join(
        f'<th scope="col" class="{side}">{_text(name.lstrip(">"))}</th>'
        for name, side in zip(table.columns, sides, strict=True)
    )
    body = []
    for row in table.rows:
        cells = [f'<th scope="row" class="{sides[0]}">{_text(row[0])}</th>']
        for cell, side in zip(row[1:], sides[1:], strict=True):
            red = " red" if "WRONG" in cell or "failed: " in cell else ""
            cells.append(f'<td class="{side}{red}">{_text(cell)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table aria-label="{_text(table.title)}">{caption}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def _folded(table: Table) -> str:
    return f"<details><summary>{_text(table.title)} ({len(table.rows)})</summary>\n{_table(table, '')}\n</details>"


def _figure(chart: Chart, number: int) -> str:
    name, _, subject = chart.title.partition(". ")
    caption = f"<figcaption><b>{_text(name)}.</b> {_text(subject)}. {_text(chart.caption)}</figcaption>"
    return f'<figure>{caption}<div class="wide">{_inline(svg(chart.figure), chart.title, f"c{number}-")}</div></figure>'


def _inline(drawing: str, title: str, prefix: str) -> str:
    """An SVG file as part of a page: the page's colours, a title, and identifiers that no other drawing has."""
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawing))
    colours = {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"}

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", match[0])
        text = re.sub(r'((?:href="|url\()#)', rf"\g<1>{prefix}", text)
        return re.sub("|".join(colours), lambda m: colours[m[0]], text)

    drawing = re.sub(r"<[^>]*>", tag, drawing)  # never what stands between tags: that may be a name from the data
    size = re.search(r'viewBox="[^"]*"', drawing)
    start = f'<svg role="img" aria-label="{_text(title)}" {size[0] if size else ""} xmlns="http://www.w3.org/2000/svg" '
    start += f'xmlns:xlink="http://www.w3.org/1999/xlink"><title>{_text(title)}</title>'
    return start + drawing[drawing.index(">") + 1 :].strip()
