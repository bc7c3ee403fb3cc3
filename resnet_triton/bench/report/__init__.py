"""Results for people: in a terminal, in documents, in spreadsheets and in a browser.

Everything here is a function of `Results`; nothing is measured.
"""

from __future__ import annotations

from pathlib import Path

from ..results import Results, save
from .tables import as_csv, as_markdown, show

__all__ = ["show", "write"]


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json, results.md, results.csv and results.html; the data first, lest a chart cost a run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"results.{kind}" for kind in ("json", "md", "csv", "html")]
    save(results, paths[0])
    paths[1].write_text(as_markdown(results), encoding="utf-8")
    paths[2].write_text(as_csv(results), encoding="utf-8")
    from .page import render  # needs matplotlib, which tables do not

    paths[3].write_text(render(results), encoding="utf-8")
    return paths
