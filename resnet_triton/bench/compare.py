"""Two files of results against each other: what became faster, slower, wrong, or went away."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..support.terminal import table
from .report import place, remark
from .results import Measurement, Results, speedup

METRICS: dict[str, Callable[[Measurement], float | None]] = {
    "p20": lambda row: row.p20_s,
    "p50": lambda row: row.p50_s,
    "p80": lambda row: row.p80_s,
    "first_call": lambda row: row.first_call_s,
    "peak_memory": lambda row: row.peak_bytes,
}
Tasks = dict[tuple[Any, ...], list[Measurement]]
SPEEDUP = "speedup"
SAME = ("device", "driver", "threads", "torch", "triton")
"""What two environments have to share for their times to be comparable."""
USUAL_IMAGE = 224
_GONE, _ADDED = "is missing in the new results", "is missing in the old results"
_FEW = 5
"""Rows that are missing, each of which is named."""


@dataclass(frozen=True)
class Limit:
    """`p50:+5%`: a metric, and the relative change that is one too many."""

    metric: str
    change: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """ValueError says what was expected."""
        found = re.fullmatch(r"(\w+):([+-]\d+(?:\.\d+)?)%", text)
        if found is None or found[1] not in (*METRICS, SPEEDUP):
            known = ", ".join((*METRICS, SPEEDUP))
            raise ValueError(f"cannot read limit {text!r}, expected METRIC:+N% or METRIC:-N% with METRIC of {known}")
        return cls(found[1], float(found[2]) / 100)

    def exceeded(self, change: float) -> bool:
        """A positive limit is on growth, a negative one on loss, and zero is either, by its sign."""
        return change > self.change if math.copysign(1, self.change) > 0 else change < self.change


@dataclass(frozen=True)
class Change:
    """One measurement: `old` and `new` are of the metric asked for, `failures` what is worse or cannot be compared."""

    row: Measurement
    old: float | None
    new: float | None
    failures: tuple[str, ...] = ()

    @property
    def relative(self) -> float | None:
        """+0.05 is five per cent more."""
        return _relative(self.old, self.new)


def compare(old: Results, new: Results, limits: Sequence[Limit], metric: str = "p50") -> list[Change]:
    """Every row of either file, in the new file's order, and what of it is worse than a limit allows.

    Only rows of ours can fail: other people's releases are not this project's regressions. A row that is wrong, failed
    or disappeared is a failure without any limit; one that a limit is for and that cannot be compared is one, too.
    """
    before, after = {row.key: row for row in old.rows}, {row.key: row for row in new.rows}
    tasks = old.tasks(), new.tasks()
    found = []
    for key in dict.fromkeys((*after, *before)):
        was, row = before.get(key), after.get(key)
        either = row or was
        assert either is not None
        failures = _failures(was, row, limits, tasks) if either.ours else ()
        found.append(Change(either, _value(metric, was, tasks[0]), _value(metric, row, tasks[1]), tuple(failures)))
    return found


def gaps(changes: Sequence[Change], limits: Sequence[Limit], metric: str = "p50") -> Iterator[str]:
    """What was asked for and compared nothing, which is no reason to pass."""
    ours = [c for c in changes if c.row.ours]
    if not any(c.relative is not None for c in ours):
        yield f"nothing was compared: no row of ours has {metric} in both results"
    for limit in limits:
        if ours and not any(_applies(limit.metric, c.row) for c in ours):
            yield f"nothing was compared: no row of ours has {limit.metric}"


def failures(changes: Sequence[Change]) -> Iterator[str]:
    """What is worse or cannot be compared, by row; of many that are missing, the first and how many more."""
    missing: dict[str, list[str]] = {}
    for c in changes:
        for failure in c.failures:
            if failure.endswith((_GONE, _ADDED)):
                missing.setdefault(failure, []).append(title(c.row))
            else:
                yield f"{title(c.row)}: {failure}"
    for failure, rows in missing.items():
        if len(rows) > _FEW:
            rows, failure = rows[:1], f"{failure}, and so are {len(rows) - 1} other rows"
        yield from (f"{row}: {failure}" for row in rows)


def _failures(
    was: Measurement | None, row: Measurement | None, limits: Sequence[Limit], tasks: tuple[Tasks, Tasks]
) -> Iterator[str]:
    if row is None:
        yield _GONE
    elif not row.good:
        yield "gives a wrong answer" if row.correct is False else remark(row)
    elif asked := [limit for limit in limits if _applies(limit.metric, row)]:
        if obstacle := _obstacle(was, row):
            yield f"cannot be compared: {obstacle}"
            return
        for limit in asked:
            values = _value(limit.metric, was, tasks[0]), _value(limit.metric, row, tasks[1])
            change = _relative(*values)
            if change is None:
                before, now = (_cell(value) or "none" for value in values)
                yield f"{limit.metric} cannot be compared: {before} before, {now} now"
            elif limit.exceeded(change):
                yield f"{limit.metric} {change:+.1%}, allowed {limit.change:+.1%}"


def _obstacle(was: Measurement | None, row: Measurement) -> str | None:
    """Why no time of `row`, a good one, says anything about a change."""
    if was is None:
        return _ADDED
    if not was.good:
        return f"{remark(was)}, before"
    if was == row:
        return "both are the same measurement"
    if place(was) != place(row):
        return f"measured on {place(was)} before, on {place(row)} now"
    return None


def _applies(metric: str, row: Measurement) -> bool:
    """Single layers have neither a first call nor a peak of memory."""
    return row.suite == "model" or metric not in ("first_call", "peak_memory")


def _value(metric: str, row: Measurement | None, tasks: Tasks) -> float | None:
    if row is None or not row.good:
        return None
    return speedup(tasks[row.task]) if metric == SPEEDUP else METRICS[metric](row)


def _relative(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return None
    return 0.0 if old == new else new / old - 1 if old else None


def differences(old: Results, new: Results) -> list[str]:
    """Why times of the two files may not be comparable, one line each."""
    found = []
    for name in SAME:
        values = [sorted({str(row.environment[name]) for row in r.rows}) for r in (old, new)]
        if values[0] != values[1] and all(values):
            found.append(f"{name} differs: {', '.join(values[0])} before, {', '.join(values[1])} now")
    return found


def title(row: Measurement) -> str:
    """A row in words."""
    what, size = f"{row.model} {row.layer or ''}".strip(), f"{row.image}x{row.image}"
    if row.image != USUAL_IMAGE and size not in what:
        what += f", {size}"
    l2 = "" if row.l2 == "uncontrolled" else f", L2 {row.l2}"
    return f"{what}, batch {row.batch}, {row.dtype}, {row.clock} clock{l2}: {row.alternative}"


def show(changes: Sequence[Change]) -> None:
    """Print a table."""
    lines = [
        (title(c.row), _cell(c.old), _cell(c.new), "" if c.relative is None else f"{c.relative:+.1%}",
         "; ".join(c.failures))
        for c in changes
    ]  # fmt: skip
    table("Old against new results", ("", ">old", ">new", ">change", "too much"), lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def as_text(changes: Sequence[Change]) -> str:
    """The changes as JSON."""
    found = [
        {"row": title(c.row), "old": c.old, "new": c.new, "change": c.relative, "failures": [*c.failures]}
        for c in changes
    ]
    return json.dumps(found, indent=2, allow_nan=False) + "\n"
