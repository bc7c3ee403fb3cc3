"""The files of a run: data, tables and the page of charts."""

from __future__ import annotations

from pathlib import Path

from ..support import files
from .report import as_markdown
from .results import FILE, Results, save


def write(results: Results, folder: Path) -> str:
    """Write results.json, .md and, if matplotlib can be imported, .html; the data first, lest a chart cost a run.

    Returns a line that says what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(results, folder / FILE)
    files.replace(folder / "results.md", as_markdown(results))
    try:
        from .page import render  # needs matplotlib, which tables do not
    except ImportError as error:
        (folder / "results.html").unlink(missing_ok=True)  # an earlier run's
        return f"written: {folder}/results.md and .json, but no charts ({error}): pip install matplotlib"
    files.replace(folder / "results.html", render(results))
    return f"written: {folder}/results.html, .md and .json"
