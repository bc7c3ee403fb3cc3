"""What a device gives to plain code: bytes per second to a copy, FLOP/s to matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..support import timing
from ..support.timing import Launch, Meter, Spread

_COPY = {"cuda": 2 << 30, "cpu": 128 << 20}
"""Bytes to copy, larger than caches."""
_SMALL, _LARGE, _PATIENCE = 256, 1024, 0.1
"""Sides of a CPU's matrices, and the seconds a product may take: some dtypes have no fast one."""


def measure(where: torch.device, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the schema: one of the memory, one of the arithmetic in each dtype."""
    size = _COPY[where.type]
    rate = 2 * size / copy(where, size).p50  # read and written
    found = [{"name": "copy", "bytes_per_s": rate, "flops_per_s": None, "dtype": None}]
    for dtype in dtypes:
        side = _side(where, getattr(torch, dtype))
        rate = 2 * side**3 / matmul(where, side, getattr(torch, dtype)).p50
        found.append({"name": "matmul", "bytes_per_s": None, "flops_per_s": rate, "dtype": dtype})
    return found


def _side(where: torch.device, dtype: torch.dtype) -> int:
    if where.type == "cuda":
        return 8192
    estimate = matmul(where, _SMALL, dtype).p50 * (_LARGE // _SMALL) ** 3
    return _LARGE if estimate < _PATIENCE else _SMALL


def copy(where: torch.device, size: int, *, times: int = 1, meter: Meter | None = None) -> Spread:
    """Seconds to copy `size` bytes; on a GPU `times` in a row count as one sample."""
    source = torch.randn(size // 4, device=where)
    out = torch.empty_like(source)
    return _seconds([partial(out.copy_, source)] * times, where, meter)


def matmul(where: torch.device, side: int, dtype: torch.dtype, *, meter: Meter | None = None) -> Spread:
    """Seconds of a product of two square matrices."""
    a, b = torch.randn(2, side, side, device=where).to(dtype)
    out = torch.empty_like(a)
    return _seconds([lambda: torch.matmul(a, b, out=out)], where, meter)


def _seconds(calls: list[Launch], where: torch.device, meter: Meter | None) -> Spread:
    if where.type == "cuda" or meter is not None:
        return timing.graph_seconds(calls, replays=10, meter=meter)
    return timing.spread(timing.interleaved_for(0.5, {"": calls[0]})[""])
