"""Which rows may stand beside each other: results sorted by where, what and how they were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..results import Results, Row, best

Task = list[Row]
"""All alternatives for one thing to do."""


class View(NamedTuple):
    """What the rows of one table, or of one line in a chart, have in common."""

    suite: str
    place: str
    model: str
    image: int
    dtype: str
    clock: str
    l2: str

    @property
    def subject(self) -> str:
        """What was run, and on what."""
        name = self.model if self.suite == "model" else f"layers of {self.model}"
        return f"{name} {self.image}×{self.image}, {self.dtype}, {self.place}"

    @property
    def timing(self) -> str:
        """How it was timed."""
        return f"{'GPU time' if self.clock == 'gpu' else 'wall clock'}, L2 cache {self.l2}"

    def __str__(self) -> str:
        return f"{self.subject}; {self.timing}"


def place(row: Row) -> str:
    """The device, and on a CPU its threads, which make it another device."""
    device, threads = row.environment["device"], row.environment["threads"]
    if row.environment["device_kind"] != "cpu":
        return str(device)
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def views(results: Results, suite: str) -> dict[View, list[Task]]:
    """Tasks of a suite, by batch size, in groups that may be compared and averaged.

    GPU time comes before wall clock, and a cold L2 cache before any other.
    """
    found: dict[View, list[Row]] = {}
    for row in results.rows:
        if row.suite == suite:
            view = View(suite, place(row), row.model, row.image, row.dtype, row.clock, row.l2)
            found.setdefault(view, []).append(row)
    order = sorted(found, key=lambda view: (view.clock != "gpu", view.l2 != "cold", view.l2))
    return {view: sorted(Results(found[view]).tasks().values(), key=lambda task: task[0].batch) for view in order}


def preferred(found: Iterable[View]) -> list[View]:
    """The first view of each subject."""
    kept: dict[tuple[Any, ...], View] = {}
    for view in found:
        kept.setdefault(view[:-2], view)
    return list(kept.values())


def case(task: Sequence[Row]) -> str:
    """What sets a task apart in its view."""
    return f"{task[0].layer}, batch {task[0].batch}" if task[0].layer else f"batch {task[0].batch}"


def obstacle(task: Sequence[Row]) -> str:
    """Why a task has no speed-up."""
    if any(row.ours and row.correct is False for row in task):
        return "ours is WRONG"
    return "no valid time of ours" if best(task, ours=True) is None else "no valid alternative"


def remark(row: Row) -> str:
    """What is wrong with a row; empty if nothing."""
    if row.failure is not None:
        return f"failed: {row.failure}"
    if row.correct is False:
        errors = [e for e in (row.error_before, row.error_after) if e is not None]
        error = f"{max(errors):.2g}" if len(errors) == 2 else "not a number"
        return f"WRONG: error {error}, limit {row.error_limit}"
    return "not timed" if row.p50_s is None else "not checked" if row.correct is None else ""


class Roof(NamedTuple):
    """The highest rates measured on a device; None where none was."""

    bytes_per_s: float | None
    flops_per_s: float | None

    def seconds(self, row: Row) -> float | None:
        """The least time for a row's work: its traffic or its arithmetic, whichever takes longer."""
        parts = ((row.bytes, self.bytes_per_s), (row.flops, self.flops_per_s))
        return max((work / rate for work, rate in parts if work and rate), default=None)


def roof(results: Results, dtype: str) -> Roof:
    """The ceilings for a dtype. None in a file of several devices: a ceiling does not say whose it is."""
    if len({place(row) for row in results.rows}) > 1:
        return Roof(None, None)
    fitting = [c for c in results.ceilings if c["dtype"] in (dtype, None)]
    traffic = max((c["bytes_per_s"] for c in results.ceilings if c["bytes_per_s"]), default=None)
    return Roof(traffic, max((c["flops_per_s"] for c in fitting if c["flops_per_s"]), default=None))
