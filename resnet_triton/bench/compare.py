"""Two files of results against each other: what became faster, slower, wrong, or went away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..support.terminal import table
from .results import Measurement, Results, speedup

METRICS: dict[str, Callable[[Measurement], float | None]] = {
    "p20": lambda row: row.p20_s,
    "p50": lambda row: row.p50_s,
    "p80": lambda row: row.p80_s,
    "first_call": lambda row: row.first_call_cold_s,
    "peak_memory": lambda row: row.peak_bytes,
}
Tasks = dict[tuple[Any, ...], list[Measurement]]
SPEEDUP = "speedup"
SAME = ("device", "driver", "threads", "torch", "triton")
"""What two environments have to share for their times to be comparable."""


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
        """A positive limit is on growth, a negative one on loss."""
        return change > self.change if self.change >= 0 else change < self.change


@dataclass(frozen=True)
class Change:
    """One measurement in both files: `old` and `new` are of the metric asked for, `failures` what is worse."""

    row: Measurement
    old: float | None
    new: float | None
    failures: tuple[str, ...] = ()

    @property
    def relative(self) -> float | None:
        """+0.05 is five per cent more."""
        return None if not self.old or self.new is None else self.new / self.old - 1


def compare(old: Results, new: Results, limits: Sequence[Limit], metric: str = "p50") -> list[Change]:
    """Every row that both files have, in the new file's order, and what of it is worse than a limit allows.

    Only rows of ours can fail: other people's releases are not this project's regressions. A row that became wrong,
    failed or disappeared is a failure without any limit.
    """
    before, after = {row.key: row for row in old.rows}, {row.key: row for row in new.rows}
    tasks = old.tasks(), new.tasks()
    found = []
    for key, row in after.items():
        if key not in before:
            continue
        was = before[key]
        failures = list(_broken(was, row)) if row.ours else []
        for limit in limits if row.ours else ():
            change = _change(limit.metric, was, row, tasks).relative
            if change is not None and limit.exceeded(change):
                failures.append(f"{limit.metric} {change:+.1%}, allowed {limit.change:+.1%}")
        found.append(replace(_change(metric, was, row, tasks), failures=tuple(failures)))
    for key, was in before.items():
        if was.ours and was.good and key not in after:
            found.append(Change(was, _value(metric, was, tasks[0]), None, ("is missing in the new results",)))
    return found


def _broken(was: Measurement, row: Measurement) -> list[str]:
    if was.good and row.failure:
        return [f"failed: {row.failure}"]
    return ["gives a wrong answer"] if row.correct is False else []


def _change(metric: str, was: Measurement, row: Measurement, tasks: tuple[Tasks, Tasks]) -> Change:
    return Change(row, _value(metric, was, tasks[0]), _value(metric, row, tasks[1]))


def _value(metric: str, row: Measurement, tasks: Tasks) -> float | None:
    return speedup(tasks[row.task]) if metric == SPEEDUP else METRICS[metric](row) if row.good else None


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
    what = f"{row.model} {row.layer or ''}".strip()
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
    """The same as JSON."""
    found = [
        {"row": title(c.row), "old": c.old, "new": c.new, "change": c.relative, "failures": [*c.failures]}
        for c in changes
    ]
    return json.dumps(found, indent=2, allow_nan=False) + "\n"
