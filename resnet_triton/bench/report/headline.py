"""What a run comes to, in one sentence for each way of timing: the mean, every kind of loss, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...support.terminal import printable
from ..results import Results, best, geometric_mean, speedup
from .views import Task, case, obstacle, views


def headlines(results: Results) -> list[str]:
    """One sentence for each view: the mean speed-up over the best alternatives, every loss, every gap."""
    found = {**views(results, "model"), **views(results, "kernel")}
    return [printable(f"{view}: {_headline(tasks)}") for view, tasks in found.items()]


def _headline(tasks: Sequence[Task]) -> str:
    known = []
    for task in tasks:
        ratio, other = speedup(task), best(task, ours=False)
        if ratio is not None and other is not None:
            known.append((ratio, f"{case(task)} ({ratio:.2f}× against {other.alternative})"))
    ratios = [ratio for ratio, _ in known]
    mean = geometric_mean(ratios)
    missing = [f"{case(task)} ({obstacle(task)})" for task in tasks if speedup(task) is None]
    if mean is None:
        return f"no speed-up can be given: {_listed(missing)}."
    lost = [text for ratio, text in sorted(known) if ratio < 1]
    cases = f"{len(ratios)} cases" if len(ratios) > 1 else "1 case"
    return (
        f"{mean:.2f}× as fast as the best alternative, the geometric mean of {cases} "
        f"({min(ratios):.2f}× to {max(ratios):.2f}×). "
        + (f"Slower in {len(lost)}: {_listed(lost)}." if lost else "Slower in none.")
        + (f" No speed-up in {len(missing)} more: {_listed(missing)}." if missing else "")
    )


def _listed(parts: Iterable[str], most: int = 3) -> str:
    found = list(parts)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more, all in the tables" if len(found) > most else "")
