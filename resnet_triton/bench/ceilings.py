"""What a device gives to plain code: bytes per second to a copy, FLOP/s to matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ..support import timing
from ..support.timing import Work
from .results import Ceiling
from .runner import Found, Run, Steps

_COPY = {"cuda": 2 << 30, "cpu": 128 << 20}
"""Bytes to copy, larger than caches."""
_SMALL, _LARGE, _PATIENCE = 256, 1024, 0.1
"""Sides of a CPU's matrices, and the seconds a product may take: some dtypes have no fast one."""


def steps(dtypes: Sequence[str], run: Run) -> Steps:
    """The memory, and the arithmetic in each dtype."""
    run.say("memory bandwidth and matrix products")
    yield "copy", lambda: [[copy(run.device)]]
    for dtype in dtypes:
        yield f"matmul {dtype}", partial(_matmul, run.device, dtype)


def copy(device: torch.device) -> Ceiling:
    """Bytes read and written, by a kernel: a copy node of a graph is slower."""
    size = _COPY[device.type]
    source = torch.randn(size // 4, device=device)
    out = torch.empty_like(source)
    return Ceiling("copy", bytes_per_s=2 * size / _seconds(partial(torch.neg, source, out=out), device))


def _matmul(device: torch.device, dtype: str) -> Iterator[Found]:
    side = _side(device, getattr(torch, dtype))
    yield [Ceiling("matmul", dtype, flops_per_s=2 * side**3 / matmul(device, side, getattr(torch, dtype)))]


def _side(device: torch.device, dtype: torch.dtype) -> int:
    if device.type == "cuda":
        return 8192
    estimate = matmul(device, _SMALL, dtype) * (_LARGE // _SMALL) ** 3
    return _LARGE if estimate < _PATIENCE else _SMALL


def matmul(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Seconds of a product of two square matrices."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    return _seconds(partial(torch.matmul, a, b, out=out), device)


def _seconds(call: Work, device: torch.device) -> float:
    if device.type == "cuda":
        return timing.graph_seconds([call], replays=10).p50
    return timing.spread(timing.interleaved_for(0.5, {"": call})[""]).p50
