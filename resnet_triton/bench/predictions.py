"""Arithmetic about a GPU that is not here: what a model's kernels compile to, and the time they cannot go below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from torch import nn

from ..codegen import DTYPES, rows, target
from ..codegen.roofline import least
from ..kernels.cost import Cost
from ..ops import interpreter
from ..ops.trace import trace


def predictions(
    model: nn.Module, batches: Sequence[int], dtypes: Sequence[str], *,
    arch: int | str = 90, jobs: int = 2, image: int = 224,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The records of the schema, one for each launch; `dtypes` as `codegen` names them, "tf32" being one.

    FLOPs, bytes and floor are the whole layer's: of several launches the first has them, the others 0.
    """
    if interpreter.active():
        raise ValueError("TRITON_INTERPRET is set, expected kernels that are compiled; unset it to benchmark")
    where = target(arch)
    work = {}
    for batch, dtype in product(batches, dtypes):
        for call in trace(model, (batch, 3, image, image), DTYPES[dtype][0]):
            work[batch, dtype, call.name or call.operator] = least(call)
    for row in rows(model, [arch], batches, dtypes, jobs=jobs, image=image):
        cost = work[row.batch, row.dtype, row.layer] if row.launch == 0 else Cost(0, 0)
        flops, dram = where.ceilings.flops(row.dtype), where.ceilings.dram
        yield {
            "device": where.facts.name, "batch": row.batch, "dtype": row.dtype, "layer": row.layer,
            "kernel": row.kernel, "registers": row.code.registers, "shared_bytes": row.code.shared_memory,
            "spill_bytes": row.code.spill_bytes, "flops": cost and cost.flops, "bytes": cost and cost.bytes,
            "floor_s": cost.floor(flops, dram) if cost and flops and dram else None,
        }  # fmt: skip
