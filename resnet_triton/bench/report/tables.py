"""Results as tables: in a terminal, as Markdown, as CSV. The page shows the same ones."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...support import terminal
from ..results import FIELDS, Results, Row, best, speedup
from .headline import headlines
from .views import Roof, Task, obstacle, place, preferred, remark, roof, views


@dataclass(frozen=True)
class Table:
    """Cells as text, free of control characters. A column whose name starts with ">" is aligned to the right."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Empty columns are left out."""
    cells = [[terminal.printable("" if cell is None else str(cell)) for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    return Table(terminal.printable(title), [columns[i] for i in kept], [[row[i] for i in kept] for row in cells])


def digits(value: float | None, scale: float = 1) -> str:
    """Three significant digits, never an exponent; nothing for None."""
    if value is None:
        return ""
    scaled = value * scale
    places = 2 - math.floor(math.log10(abs(scaled))) if scaled else 0
    return f"{scaled:,.{max(places, 0)}f}"


def places(results: Results) -> list[Table]:
    """Where, when and with what each device's rows were measured."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        found.setdefault(place(row), []).append(row.environment)
    return [
        _table(f"Measured on {name}", ["what", "value"], _facts(environments)) for name, environments in found.items()
    ]


def _facts(environments: Sequence[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    for name in environments[0]:
        values = sorted({str(environment[name]) for environment in environments})
        if name == "date":
            values = [" to ".join(dict.fromkeys((values[0], values[-1])))]
        yield name.replace("_", " "), "; ".join(values)


def summaries(results: Results, suite: str, *, every: bool = True) -> list[Table]:
    """Ours against the best alternative: by batch, or by layer and with the floor that measured ceilings allow."""
    found = views(results, suite)
    unit = "ms" if suite == "model" else "µs"
    columns = ["layer", ">batch", "ours", f">ours, {unit}", "best alternative", f">best, {unit}", ">speed-up",
               f">floor, {unit}", ">floor / ours", "remarks"]  # fmt: skip
    return [_table(f"Against the best alternative: {view}", columns,
                   [_summary(task, roof(results, view.dtype)) for task in found[view]])
            for view in (found if every else preferred(found))]  # fmt: skip


def _summary(task: Task, limits: Roof) -> list[object]:
    mine, other, ratio = best(task, ours=True), best(task, ours=False), speedup(task)
    times = [row.p50_s if row else None for row in (mine, other)]
    kernel = task[0].suite == "kernel"
    scale = 1e6 if kernel else 1e3
    floor = limits.seconds(task[0]) if kernel else None
    remarks = [f"{row.alternative} {remark(row)}" for row in task if remark(row)]
    if ratio is not None and ratio < 1:
        remarks.insert(0, "slower")
    return [
        task[0].layer, task[0].batch, mine.alternative if mine else "", digits(times[0], scale),
        other.alternative if other else "", digits(times[1], scale),
        obstacle(task) if ratio is None else f"{ratio:.2f}×", digits(floor, scale),
        f"{floor / times[0]:.0%}" if floor and times[0] else "", "; ".join(remarks),
    ]  # fmt: skip


def details(results: Results) -> list[Table]:
    """The model suite: every alternative at every batch size, in each way it was timed."""
    columns = [">batch", "alternative", ">p50, ms", ">p20, ms", ">p80, ms", ">images/s", ">speed-up",
               ">first call cold, s", ">first call warm, s", ">peak, MiB", "remarks"]  # fmt: skip
    return [_table(f"All alternatives: {view}", columns, (_detail(row, task) for task in tasks for row in task))
            for view, tasks in views(results, "model").items()]  # fmt: skip


def _detail(row: Row, task: Task) -> list[object]:
    ratio, other = speedup(task), best(task, ours=False)
    against = f"{ratio:.2f}× against {other.alternative}" if ratio and other and row is best(task, ours=True) else ""
    return [
        row.batch, row.alternative + (" (ours)" if row.ours else ""),
        *(digits(t, 1e3) for t in (row.p50_s, row.p20_s, row.p80_s)),
        digits(row.batch / row.p50_s) if row.p50_s else "", against,
        digits(row.first_call_cold_s), digits(row.first_call_warm_s), digits(row.peak_bytes, 2**-20), remark(row),
    ]  # fmt: skip


def others(results: Results, *, sums: bool = False) -> list[Table]:
    """What plain code reached, and what was only predicted, by launch or summed; each only if there is any."""
    reached = [(c["name"], c["dtype"], digits(c["bytes_per_s"], 1e-9), digits(c["flops_per_s"], 1e-9))
               for c in results.ceilings]  # fmt: skip
    predicted = [(p["device"], p["batch"], p["dtype"], p["layer"], p["kernel"], p["registers"], p["shared_bytes"],
                  p["spill_bytes"], p["flops"], p["bytes"], digits(p["floor_s"], 1e6))
                 for p in results.predictions]  # fmt: skip
    if sums:
        predicted = _sums(results.predictions)
    names = ("registers", "shared bytes", "spilled bytes", "FLOPs", "bytes moved", "floor, µs")
    found = [
        _table("Measured ceilings", ["what", "dtype", ">GB/s", ">GFLOP/s"], reached),
        _table("predicted, not measured", ["device", ">batch", "dtype", "layer", "kernel",
                                           *(f">predicted {name}" for name in names)], predicted),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def _sums(predictions: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """All launches of a model together."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in predictions:
        found.setdefault((p["device"], p["batch"], p["dtype"]), []).append(p)

    def total(launches: list[dict[str, Any]], name: str) -> Any:
        values = [p[name] for p in launches]
        return None if None in values else sum(values)

    return [
        (*key, "", f"all {len(launches)}", "", "", total(launches, "spill_bytes"), total(launches, "flops"),
         total(launches, "bytes"), digits(total(launches, "floor_s"), 1e6))
        for key, launches in found.items()
    ]  # fmt: skip


def tables(results: Results, *, sums: bool = False) -> list[Table]:
    """All of them, in the order of reading."""
    suites = [table for suite in ("model", "kernel") for table in summaries(results, suite)]
    return [*places(results), *suites, *details(results), *others(results, sums=sums)]


def show(results: Results) -> None:
    """Print all tables, predictions summed, then the headlines."""
    for table in tables(results, sums=True):
        terminal.table(table.title, table.columns, table.rows)
    print("\n".join(headlines(results)) or "No results.")


def as_markdown(results: Results) -> str:
    """The headlines as a list, then all tables."""
    parts = ["\n".join(f"* {_markdown(line)}" for line in headlines(results)) or "No results."]
    for table in tables(results):
        lines = [[_markdown(name.lstrip(">")) for name in table.columns],
                 ["---:" if name.startswith(">") else "---" for name in table.columns],
                 *([_markdown(cell) for cell in row] for row in table.rows)]  # fmt: skip
        parts += [f"## {_markdown(table.title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """`text`, meaning itself: no markup, no HTML, no end of a cell. An underscore within a word is none."""
    return re.sub(r"[\\`*\[\]|~<>&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def as_csv(results: Results) -> str:
    """One line a row, without its samples; the environment's fields are columns of their own."""
    names = [name for name in FIELDS if name not in ("samples_s", "environment")]
    places = list(dict.fromkeys(name for row in results.rows for name in row.environment))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *places])
    for row in results.rows:
        cells = [*(getattr(row, name) for name in names), *(row.environment.get(name) for name in places)]
        writer.writerow([_plain(cell) for cell in cells])
    return file.getvalue()


def _plain(cell: Any) -> Any:
    """A configuration as JSON; text that a spreadsheet would run as a formula behind an apostrophe."""
    if isinstance(cell, dict):
        cell = json.dumps(cell)
    if not isinstance(cell, str):
        return cell
    return terminal.printable(f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell)
