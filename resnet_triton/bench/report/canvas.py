"""What all charts share: colours, fonts, scales, and labels that keep clear of each other.

Nothing here goes through pyplot, so no state is shared. Ink, grid and paper are drawn in colours that stand for the
page's own: `page.py` replaces them, and the charts follow a reader's light or dark mode.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from ...support.terminal import printable
from ..results import Row

INK, GRID, PAPER = "#010203", "#c1c2c3", "#fcfdfe"
OURS, BLUE, GREEN, PURPLE = "#d55e00", "#0072b2", "#009e73", "#cc79a7"
"""Okabe and Ito's colours, those with a contrast of 3 or more to white and to black; their black is INK."""

_STYLE: dict[str, Any] = {
    "figure.dpi": 72, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "font.family": "DejaVu Sans", "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 5.5, "hatch.linewidth": 1.0,
    "svg.fonttype": "none", "svg.hashsalt": "resnet-triton", "text.parse_math": False,
}  # fmt: skip
_WIDTH = 7.4  # inches


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib as it is shipped, with this module's looks: a reader's own settings do not come in."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser's fonts will have it
        yield


def canvas(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width, so that text has one size on the page."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure) -> str:
    """The figure as SVG, the same for the same data."""
    file = io.StringIO()
    with style():
        FigureCanvasSVG(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def appearances(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each alternative, the same in every chart. Ours alone have ours, and a thick line."""
    dashes: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5))]
    found: dict[str, dict[str, Any]] = {}
    for ours, colours, markers in ((True, [OURS], "o8H"), (False, [BLUE, GREEN, PURPLE, INK], "s^Dv<>PX*dhp")):
        for i, name in enumerate(dict.fromkeys(row.alternative for row in rows if row.ours is ours)):
            found[name] = {"color": colours[i % len(colours)], "linestyle": dashes[i // len(colours) % len(dashes)],
                           "marker": markers[i % len(markers)], "linewidth": 2.4 if ours else 1.3,
                           "zorder": 3 if ours else 2}  # fmt: skip
    return found


def short(name: str, most: int = 34) -> str:
    """A name that fits beside an axis."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def plain(value: float, _: object = None) -> str:
    """A tick's label without an exponent."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.9f}".rstrip("0")


def logarithmic(axis: Axis, values: Sequence[float], room: float = 1.25) -> None:
    """A logarithmic scale around the values, wide enough to hold at least two ticks at 1, 2 or 5 times 10^n."""
    low, high = min(values) / room, max(values) * room
    if high < 6 * low:
        low, high = (low * high / 6) ** 0.5, (low * high * 6) ** 0.5
    name = "x" if axis is axis.axes.xaxis else "y"
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,), numticks=99))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())


def place(axes: Axes, labels: Iterable[tuple[float, float, str]], taken: list[Bbox], words: list[Bbox]) -> None:
    """Write labels near their points, each where it covers nothing and its line crosses no words; or not at all.

    The axes have to be where they will stay: a layout after this would move points and not what was found free.
    """
    inside = axes.get_window_extent()
    offsets = [(x * side, y * up, "left" if side > 0 else "right")
               for x, y in ((9, 9), (12, 16), (16, 23), (16, 36), (28, 12), (40, 24), (40, 48))
               for up in (1, -1) for side in (1, -1)]  # fmt: skip
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    for x, y, name in labels:
        for dx, dy, side in offsets:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=8.5,
                                 arrowprops=line)  # fmt: skip
            text.set_in_layout(False)
            text.get_window_extent()  # moves it to its place
            box = Text.get_window_extent(text)  # without the line
            ends: list[Any] = [axes.transData.transform((x, y)), (box.x0 + box.width / 2, box.y0 + box.height / 2)]
            leader = Path(ends)
            if _within(box, inside) and not (
                box.count_overlaps([*taken, *words]) or any(leader.intersects_bbox(word) for word in words)
            ):
                words.append(box.padded(1))
                break
            text.remove()


def _within(box: Bbox, outer: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1
