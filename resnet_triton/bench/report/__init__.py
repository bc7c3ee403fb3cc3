"""Results for people: in a terminal, in documents, in spreadsheets and in a browser.

Everything here is a function of `Results`; nothing is measured.
"""

from __future__ import annotations

from pathlib import Path

from ...support import files
from ..results import Results, save
from .tables import as_csv, as_markdown, show

__all__ = ["show", "write"]


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json, results.md, results.csv and results.html; the data first, lest a chart cost a run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"results.{kind}" for kind in ("json", "md", "csv", "html")]
    save(results, paths[0])
    files.replace(paths[1], as_markdown(results))
    files.replace(paths[2], as_csv(results))
    from .page import render  # needs matplotlib, which tables do not

    files.replace(paths[3], render(results))
    return paths
