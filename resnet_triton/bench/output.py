"""The files of a run: data, tables and the page of charts."""

from __future__ import annotations

from pathlib import Path

from ..support import files
from .report import as_markdown
from .results import FILE, Results, save


def write(results: Results, folder: Path) -> None:
    """Write results.json, .md and .html; the data first, lest a chart cost a run."""
    folder.mkdir(parents=True, exist_ok=True)
    save(results, folder / FILE)
    files.replace(folder / "results.md", as_markdown(results))
    from .page import render  # needs matplotlib, which tables do not

    files.replace(folder / "results.html", render(results))
