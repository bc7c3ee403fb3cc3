"""Two files of results against each other: what became faster, slower, wrong, or went away."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..support.terminal import table
from .report import place, remark
from .results import Measurement, Results, speedup

METRICS = ("p20", "p50", "p80", "first_call", "peak_memory", "speedup")
SAME = ("device", "driver", "threads", "torch", "triton")
"""What two environments have to share for their times to be comparable."""
Values = dict[str, float]
"""The metrics that a right row has."""


class Limit(NamedTuple):
    """`p50:+5%` or `speedup:-5%`: a metric, and the relative change that is one too many."""

    metric: str
    sign: int
    most: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """ValueError says what was expected."""
        found = re.fullmatch(r"(\w+):([+-])(\d+(?:\.\d+)?)%", text)
        if found is None or found[1] not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(f"cannot read limit {text!r}, expected METRIC:+N% or METRIC:-N% with METRIC of {known}")
        return cls(found[1], -1 if found[2] == "-" else 1, float(found[3]) / 100)


def compare(
    old: Results, new: Results, limits: Sequence[Limit], metric: str = "p50"
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `metric` was and is of every row of either file, by task; and all that fails, in words.

    Only rows of ours can fail: other people's releases are not this project's regressions. A row that is wrong, failed
    or disappeared is a failure without any limit; one that a limit is for and that cannot be compared is one, too. So
    is a metric that was asked for and is nowhere in both files.
    """
    before, after = _values(old), _values(new)
    rows, failures, compared = [], [], set()
    for key in dict.fromkeys((*after, *before)):
        (was, olds), (row, news) = before.get(key, (None, {})), after.get(key, (None, {}))
        either = row or was
        assert either is not None
        found = [*_failures(was, row, olds, news, limits)] if either.ours else []
        compared |= olds.keys() & news.keys() if either.ours else set()
        values = olds.get(metric), news.get(metric)
        name, change = title(either), _relative(*values)
        rows.append({"row": name, "old": values[0], "new": values[1], "change": change, "failures": found})
        failures += [f"{name}: {failure}" for failure in found]
    for name in dict.fromkeys((metric, *(limit.metric for limit in limits))):
        if name not in compared:
            failures.insert(0, f"nothing was compared: no row of ours has {name} in both results")
    return rows, failures


def _values(results: Results) -> dict[Any, tuple[Measurement | None, Values]]:
    found: dict[Any, tuple[Measurement | None, Values]] = {}
    for task in results.tasks().values():
        for row in task:
            values = row.p20_s, row.p50_s, row.p80_s, row.first_call_s, row.peak_bytes, speedup(task)
            known = {name: value for name, value in zip(METRICS, values, strict=True) if value is not None}
            found[row.key] = row, known if row.good else {}
    return found


def _failures(
    was: Measurement | None, row: Measurement | None, olds: Values, news: Values, limits: Sequence[Limit]
) -> Iterator[str]:
    if row is None:
        yield "is missing in the new results"
    elif not row.good:
        yield "gives a wrong answer" if row.correct is False else remark(row)
    elif was == row and limits:
        yield "cannot be compared: both are the same measurement"
    elif was is not None and place(was) != place(row) and limits:
        yield f"cannot be compared: measured on {place(was)} before, on {place(row)} now"
    else:
        of_models = {"first_call", "peak_memory"}  # which single layers have not
        for name, sign, most in (limit for limit in limits if row.suite == "model" or limit.metric not in of_models):
            old, new = olds.get(name), news.get(name)
            change = _relative(old, new)
            if change is not None and sign * change > most:
                yield f"{name} {change:+.1%}, allowed {sign * most:+.1%}"
            elif change is None:
                yield f"{name} cannot be compared: {_cell(old) or 'none'} before, {_cell(new) or 'none'} now"


def _relative(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return None
    return 0.0 if old == new else new / old - 1 if old else None


def differences(old: Results, new: Results) -> list[str]:
    """Why times of the two files may not be comparable, one line each."""
    found = []
    for name in SAME:
        values = [sorted({str(row.environment.get(name)) for row in r.rows}) for r in (old, new)]
        if values[0] != values[1] and all(values):
            found.append(f"{name} differs: {', '.join(values[0])} before, {', '.join(values[1])} now")
    return found


def title(row: Measurement) -> str:
    """A row in words."""
    what, size = f"{row.model} {row.layer or ''}".strip(), f"{row.image}x{row.image}"
    if row.image != 224 and size not in what:
        what += f", {size}"
    l2 = "" if row.l2 == "uncontrolled" else f", L2 {row.l2}"
    return f"{what}, batch {row.batch}, {row.dtype}, {row.clock} clock{l2}: {row.alternative}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    lines = [
        (row["row"], _cell(row["old"]), _cell(row["new"]), "" if row["change"] is None else f"{row['change']:+.1%}",
         "; ".join(row["failures"]))
        for row in rows
    ]  # fmt: skip
    table("Old against new results", ("", ">old", ">new", ">change", "too much"), lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
