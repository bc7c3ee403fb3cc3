"""Tables and lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(*items: str) -> str:
    return "\n".join(f"* {item}" for item in items)


def number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
