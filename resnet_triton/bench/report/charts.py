"""Results as figures. Each function returns a Figure that tests can take apart, or None if there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ...support.terminal import printable
from ..results import Results, Row, best, speedup
from .canvas import BLUE, INK, OURS, PAPER, appearances, canvas, logarithmic, short, style
from .roofline import roofline
from .tables import digits
from .views import Task, obstacle, preferred, roof, views


class Chart(NamedTuple):
    """A figure and what is said about it."""

    title: str
    caption: str
    figure: Figure


class Measure(NamedTuple):
    """What a line shows of a row: low, middle and high, or None if the row does not have it."""

    label: str
    read: Callable[[Row], tuple[float, float, float] | None]


LATENCY = Measure("latency (ms)", lambda r: _times(r, lambda t: t * 1e3))
THROUGHPUT = Measure("throughput (images/s)", lambda r: _times(r, lambda t: r.batch / t))
MEMORY = Measure("peak memory (MiB)", lambda r: (r.peak_bytes / 2**20,) * 3 if r.good and r.peak_bytes else None)


def _times(row: Row, convert: Callable[[float], float]) -> tuple[float, float, float] | None:
    if not row.good or row.p50_s is None or row.p20_s is None or row.p80_s is None:
        return None
    return convert(row.p20_s), convert(row.p50_s), convert(row.p80_s)


def charts(results: Results) -> Iterator[Chart]:
    """All that have data. One subject and one way of timing in each: GPU time where there is any, else wall clock."""
    looks = appearances([row for row in results.rows if row.suite == "model"])
    models, kernels = views(results, "model"), views(results, "kernel")
    for view in preferred(models):
        rows = [row for task in models[view] for row in task]
        related = [row for other, tasks in models.items() if other[:-2] == view[:-2] for task in tasks for row in task]
        drawn = {
            f"Speed-up over the best alternative. {view}": (speedups(models[view], _batch), _BARS),
            f"Latency. {view}": (lines(rows, LATENCY, looks), _LINES),
            f"Throughput. {view}": (lines(rows, THROUGHPUT, looks), _LINES),
            f"Start-up at batch {_first_batch(related)}. {view.subject}": (startup(related), _START),
            f"Peak memory. {view.subject}": (lines(related, MEMORY, looks), "Above parameters and images."),
        }
        yield from _known(drawn)
    for view in preferred(kernels):
        for batch in dict.fromkeys(task[0].batch for task in kernels[view]):
            tasks = [task for task in kernels[view] if task[0].batch == batch]
            drawn = {
                f"Speed-up of each layer at batch {batch}. {view}": (speedups(tasks, _layer), _BARS),
                f"Roofline at batch {batch}. {view}": (roofline(tasks, roof(results, view.dtype)), _ROOF),
            }
            yield from _known(drawn)


_BARS = "Time of the best alternative, named on the right, over time of ours; hatched where ours is slower."
_LINES = "Medians, with bars from the 20th to the 80th percentile. Wrong and unchecked answers are in the tables only."
_START = "The first call in a new process, with the compilers' caches empty and full."
_ROOF = (
    "Layers by FLOPs and least memory traffic; the lines are what plain code reached on the same device. "
    "Layers without FLOPs are left out."
)


def _known(drawn: dict[str, tuple[Figure | None, str]]) -> Iterator[Chart]:
    for title, (figure, caption) in drawn.items():
        if figure is not None:
            yield Chart(printable(title), caption, figure)


def _batch(task: Task) -> str:
    return f"batch {task[0].batch}"


def _layer(task: Task) -> str:
    return str(task[0].layer)


def speedups(tasks: Sequence[Task], label: Callable[[Task], str]) -> Figure | None:
    """A bar for each task, from the top, its value on the right; where nothing can be claimed, the reason instead."""
    ratios = [speedup(task) for task in tasks]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return None
    with style():
        figure, axes = canvas(0.7 + 0.24 * len(tasks))
        notes = []
        for y, (task, ratio) in enumerate(zip(tasks, ratios, strict=True)):
            other = best(task, ours=False)
            if ratio is None or other is None:
                notes.append(obstacle(task))
                continue
            notes.append(f"{ratio:.2f}× against {short(other.alternative)}")
            look: dict[str, Any] = {"facecolor": OURS} if ratio >= 1 else {"facecolor": PAPER, "hatch": "////"}
            axes.barh(y, ratio, height=0.68, edgecolor=OURS, linewidth=1.2, **look)
        axes.axvline(1, color=INK, linewidth=1.2, zorder=3)
        axes.set(xlim=(0, max(1.0, *known) * 1.04), ylim=(len(tasks) - 0.4, -0.6))
        axes.set_xlabel("time of the best alternative / time of ours (×), 1 = equally fast")
        axes.set_yticks(range(len(tasks)), [short(label(task)) for task in tasks])
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(tasks)), notes)
        for axis in (axes.yaxis, right.yaxis):
            axis.set_tick_params(length=0)
        right.spines["right"].set_visible(False)
        axes.grid(axis="y", visible=False)
    return figure


def lines(rows: Sequence[Row], measure: Measure, looks: dict[str, dict[str, Any]]) -> Figure | None:
    """A line for each alternative over the batch sizes, with a band from low to high."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for row in rows:
        if (values := measure.read(row)) is not None:
            found.setdefault(row.alternative, {}).setdefault(row.batch, values)
    if not found:
        return None
    with style():
        batches = sorted({row.batch for row in rows})
        figure, axes = canvas(3.7 + 0.17 * ((len(found) + 1) // 2))
        for name, points in sorted(found.items(), key=lambda item: -item[1][max(item[1])][1]):
            # A batch size that is missing breaks the line: it was not measured to lie between its neighbours.
            low, middle, high = zip(*(points.get(batch, (math.nan,) * 3) for batch in batches), strict=True)
            axes.plot(batches, middle, label=short(name, 40), **looks[name])
            axes.vlines(batches, low, high, color=looks[name]["color"], linewidth=looks[name]["linewidth"], zorder=2)
        seen = sorted({batch for points in found.values() for batch in points})
        ends = [value for points in found.values() for point in points.values() for value in point]
        axes.set(xlabel="batch size (images)", ylabel=measure.label)
        logarithmic(axes.yaxis, ends)
        logarithmic(axes.xaxis, [float(batch) for batch in seen])
        kept = [seen[0]]
        for batch in seen[1:]:
            kept += [batch] if batch >= 1.45 * kept[-1] else []
        axes.set_xticks(kept, [str(batch) for batch in kept])
        figure.legend(loc="outside lower center", ncols=2, handlelength=3.6)
    return figure


def _first_batch(rows: Sequence[Row]) -> int | None:
    return min((r.batch for r in rows if r.good and (r.first_call_cold_s or r.first_call_warm_s)), default=None)


def startup(rows: Sequence[Row]) -> Figure | None:
    """Two points for each alternative, at the smallest batch size that has any."""
    batch = _first_batch(rows)
    found: dict[str, Row] = {}
    for row in rows:
        if row.good and row.batch == batch and (row.first_call_cold_s or row.first_call_warm_s):
            found.setdefault(row.alternative, row)
    if not found:
        return None
    with style():
        figure, axes = canvas(1.1 + 0.24 * len(found))
        order = sorted(found.values(), key=lambda r: r.first_call_cold_s or r.first_call_warm_s or 0)
        for y, row in enumerate(order):
            colour = OURS if row.ours else BLUE
            calls = ((row.first_call_cold_s, "o", colour), (row.first_call_warm_s, "D", PAPER))
            marks = sorted(((value, marker, face) for value, marker, face in calls if value), key=lambda m: m[0])
            axes.plot([value for value, *_ in marks], [y] * len(marks), color=colour, linewidth=1.2, zorder=2)
            for i, (value, marker, face) in enumerate(marks):
                left = i < len(marks) - 1
                axes.plot([value], [y], marker, color=colour, markerfacecolor=face, zorder=3)
                axes.annotate(digits(value), (value, y), (-6 if left else 6, 0), textcoords="offset points",
                              va="center", ha="right" if left else "left", fontsize=8.5)  # fmt: skip
        for marker, face, name in (("o", INK, "caches empty (cold)"), ("D", PAPER, "caches full (warm)")):
            axes.plot([], [], marker, color=INK, markerfacecolor=face, label=name)
        logarithmic(axes.xaxis, [v for r in order for v in (r.first_call_cold_s, r.first_call_warm_s) if v], room=2)
        axes.set(xlabel="first call (s)", ylim=(len(found) - 0.4, -0.6))
        axes.set_yticks(range(len(found)), [short(row.alternative) for row in order])
        axes.yaxis.set_tick_params(length=0)
        figure.legend(loc="outside lower center", ncols=2)
    return figure
