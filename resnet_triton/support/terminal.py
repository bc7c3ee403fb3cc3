"""How commands talk to a person: tables on stdout, progress bars on stderr."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]
"""How long work shows itself: `with bar("training", steps) as step:`, and `step()` after each (total None: unknown)."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout. A column whose name starts with ">" is aligned to the right, an empty one left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[printable(str(cell)) for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=any(columns))
    for name in (columns[i] for i in kept):
        grid.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in cells:
        grid.add_row(*(row[i] for i in kept))
    # A pipe or a file gets lines long enough not to be broken.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as text:
        console.print(grid)
    sys.stdout.write(text.get())


@contextmanager
def bar(description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A `Bar` on stderr that disappears when done; silent if stderr is no terminal or rich is not installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
        progress.TaskProgressColumn(), progress.TimeElapsedColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    # What is printed on stdout stays there; rich would move it to its console.
    with progress.Progress(*columns, console=console, transient=True, redirect_stdout=False) as display:
        task = display.add_task(description, total=total)
        yield lambda: display.advance(task)


def clock() -> Callable[[str], None]:
    """What prints on stderr what happens now, and after how many seconds: a sign of life of long work."""
    start = time.monotonic()

    def say(text: str) -> None:
        with suppress(OSError):  # a terminal that is gone must not cost the work
            print(f"{time.monotonic() - start:5.0f} s  {printable(text)}", file=sys.stderr, flush=True)

    return say


def printable(text: str) -> str:
    """`text` with control characters spelled out: file names and labels must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
