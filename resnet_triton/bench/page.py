"""Results as one HTML file with plain charts: no script, nothing loaded."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from .report import Table, Task, case, headlines, no_ratio_reason, tables, views
from .results import Results, best, speedup

_CSS = """
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, Arial, sans-serif; color: #1b1e21;
  background: white; }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
img { max-width: 100%; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #d5d8dc; }
.right { text-align: right; }
.red { color: #b34700; font-weight: 600; }
"""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.color": "#d5d8dc",
    "axes.axisbelow": True,
    "font.size": 9,
}
_OURS, _LOSS = "#d55e00", "#999999"
_OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "black")


def render(results: Results) -> str:
    """The whole page."""
    lines = "".join(f"<p>{html.escape(line)}</p>\n" for line in headlines(results) or ["No results."])
    with matplotlib.style.context(["default", _STYLE]):  # no reader's own settings
        drawn = "".join(_image(title, figure) for title, figure in charts(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>resnet-triton: benchmark results</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>resnet-triton: benchmark results</h1>\n{lines}{drawn}"
        + "\n".join(map(_table, tables(results)))
        + "\n</body>\n</html>\n"
    )


def _image(title: str, figure: Figure) -> str:
    file, title = io.BytesIO(), html.escape(title)
    figure.savefig(file, format="svg")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/svg+xml;base64,{data}">\n'


def _table(table: Table) -> str:
    """What is WRONG or failed stands out."""
    sides = ["right" if name.startswith(">") else "" for name in table.columns]
    names = (html.escape(name.lstrip(">")) for name in table.columns)
    head = "".join(f'<th class="{side}">{name}</th>' for side, name in zip(sides, names, strict=True))
    rows = []
    for row in table.rows:
        reds = [" red" if "WRONG" in cell or "failed: " in cell else "" for cell in row]
        cells = zip(sides, reds, map(html.escape, row), strict=True)
        rows.append("".join(f'<td class="{side}{red}">{cell}</td>' for side, red, cell in cells))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>{html.escape(table.title)}</h2>\n<div><table><tr>{head}</tr>\n{body}\n</table></div>"


# --- charts ----------------------------------------------------------------------------------------------------------


def charts(results: Results) -> Iterator[tuple[str, Figure]]:
    """All that have data, each with one subject and one way of timing: GPU time where there is any."""
    for view, tasks in views(results, "model", preferred=True).items():
        yield f"Speed-up over the best alternative. {view}", speedups(tasks, [case(t) for t in tasks])
        yield f"Latency and throughput. {view}", curves(tasks)
    for view, tasks in views(results, "kernel", preferred=True).items():
        for batch in dict.fromkeys(task[0].batch for task in tasks):
            some = [task for task in tasks if task[0].batch == batch]
            names = [str(task[0].layer) for task in some]
            yield f"Speed-up of each layer at batch {batch}. {view}", speedups(some, names)


def speedups(tasks: Sequence[Task], names: Sequence[str]) -> Figure:
    """A bar for each task, grey where ours is slower; where nothing can be claimed, the reason instead."""
    ratios = [speedup(task) for task in tasks]
    figure = Figure(figsize=(8, 1 + 0.25 * len(tasks)), layout="constrained")  # pyplot would share its state
    axes = figure.add_subplot()
    colours = [_OURS if ratio is not None and ratio >= 1 else _LOSS for ratio in ratios]
    bars = axes.barh(range(len(tasks)), [ratio or 0 for ratio in ratios], color=colours)
    notes = []
    for task, ratio in zip(tasks, ratios, strict=True):
        other = best(task, ours=False)
        notes.append(no_ratio_reason(task) if ratio is None or other is None else f"{ratio:.2f}× {other.alternative}")
    axes.bar_label(bars, notes, padding=3, fontsize=8)
    axes.set_yticks(range(len(tasks)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black")
    axes.margins(x=0.5)
    axes.set_xlabel("time of the best alternative / time of ours, 1 = equally fast; grey where ours is slower")
    return figure


def curves(tasks: Sequence[Task]) -> Figure:
    """Medians of every alternative over the batch sizes; a batch size that is missing breaks the line."""
    batches = [task[0].batch for task in tasks]
    rows = {(row.alternative, row.batch): row for task in tasks for row in task if row.good}
    names = dict.fromkeys(row.alternative for task in tasks for row in task if row.good)
    figure = Figure(figsize=(8, 4 + 0.15 * len(names)), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for i, name in enumerate(names):
        found = [rows.get((name, batch)) for batch in batches]
        times = [row.p50_s or math.nan if row else math.nan for row in found]
        ours = any(row.ours for row in found if row)
        look: dict[str, Any] = {"color": _OURS, "linewidth": 2.5} if ours else {"color": _OTHERS[i % 5]}
        look |= {"marker": "os^Dv<>PX*dh"[i % 12], "markersize": 4}
        latency.plot(batches, [time * 1e3 for time in times], **look)
        rates = [batch / time for batch, time in zip(batches, times, strict=True)]
        throughput.plot(batches, rates, label=name, **look)
    for axes, label in ((latency, "latency (ms)"), (throughput, "throughput (images/s)")):
        axes.set(xscale="log", yscale="log", xlabel="batch size (images)", ylabel=label)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    if names:
        figure.legend(loc="outside lower center", ncols=2)
    return figure
