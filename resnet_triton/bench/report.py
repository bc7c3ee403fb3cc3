"""Results for people: in a terminal and as Markdown; `page.py` makes charts of them.

Everything here is a function of `Results`; nothing is measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..kernels.cost import Cost
from ..support import terminal
from .results import SKIPPED, Measurement, Results, best, geometric_mean, speedup

Task = list[Measurement]
"""All alternatives for one thing to do."""


# --- which rows may stand beside each other --------------------------------------------------------------------------


class View(NamedTuple):
    """What the rows of one table, or of one chart, have in common."""

    suite: str
    place: str
    model: str
    image: int
    dtype: str
    clock: str
    l2: str

    def __str__(self) -> str:
        name = self.model if self.suite == "model" else f"layers of {self.model}"
        timing = f"{'GPU time' if self.clock == 'gpu' else 'wall clock'}, L2 cache {self.l2}"
        return f"{name} {self.image}×{self.image}, {self.dtype}, {self.place}; {timing}"


def place(row: Measurement) -> str:
    """The device, and on a CPU its threads, which make it another device."""
    device, threads = row.environment["device"], row.environment["threads"]
    if row.environment["device_kind"] != "cpu":
        return str(device)
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def views(results: Results, suite: str, *, preferred: bool = False) -> dict[View, list[Task]]:
    """Tasks of a suite, by batch size, in groups that may be compared and averaged.

    GPU time comes before wall clock, and a cold L2 cache before any other: `preferred` keeps the first way of timing.
    """
    found: dict[View, list[Measurement]] = {}
    for row in results.rows:
        if row.suite == suite:
            view = View(suite, place(row), row.model, row.image, row.dtype, row.clock, row.l2)
            found.setdefault(view, []).append(row)
    order = sorted(found, key=lambda view: (view.clock != "gpu", view.l2 != "cold", view.l2))
    if preferred:
        order = list({view[:-2]: view for view in reversed(order)}.values())[::-1]
    return {view: sorted(Results(found[view]).tasks().values(), key=lambda task: task[0].batch) for view in order}


def case(task: Task) -> str:
    """What sets a task apart in its view."""
    return f"{task[0].layer}, batch {task[0].batch}" if task[0].layer else f"batch {task[0].batch}"


def no_ratio_reason(task: Task) -> str:
    """Why a task has no speed-up."""
    if any(row.ours and row.correct is False for row in task):
        return "ours is WRONG"
    return "no valid time of ours" if best(task, ours=True) is None else "no valid alternative"


def remark(row: Measurement) -> str:
    """What is wrong with a row; empty if nothing."""
    if row.failure is not None:
        return row.failure if row.failure.startswith(SKIPPED) else f"failed: {row.failure}"
    if row.correct is False:
        errors = [e for e in (row.error_before, row.error_after) if e is not None]
        error = f"{max(errors):.2g}" if len(errors) == 2 else "not a number"
        return f"WRONG: error {error}, limit {row.error_limit}"
    return "not timed" if row.p50_s is None else "not checked" if row.correct is None else ""


def roof(results: Results, dtype: str) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of plain code. None in a file of several devices: a ceiling does not say whose it is."""
    rates = {c.key: c.bytes_per_s or c.flops_per_s for c in results.ceilings}
    flops, traffic = rates.get(("matmul", dtype)), rates.get(("copy", None))
    alone = len({place(row) for row in results.rows}) == 1
    return (flops, traffic) if alone and flops and traffic else None


# --- one sentence ----------------------------------------------------------------------------------------------------


def headlines(results: Results) -> list[str]:
    """One sentence for each view: the mean speed-up over the best alternatives, every kind of loss, every gap."""
    found = {**views(results, "model"), **views(results, "kernel")}
    return [terminal.printable(f"{view}: {_headline(tasks)}") for view, tasks in found.items()]


def _headline(tasks: Sequence[Task]) -> str:
    known = []
    for task in tasks:
        ratio, other = speedup(task), best(task, ours=False)
        if ratio is not None and other is not None:
            known.append((ratio, f"{case(task)} ({ratio:.2f}× against {other.alternative})"))
    ratios = [ratio for ratio, _ in known]
    mean = geometric_mean(ratios)
    missing = [f"{case(task)} ({no_ratio_reason(task)})" for task in tasks if speedup(task) is None]
    if mean is None:
        return f"no speed-up can be given: {_listed(missing)}."
    lost = [text for ratio, text in sorted(known) if ratio < 1]
    return (
        f"{mean:.2f}× as fast as the best alternative, the geometric mean of {len(ratios)} "
        f"case{'s' if len(ratios) > 1 else ''} ({min(ratios):.2f}× to {max(ratios):.2f}×). "
        + (f"Slower in {len(lost)}: {_listed(lost)}." if lost else "Slower in none.")
        + (f" No speed-up in {len(missing)} more: {_listed(missing)}." if missing else "")
    )


def _listed(parts: Sequence[str], most: int = 3) -> str:
    more = f" and {len(parts) - most} more, all in the tables" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more


# --- tables ----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
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


def tables(results: Results) -> Iterator[Table]:
    """All that have rows, in the order of reading."""
    yield from _places(results)
    for suite in ("model", "kernel"):
        yield from summaries(results, suite)
    yield from details(results)
    reached = [(c.name, c.dtype, digits(c.bytes_per_s, 1e-9), digits(c.flops_per_s, 1e-9)) for c in results.ceilings]
    failed = [(step.phase, step.name, step.failure) for step in results.steps if step.failure]
    last = [
        _table("Measured ceilings", ["what", "dtype", ">GB/s", ">GFLOP/s"], reached),
        _table("Steps that failed", ["phase", "step", "failure"], failed),
    ]
    yield from (table for table in last if table.rows)


def _places(results: Results) -> Iterator[Table]:
    """Where, when and with what each device's rows were measured."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        found.setdefault(place(row), []).append(row.environment)
    for name, environments in found.items():
        facts = []
        for fact in environments[0]:
            values = sorted({str(environment.get(fact)) for environment in environments})
            if fact == "date":
                values = [" to ".join(dict.fromkeys((values[0], values[-1])))]
            facts.append((fact.replace("_", " "), "; ".join(values)))
        yield _table(f"Measured on {name}", ["what", "value"], facts)


def summaries(results: Results, suite: str) -> Iterator[Table]:
    """Ours against the best alternative: by batch with peak memory, or by layer with the floor that ceilings allow."""
    unit = "ms" if suite == "model" else "µs"
    columns = ["layer", ">batch", "ours", f">ours, {unit}", ">ours, MiB", "best alternative", f">best, {unit}",
               ">best, MiB", ">speed-up", f">floor, {unit}", ">floor / ours", "remarks"]  # fmt: skip
    for view, tasks in views(results, suite).items():
        limits = roof(results, view.dtype)
        yield _table(f"Against the best alternative: {view}", columns, (_summary(task, limits) for task in tasks))


def _summary(task: Task, limits: tuple[float, float] | None) -> list[object]:
    mine, other, ratio = best(task, ours=True), best(task, ours=False), speedup(task)
    times = [row.p50_s if row else None for row in (mine, other)]
    peaks = [digits(row.peak_bytes, 2**-20) if row else "" for row in (mine, other)]
    kernel = task[0].suite == "kernel"
    scale = 1e6 if kernel else 1e3
    floor = Cost(task[0].flops or 0, task[0].bytes or 0).floor(*limits) if kernel and limits else None
    remarks = [f"{row.alternative} {remark(row)}" for row in task if remark(row)]
    if ratio is not None and ratio < 1:
        remarks.insert(0, "slower")
    return [
        task[0].layer, task[0].batch, mine.alternative if mine else "", digits(times[0], scale), peaks[0],
        other.alternative if other else "", digits(times[1], scale), peaks[1],
        no_ratio_reason(task) if ratio is None else f"{ratio:.2f}×", digits(floor, scale),
        f"{floor / times[0]:.0%}" if floor and times[0] else "", "; ".join(remarks),
    ]  # fmt: skip


def details(results: Results) -> Iterator[Table]:
    """Whole models: every alternative at every batch size, in each way it was timed."""
    columns = [">batch", "alternative", ">p50, ms", ">p20, ms", ">p80, ms", ">images/s", ">first call, s",
               ">peak, MiB", "remarks"]  # fmt: skip
    for view, tasks in views(results, "model").items():
        yield _table(f"All alternatives: {view}", columns, (_detail(row) for task in tasks for row in task))


def _detail(row: Measurement) -> list[object]:
    return [
        row.batch, row.alternative + (" (ours)" if row.ours else ""),
        *(digits(t, 1e3) for t in (row.p50_s, row.p20_s, row.p80_s)),
        digits(row.batch / row.p50_s) if row.p50_s else "", digits(row.first_call_s),
        digits(row.peak_bytes, 2**-20), remark(row),
    ]  # fmt: skip


def show(results: Results) -> None:
    """Print all tables, then the headlines."""
    for table in tables(results):
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
