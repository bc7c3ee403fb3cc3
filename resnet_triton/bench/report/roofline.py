"""The roofline: what each layer reaches, under what the device's memory and its matrix units were measured to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ..results import best, speedup
from .canvas import BLUE, GRID, INK, OURS, canvas, logarithmic, place, short, style
from .tables import digits
from .views import Roof, Task, obstacle


class _Point(NamedTuple):
    """A layer on the roofline: FLOP per byte, FLOP/s of ours and of the best alternative, speed-up."""

    layer: str
    x: float
    ours: float | None
    other: float | None
    ratio: float | None


def roofline(tasks: Sequence[Task], limits: Roof) -> Figure | None:
    """Every layer as a point, filled for ours and hollow for the best alternative, under what the device can do."""
    points = [point for task in tasks if (point := _point(task)) is not None]
    if not points:
        return None
    heights = [y for point in points for y in (point.ours, point.other) if y]
    unit, scale = ("TFLOP/s", 1e-12) if max(*heights, limits.flops_per_s or 0) >= 1e12 else ("GFLOP/s", 1e-9)
    with style():
        figure, axes = canvas(4.4)
        for point in points:
            axes.plot([point.x] * 2, [(y or math.nan) * scale for y in (point.other, point.ours)], color=GRID, zorder=1)
        for name, marker, colour, face in (("best alternative", "s", BLUE, "none"), ("ours", "o", OURS, OURS)):
            shown = [(p.x, y * scale) for p in points if (y := p.ours if name == "ours" else p.other)]
            if shown:
                axes.plot(*zip(*shown, strict=True), marker, color=colour, mfc=face, ms=4.8, label=name, zorder=3)
        axes.set(xlabel="arithmetic intensity (FLOP per byte of least traffic)", ylabel=f"performance ({unit})")
        knee = limits.flops_per_s / limits.bytes_per_s if limits.flops_per_s and limits.bytes_per_s else None
        logarithmic(axes.xaxis, [*(p.x for p in points), *([knee / 3] if knee else [])], room=1.6)
        logarithmic(axes.yaxis, [y * scale for y in (*heights, limits.flops_per_s) if y], room=1.9)
        figure.legend(loc="outside lower center", ncols=2, reverse=True)
        figure.draw_without_rendering()  # places the axes; what follows has to know where
        taken, words = _ceilings(axes, limits, knee, unit, scale)
        for point in points:
            for y in (point.ours, point.other):
                if y:
                    x0, y0 = axes.transData.transform((point.x, y * scale))
                    taken.append(Bbox.from_bounds(x0 - 4, y0 - 4, 8, 8))
        found = _standing_out(points)
        place(axes, [(p.x, (p.ours or 0) * scale, f"{short(p.layer)} {p.ratio:.2f}×") for p in found], taken, words)
    return figure


def _point(task: Task) -> _Point | None:
    work, traffic = task[0].flops, task[0].bytes
    if not work or not traffic:
        return None
    ours, other = (work / row.p50_s if (row := best(task, ours=side)) and row.p50_s else None for side in (True, False))
    ours = None if obstacle(task) == "ours is WRONG" else ours
    return _Point(str(task[0].layer), work / traffic, ours, other, speedup(task)) if ours or other else None


def _standing_out(points: Sequence[_Point]) -> list[_Point]:
    """The two worst and the two best, once each."""
    ranked = sorted((p for p in points if p.ratio), key=lambda p: p.ratio or 0)
    return list(dict.fromkeys([*ranked[:2], *ranked[::-1][:2]]))


def _ceilings(axes: Axes, limits: Roof, knee: float | None, unit: str, scale: float) -> tuple[list[Bbox], list[Bbox]]:
    """Both ceilings with their values; returns the places that lines and words take."""
    left, right = axes.get_xlim()
    bottom, _ = axes.get_ylim()
    taken: list[Bbox] = []
    words: list[Bbox] = []
    if limits.bytes_per_s:
        rate = limits.bytes_per_s * scale
        start, end = max(left, bottom / rate), knee or right
        (x0, y0), (x1, y1) = axes.transData.transform([(start, start * rate), (end, end * rate)])
        axes.plot([start, end], [start * rate, end * rate], color=INK, linewidth=1.4, zorder=2)
        taken += [Bbox.from_bounds(x0 + i / 50 * (x1 - x0), y0 + i / 50 * (y1 - y0), 1, 1) for i in range(51)]
        angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
        text = f"memory {digits(limits.bytes_per_s, 1e-9)} GB/s"
        words.append(_write(axes, text, (start, start * rate), (6, 10), rotation=angle))
    if limits.flops_per_s:
        y = limits.flops_per_s * scale
        axes.plot([knee or left, right], [y, y], color=INK, linewidth=1.4, zorder=2)
        (x0, y0), (x1, _) = axes.transData.transform([(knee or left, y), (right, y)])
        taken += [Bbox.from_bounds(x0, y0 - 1, x1 - x0, 2)]
        words.append(_write(axes, f"matrix product {digits(y)} {unit}", (right, y), (-3, 4), ha="right"))
    return taken, words


def _write(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **how: Any) -> Bbox:
    label = axes.annotate(text, at, offset, textcoords="offset points", rotation_mode="anchor", **how)
    label.set_in_layout(False)
    return label.get_window_extent()
