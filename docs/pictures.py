"""Draw the pictures of how-it-works.md: `python docs/pictures.py` writes the SVG files beside this script.

They need nothing but Python, and come out the same everywhere: a test compares them with the committed ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

INK, SOFT, DULL, FAINT, PAPER = "#1f2328", "#59636e", "#a6b0ba", "#d1d9e0", "#ffffff"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's: told apart by everyone
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE = "#cfe4f1", "#f9dcc8", "#c9eade", "#f2f4f6"


class Picture:
    """An SVG drawing on white paper, which keeps it readable on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
            f"<title>{escape(title)}</title>",
        ]
        self.box(0, 0, width, height, PAPER, radius=8)

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, edge: str = "none", thick: float = 1, radius: float = 0
    ) -> None:
        line = f' stroke="{edge}" stroke-width="{thick:g}"' if edge != "none" else ""
        corner = f' rx="{radius:g}"' if radius else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"{line}{corner}/>')

    def text(
        self, x: float, y: float, words: str, size: float = 13, colour: str = INK, at: str = "start", bold: bool = False
    ) -> None:
        """`at` says which part of the words stands at x: start, middle or end."""
        place = f' text-anchor="{at}"' if at != "start" else ""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}"{place}{weight}>{escape(words)}</text>'
        )

    def line(self, *points: tuple[float, float], colour: str = SOFT, thick: float = 1.2, head: bool = False) -> None:
        """A line through points, with an arrow's head at the last one, which a straight line leads to."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick:g}"/>')
        if head:
            (x0, y0), (x, y) = points[-2:]
            size = max(abs(x - x0), abs(y - y0))
            u, v = (x - x0) / size * 7, (y - y0) / size * 7
            corners = f"{x:g},{y:g} {x - u - v / 2:g},{y - v + u / 2:g} {x - u + v / 2:g},{y - v - u / 2:g}"
            self.parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def bracket(self, x: float, y: float, w: float, words: str, colour: str, up: bool = False) -> None:
        """A brace below (or above) a stretch, and its name."""
        tip = -6 if up else 6
        self.line((x, y), (x, y + tip), (x + w, y + tip), (x + w, y), colour=colour, thick=1.6)
        self.text(x + w / 2, y + (-12 if up else 20), words, 12, colour, "middle")

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, fill: str = PAPER) -> None:
        self.box(x, y, columns * cell, rows * cell, fill, FAINT)
        lines = [f"M{x + i * cell:g} {y:g}v{rows * cell:g}" for i in range(1, columns)]
        lines += [f"M{x:g} {y + i * cell:g}h{columns * cell:g}" for i in range(1, rows)]
        self.parts.append(f'<path d="{"".join(lines)}" stroke="{FAINT}" stroke-width="1"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def box_of_pixels() -> Picture:
    """An output box of 2 x 4 pixels in the corner of four images, and what its nine taps read."""
    art = Picture(900, 400, "A tile is a box of pixels and images; each filter tap reads the same box, shifted")
    side, rows, columns, images = 7, 2, 4, 4

    art.text(30, 36, "Output: one program’s box", 15, bold=True)
    art.text(30, 56, "2 rows × 4 columns × 4 images", 12, SOFT)
    cell, x0, y0, step = 19, 34, 152, 17
    for image in reversed(range(images)):
        x, y = x0 + image * step, y0 - image * step
        art.grid(x, y, side, side, cell)
        for i in range(rows * columns):
            art.box(x + i % columns * cell, y + i // columns * cell, cell, cell, ORANGE, PAPER)
    art.line((x0 + side * cell + 12, y0 + 132), (x0 + side * cell + 12 + 50, y0 + 82), head=True)
    art.text(x0 + side * cell + 44, y0 + 122, "images", 12, SOFT)
    art.text(x0, y0 + side * cell + 20, "7 × 7 pixels an image", 12, SOFT)

    left = 300
    art.text(left, 36, "Input: the same box, shifted", 15, bold=True)
    art.text(left, 56, "one load for each of the filter’s nine taps", 12, SOFT)
    small, pitch = 9, 100
    for tap in range(9):
        r, s = tap // 3 - 1, tap % 3 - 1
        x, y = left + tap % 3 * pitch + small, 76 + tap // 3 * pitch + small
        art.box(x - small, y - small, (side + 2) * small, (side + 2) * small, PALE)
        art.grid(x, y, side, side, small)
        for i in range(rows * columns):
            row, column = i // columns + r, i % columns + s
            inside = row >= 0 and column >= 0
            art.box(x + column * small, y + row * small, small, small, BLUE if inside else DULL, PAPER, 0.8)
        art.box(x + s * small, y + r * small, columns * small, rows * small, "none", INK if r < 0 or s < 0 else BLUE)
    art.box(left, 378, 9, 9, BLUE)
    art.text(left + 15, 387, "pixels", 12, SOFT)
    art.box(left + 72, 378, 9, 9, DULL, SOFT)
    art.text(left + 87, 387, "padding: zeros", 12, SOFT)
    art.text(left + 210, 387, "one of four images", 12, SOFT)

    right = 640
    art.text(right, 36, "Nine products, one sum", 15, bold=True)
    art.text(right, 56, "by tensor cores, 64 channels at a time", 12, SOFT)
    art.box(right, 100, 74, 58, PALE_BLUE, BLUE)
    art.text(right + 37, 126, "32 pixels", 11, at="middle")
    art.text(right + 37, 141, "64 channels", 11, at="middle")
    art.text(right + 86, 135, "×", 18, at="middle")
    art.box(right + 98, 92, 74, 74, PALE_GREEN, GREEN)
    art.text(right + 135, 126, "64 channels", 11, at="middle")
    art.text(right + 135, 141, "64 filters", 11, at="middle")
    art.text(right, 190, "a tap’s pixels and weights", 12, SOFT)
    art.line((right + 86, 204), (right + 86, 238), head=True)
    art.text(right + 98, 226, "added in fp32", 12, SOFT)
    art.box(right + 49, 246, 74, 58, PALE_ORANGE, ORANGE)
    art.text(right + 86, 272, "32 pixels", 11, at="middle")
    art.text(right + 86, 287, "64 filters", 11, at="middle")
    art.text(right, 330, "then batch norm, residual, ReLU,", 12, SOFT)
    art.text(right, 347, "one rounding, one store", 12, SOFT)
    return art


def stem_packing() -> Picture:
    """Two windows of the stem among blocks of 2 x 2 pixels, and the same as views of memory."""
    art = Picture(
        900, 484, "The stem's images in blocks of 2 x 2 pixels x 4 channels, read through overlapping windows"
    )
    cell, x0, y0, rows, columns = 21, 36, 80, 8, 14

    art.text(30, 36, "Pixels, packed in blocks of 2 × 2", 15, bold=True)
    art.text(30, 56, "stride 2 in pixels is stride 1 in blocks", 12, SOFT)
    art.grid(x0, y0, rows, columns, cell)
    art.box(x0 + 2 * cell, y0, 8 * cell, 8 * cell, DULL)
    art.box(x0 + 3 * cell, y0 + cell, 7 * cell, 7 * cell, PALE_BLUE)
    lines = [f"M{x0 + i * cell} {y0}v{rows * cell}" for i in range(0, columns + 1, 2)]
    lines += [f"M{x0} {y0 + i * cell}h{columns * cell}" for i in range(0, rows + 1, 2)]
    art.parts.append(f'<path d="{"".join(lines)}" stroke="{SOFT}" stroke-width="1.2"/>')
    art.box(x0 + 4 * cell, y0, 8 * cell, 8 * cell, "none", ORANGE, 3)
    art.box(x0 + 2 * cell, y0, 8 * cell, 8 * cell, "none", BLUE, 3)
    art.bracket(x0 + 2 * cell, y0 + 8 * cell + 6, 8 * cell, "window of output column q", BLUE)
    art.text(x0 + 12 * cell + 8, y0 + 8 * cell + 26, "and q + 1", 12, ORANGE)

    left = 400
    art.text(left, 36, "A window: 4 × 4 blocks for a 7 × 7 filter", 15, bold=True)
    art.box(left, 84, 18, 18, PALE_BLUE, BLUE)
    art.text(left + 28, 98, "7 × 7 pixels under the filter")
    art.box(left, 112, 18, 18, DULL, SOFT)
    art.text(left + 28, 126, "one row and one column have no weight: the filter is zero there")
    art.text(left, 166, "A window is 4 rows of blocks, so the convolution has 4 taps")
    art.text(left, 186, "of 4 blocks × 16 elements = 64 channels: what tensor cores like.")
    art.text(left, 206, "It costs 1.74 times the arithmetic of 7 × 7 × 3, and no gather.")

    art.text(30, 326, "Memory: one row of blocks is one tap", 15, bold=True)
    art.text(30, 346, "16 elements a block: 2 × 2 pixels of red, green, blue and a zero", 12, SOFT)
    art.text(870, 346, "each window starts 16 elements after the last", 12, SOFT, "end")
    wide, y, x = 120, 362, 30
    for block in range(columns // 2):
        art.box(x + block * wide, y, wide, 26, PALE, SOFT, 1.2)
        for element in range(16):
            colour = ("#e8837c", "#7cc48a", "#86aee8", PAPER)[element % 4]
            art.box(x + block * wide + 5 + element * 7, y + 6, 5, 14, colour, FAINT, 0.6)
    for i, (name, colour) in enumerate((("q", BLUE), ("q + 1", ORANGE), ("q + 2", GREEN))):
        start, level = x + (1 + i) * wide, y + 34 + i * 26
        art.box(start + 1, level, 4 * wide - 2, 20, colour, radius=3)
        art.text(start + 2 * wide, level + 14.5, f"window {name}: 64 elements in a row", 12, PAPER, "middle")
    return art


def time_line() -> Picture:
    """One processor's work on its tiles, as it is and as it is planned. Lengths are drawn, not measured."""
    art = Picture(900, 508, "A warp-specialised program: one warp loads, two groups multiply and store in turns")
    x0, end = 146, 876

    def row(y: float, name: str, note: str = "") -> None:
        art.text(28, y + (13 if note else 19), name)
        art.text(28, y + 28, note, 11, SOFT)
        art.box(x0, y, end - x0, 28, PALE)

    def span(y: float, start: float, length: float, words: str, fill: str, edge: str, colour: str = INK) -> None:
        art.box(x0 + start, y, length, 28, fill, edge)
        art.text(x0 + start + length / 2, y + 18, words, 11, colour, "middle")

    art.text(28, 34, "Plain: all warps load, multiply and store in turn", 15, bold=True)
    row(50, "Eight warps")
    row(90, "Tensor cores")
    for tile in range(2):
        start = tile * 365
        span(50, start, 60, "first load", PALE_GREEN, GREEN)
        span(50, start + 60, 205, f"products of tile {tile + 1}", PALE_BLUE, BLUE)
        span(50, start + 265, 100, "epilogue", PALE_ORANGE, ORANGE)
        art.text(x0 + start + 30, 108, "idle", 11, SOFT, "middle")
        span(90, start + 60, 205, "busy", BLUE, BLUE, PAPER)
        art.text(x0 + start + 315, 108, "idle", 11, SOFT, "middle")

    art.text(28, 168, "For Hopper: one warp loads, two groups of four warps multiply", 15, bold=True)
    row(188, "TMA warp", "a ring of 5 slots")
    row(246, "Group 1", "every other tile")
    row(318, "Group 2", "the others")
    row(390, "Tensor cores")
    slots, steps, load, product, epilogue, first = 5, 6, 18, 25, 110, 26  # lengths in pixels
    begins = [first + step * product for step in range(4 * steps)]
    free = 0
    for step, begin in enumerate(begins):
        start = max(free, begins[step - slots] + product if step >= slots else 0)
        free = start + load
        tile, y = step // steps, 246 + 72 * (step // steps % 2)
        span(188, start, load, str(step % slots), PALE_GREEN, GREEN)
        span(y, begin, product, str(step % slots), PALE_BLUE, BLUE)
        if step == 0:
            art.line((x0 + free, 217), (x0 + begin + 10, 245), colour=GREEN, thick=1.6, head=True)
        if step == slots:
            art.line((x0 + start, 245), (x0 + start, 217), colour=BLUE, thick=1.6, head=True)
        if step % steps == 0:
            art.text(x0 + begin, y + 43, f"tile {tile + 1}", 11, SOFT)
        if step % steps == steps - 1:
            done = begin + product
            length = min(epilogue, end - x0 - done)
            span(y, done, length, "epilogue", PALE_ORANGE, ORANGE)
    span(390, first, 4 * steps * product, "busy: one group multiplies while the other one stores", BLUE, BLUE, PAPER)
    art.line((x0, 438), (end, 438), head=True)
    art.text(end, 456, "time", 12, SOFT, "end")

    art.line((28, 482), (50, 482), colour=GREEN, thick=1.6, head=True)
    art.text(58, 486, "full: the slot’s bytes have arrived", 12, SOFT)
    art.line((290, 482), (312, 482), colour=BLUE, thick=1.6, head=True)
    art.text(320, 486, "empty: its group has read the slot", 12, SOFT)
    art.text(end, 486, "epilogue: batch norm, residual, ReLU, store", 12, SOFT, "end")
    return art


PICTURES = {"box": box_of_pixels, "stem": stem_packing, "time-line": time_line}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
