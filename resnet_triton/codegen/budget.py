"""Faults, and rows that got worse than they were.

The budget is the summary of an earlier report, committed: a row may not take clearly more registers or instructions
than it did there, nor lose occupancy, nor wait more often. A change that is meant to comes with the budget that
`make codegen-all` writes anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .report import Record
from .rows import HELD

MORE_REGISTERS = 8  # one step of their allocation
MORE_INSTRUCTIONS = 1.05  # what the same kernel, reordered, may take


def faults(result: Record) -> list[str]:
    """One line for each fault on the architectures that are held to none."""
    return [f"{_name(row)}: {fault}" for row in result["rows"] if row["arch"] in HELD for fault in row["faults"]]


def regressions(result: Record, budget: Record) -> Iterator[str]:
    """One line for each way in which a row of the held architectures is worse than in `budget`, or missing there.

    Batch sizes and dtypes that the budget does not have at all are not compared. ValueError if Triton is not the same:
    another version makes other code.
    """
    if result["triton"] != budget["triton"]:
        raise ValueError(f"the budget was made with Triton {budget['triton']}, expected {result['triton']}")
    allowed = {_name(row): row for row in budget["rows"]}
    combinations = {_combination(row) for row in budget["rows"]}
    for row in result["rows"]:
        if row["arch"] not in HELD or _combination(row) not in combinations:
            continue
        was = allowed.get(_name(row))
        if was is None:
            yield f"{_name(row)}: not in the budget"
            continue
        most = {"registers": was["registers"] + MORE_REGISTERS, "instructions": was["instructions"] * MORE_INSTRUCTIONS}
        for field, limit in most.items():
            if row[field] > limit:
                yield f"{_name(row)}: {row[field]} {field}, expected at most {limit:.0f}"
        for field in ("occupancy", "wgmma_per_wait"):
            if (row[field] or 0) < (was[field] or 0):
                yield f"{_name(row)}: {field} {row[field]}, expected at least {was[field]}"


def load(path: Path) -> Record:
    """A report as `codegen --out` writes it."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not {"triton", "rows"} <= set(result):
        raise ValueError(f'{path}: expected an object with "triton" and "rows"')
    return result


def _name(row: Record) -> str:
    return f"{row['arch']} batch {row['batch']} {row['dtype']} {row['layer']} launch {row['launch']} ({row['kernel']})"


def _combination(row: Record) -> tuple[str, int, str]:
    return row["arch"], row["batch"], row["dtype"]
