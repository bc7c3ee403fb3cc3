"""`resnet-triton codegen`: rows gathered, printed as a table, and written as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import models
from ..support import files
from ..support.terminal import Bar
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
    files.replace(folder / "codegen.json", as_json(result))
    files.replace(folder / "codegen.md", as_markdown(result))


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
    """For each architecture a table of sums over the model and one of all its launches."""
    parts = [
        "# Machine code of ResNet-18's kernels\n\n"
        f"Compiled by Triton {result['triton']}, not run; `{REGENERATE}` writes this file. Columns marked *predicted* "
        "are arithmetic on published or measured ceilings, not measurements; where no ceiling with a source is known "
        "they are empty. `resnet_triton/codegen/roofline.py` says what each means.\n"
    ]
    for arch, group in groupby(result["rows"], key=lambda row: row["arch"]):
        found, where = list(group), target(arch)
        compiler = f"ptxas {result['ptxas'][arch]}" if arch in result["ptxas"] else "LLVM"
        parts.append(f"\n## {arch}: {where.facts.name}\n\n{compiler}. Ceilings: {where.ceilings.source}.\n\n")
        predicted = [f"{heading} (predicted)" for heading, _ in _PREDICTED]
        summed = [heading for heading in predicted if " us " in heading]
        parts.append(_table(["batch", "dtype", "launches", *summed], _sums(found)))
        headings = [*(heading for heading, _ in _LAYER + _CODE), *predicted, "faults, messages"]
        lines = [
            [*(row[key] for _, key in _LAYER + _CODE), *(row["predicted"][key] for _, key in _PREDICTED), _remarks(row)]
            for row in found
        ]
        parts.append("\n" + _table(headings, lines))
    return "".join(parts)


def _sums(found: list[Record]) -> Iterator[list[object]]:
    """The whole model at each batch size and dtype; an empty cell where a part is unknown."""
    for (batch, dtype), group in groupby(found, key=lambda row: (row["batch"], row["dtype"])):
        predicted = [row["predicted"] for row in group]
        sums: list[object] = [batch, dtype, len(predicted)]
        for key in (key for _, key in _PREDICTED if key.endswith("_us")):
            values = [p[key] for p in predicted if p[key] is not None]
            sums.append(sum(values) if len(values) == len(predicted) else None)
        yield sums


def _table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    whole = [headings, ["---"] * len(headings), *([_cell(value) for value in line] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in whole)


_VITAL = {
    "arch": "arch", "batch": "batch", "dtype": "dtype", "layer": "layer", "path": "path", "tile": "tile",
    "split": "split_k", "warps": "num_warps", "regs": "registers", "spill": "spill_bytes", "shared": "shared_memory",
    "instr": "instructions", "matrix": "tensor_core", "TMA": "tma", "wgmma/wait": "wgmma_per_wait",
    "occup": "occupancy", "waves": "waves",
}  # fmt: skip
_TEXT = ("arch", "dtype", "layer", "path", "tile", "matrix", "TMA", "")


def show(result: Record) -> None:
    """Print the vital columns; the files that `--out` writes have all of them."""
    headings = [*_VITAL, "predicted floor us", ""]
    lines = [
        [*(_cell(row[key]) for key in _VITAL.values()), _cell(row["predicted"]["floor_us"]), _remarks(row)]
        for row in result["rows"]
    ]
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
