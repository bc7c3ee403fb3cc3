"""Faults, and rows that got worse than they were.

The budget is the summary of an earlier report, committed: a row may not take clearly more registers or instructions
than it did there, nor lose occupancy, nor wait more often. A change that is meant to comes with the budget that
`make codegen-all` writes anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..support import files
from .report import Record
from .rows import HELD

MORE_REGISTERS = 8  # one step of their allocation
MORE_INSTRUCTIONS = 1.05  # what the same kernel, reordered, may take
_KINDS: dict[str, Any] = {
    "arch": str, "batch": int, "dtype": str, "layer": str, "launch": int, "kernel": str, "registers": int,
    "instructions": int, "occupancy": int | float | None, "wgmma_per_wait": int | float | None,
}  # fmt: skip
"""What is read of a row."""


def faults(result: Record) -> list[str]:
    """One line for each fault on the architectures that are held to none."""
    return [f"{_name(row)}: {fault}" for row in result["rows"] if row["arch"] in HELD for fault in row["faults"]]


def regressions(result: Record, budget: Record) -> Iterator[str]:
    """One line for each way in which a row of the held architectures is worse than in `budget`, or missing there.

    Batch sizes and dtypes that the budget does not have at all are not compared. If that is all there is, it is a
    failure, too.
    """
    allowed = {_name(row): row for row in budget["rows"]}
    combinations = {_combination(row) for row in budget["rows"]}
    compared = [row for row in result["rows"] if row["arch"] in HELD and _combination(row) in combinations]
    if not compared:
        yield "nothing was compared: the budget holds none of these architectures, batch sizes and dtypes"
    for row in compared:
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


def load(path: Path, triton: str) -> Record:
    """A report as `codegen --out` writes it. ValueError, in one line, for anything else.

    And for the report of another Triton than this version, which makes other code.
    """
    result = files.read_json(path)
    if not isinstance(result, dict) or not {"triton", "rows"} <= set(result):
        raise ValueError(f'{path}: expected an object with "triton" and "rows", as codegen --out writes it')
    if not isinstance(result["rows"], list) or not all(map(_is_row, result["rows"])):
        raise ValueError(f"{path}: expected rows with {', '.join(_KINDS)}, as codegen --out writes them")
    if result["triton"] != triton:
        raise ValueError(f"{path} was made with Triton {result['triton']}, expected {triton}")
    return result


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(name in row and isinstance(row[name], kind) for name, kind in _KINDS.items())


def _name(row: Record) -> str:
    return f"{row['arch']} batch {row['batch']} {row['dtype']} {row['layer']} launch {row['launch']} ({row['kernel']})"


def _combination(row: Record) -> tuple[str, int, str]:
    return row["arch"], row["batch"], row["dtype"]
