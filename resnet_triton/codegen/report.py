"""`resnet-triton codegen`: rows gathered, printed as a table, and written as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import models
from ..terminal import Bar
from .rows import DTYPES, rows
from .targets import target

REGENERATE = "make codegen-all"

Record = dict[str, Any]


def compile_all(archs: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], jobs: int, bar: Bar) -> Record:
    """Compile ResNet-18 for every combination. ValueError names an unknown architecture or dtype."""
    targets = [target(arch) for arch in archs]
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise ValueError(f"cannot compile for dtype {unknown[0]!r}, expected one of {', '.join(DTYPES)}")
    import triton

    found = []
    with bar("compiling", None) as step:
        for row in rows(models.resnet18().eval(), [t.compiler[1] for t in targets], batches, dtypes, jobs=jobs):
            found.append(row.record())
            step()
    return {
        "triton": triton.__version__,
        "ptxas": {t.name: ptxas_version(t.compiler[1]) for t in targets if t.compiler[0] == "cuda"},
        "predicted": "floor_us, l2_us, wave_loss, launch_gap_us, split_k_tail_us: arithmetic, never measured",
        "rows": found,
    }


def ptxas_version(arch: int | str) -> str:
    """The version of the assembler Triton uses for an architecture; newer ones have one of their own."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(arch).version)


def write(result: Record, folder: Path) -> None:
    """codegen.json and codegen.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    Path(folder, "codegen.json").write_text(as_json(result), encoding="utf-8")
    Path(folder, "codegen.md").write_text(as_markdown(result), encoding="utf-8")


def as_json(result: Record) -> str:
    """One row a line, so that a difference between two reports reads well."""
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in result["rows"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n'


# Heading and value. A heading that says "predicted" stands over arithmetic.
_LAYER = [
    ("batch", "batch"), ("dtype", "dtype"), ("layer", "layer"), ("kernel", "kernel"), ("tile", "tile"),
    ("split-K", "split_k"), ("warps", "num_warps"), ("stages", "num_stages"),
]  # fmt: skip
_CODE = [
    ("registers", "registers"), ("spill bytes", "spill_bytes"), ("shared bytes", "shared_memory"),
    ("instructions", "instructions"), ("tensor core", "tensor_core"), ("TMA", "tma"),
    ("wgmma per wait", "wgmma_per_wait"), ("programs", "programs"), ("programs per SM", "programs_per_sm"),
    ("occupancy", "occupancy"), ("waves", "waves"),
]  # fmt: skip
_PREDICTED = [
    ("floor us", "floor_us"), ("L2 us", "l2_us"), ("wave loss", "wave_loss"), ("launch gap us", "launch_gap_us"),
    ("split-K tail us", "split_k_tail_us"),
]  # fmt: skip


def as_markdown(result: Record) -> str:
    """One table for each architecture."""
    parts = [
        "# Machine code of ResNet-18's kernels\n\n"
        f"Compiled ahead of time by Triton {result['triton']}, not run. `{REGENERATE}` writes this file. Columns marked "
        "*predicted* are arithmetic on published or measured ceilings, not measurements; an empty one has no ceiling "
        "with a source. `resnet_triton/roofline.py` says what each means.\n"
    ]
    for arch, group in groupby(result["rows"], key=lambda row: row["arch"]):
        where = target(arch)
        compiler = f"ptxas {result['ptxas'][arch]}" if arch in result["ptxas"] else "LLVM"
        parts.append(f"\n## {arch}: {where.facts.name}\n\n{compiler}. Ceilings: {where.ceilings.source}.\n\n")
        headings = [h for h, _ in _LAYER + _CODE] + [f"{h} (predicted)" for h, _ in _PREDICTED] + ["faults, messages"]
        parts.append(_line(headings) + _line(["---"] * len(headings)))
        for row in group:
            values = [row[key] for _, key in _LAYER + _CODE] + [row["predicted"][key] for _, key in _PREDICTED]
            parts.append(_line([_cell(value) for value in values] + ["; ".join([*row["faults"], *row["messages"]])]))
    return "".join(parts)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_VITAL = (
    f"{'arch':7}{'batch':>5}  {'dtype':9}{'layer':16}{'path':11}{'tile':16}{'split':>5}{'warps':>6}{'regs':>5}{'spill':>6}"
    f"{'shared':>8}{'instr':>6}  {'matrix':8}{'copy':5}{'wgmma/wait':>10}{'occup':>6}{'waves':>7}{'predicted floor us':>20}"
)


def show(result: Record) -> None:
    """Print the vital columns; all of them are in the files that `--out` writes."""
    print(f"Triton {result['triton']}, ptxas {', '.join(f'{v} for {k}' for k, v in result['ptxas'].items())}\n{_VITAL}")
    for row in result["rows"]:
        wait, floor = _cell(row["wgmma_per_wait"]), _cell(row["predicted"]["floor_us"])
        print(
            f"{row['arch']:7}{row['batch']:5}  {row['dtype']:9}{row['layer']:16}{row['path']:11}{row['tile']:16}"
            f"{row['split_k']:5}{row['num_warps']:6}{row['registers']:5}{row['spill_bytes']:6}{row['shared_memory']:8}"
            f"{row['instructions']:6}  {row['tensor_core']:8}{'tma' if row['tma'] else '-':5}{wait:>10}"
            f"{row['occupancy']:6.2f}{row['waves']:7.2f}{floor:>20}  {'; '.join([*row['faults'], *row['messages']])}".rstrip()
        )
