"""`resnet-triton codegen`: rows gathered, printed as a table, and summed up as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import models
from ..config.targets import target
from ..support import files
from ..support.names import check_known
from ..support.terminal import Bar
from .rows import DTYPES, HELD, rows

Record = dict[str, Any]


def compile_all(archs: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], jobs: int, bar: Bar) -> Record:
    """Compile ResNet-18 for every combination. ValueError names an unknown architecture or dtype."""
    targets = [target(arch) for arch in archs]
    check_known("dtype", dtypes, DTYPES)
    import triton

    found = []
    with bar("compiling", None) as step:
        for row in rows(models.resnet18().eval(), [t.facts.arch for t in targets], batches, dtypes, jobs=jobs):
            found.append(row.record())
            step()
    return {
        "triton": triton.__version__,
        "ptxas": {t.name: ptxas_version(t.facts.arch) for t in targets},
        "rows": found,
    }


def ptxas_version(arch: int) -> str:
    """The version of the assembler Triton uses for an architecture; newer ones have one of their own."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).version)


def write(result: Record, folder: Path) -> None:
    """The summary as codegen.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / "codegen.json", files.by_line(summary(result)))


def summary(result: Record) -> Record:
    """An entry for each target, and of those that are held a row for each launch, with what a budget compares."""
    targets = [_target(arch, list(group)) for arch, group in groupby(result["rows"], key=lambda row: row["arch"])]
    rows = [{name: row[name] for name in _BUDGET} for row in result["rows"] if row["arch"] in HELD]
    return {**result, "targets": targets, "rows": rows}


def _target(arch: str, found: list[Record]) -> Record:
    return {
        "arch": arch,
        "launches": len(found),
        "configurations": len({tuple(row[name] for name in _CONFIGURATION) for row in found}),
        "spill": sum(bool(row["spill_bytes"]) for row in found),
        "faulty": sum(bool(row["faults"]) for row in found),
        "faults": Counter(fault for row in found for fault in row["faults"]),
    }


_CONFIGURATION = ("kernel", "tile", "split_k", "num_warps", "num_stages", "dtype")
_WHERE = ("arch", "batch", "dtype", "layer", "launch", "kernel")
_BUDGET = (*_WHERE, "registers", "instructions", "occupancy", "wgmma_per_wait")
_VITAL = {
    "arch": "arch", "batch": "batch", "dtype": "dtype", "layer": "layer", "path": "path", "tile": "tile",
    "split": "split_k", "warps": "num_warps", "regs": "registers", "spill": "spill_bytes", "shared": "shared_memory",
    "instr": "instructions", "matrix": "tensor_core", "TMA": "tma", "wgmma/wait": "wgmma_per_wait",
    "occup": "occupancy", "waves": "waves",
}  # fmt: skip
_TEXT = ("arch", "dtype", "layer", "path", "tile", "matrix", "TMA", "")


def show(result: Record) -> None:
    """Print the vital columns; `--json` prints all of them."""
    headings = [*_VITAL, ""]
    lines = [[*(_cell(row[key]) for key in _VITAL.values()), _remarks(row)] for row in result["rows"]]
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    print(f"Triton {result['triton']}, ptxas {', '.join(f'{v} for {k}' for k, v in result['ptxas'].items())}")
    for line in [headings, *lines]:
        cells = zip(headings, line, widths, strict=True)
        print("  ".join(c.ljust(w) if heading in _TEXT else c.rjust(w) for heading, c, w in cells).rstrip())


def _cell(value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _remarks(row: Record) -> str:
    return "; ".join([*row["faults"], *row["messages"]])
