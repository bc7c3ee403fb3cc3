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
_IN_L2, _IN_A_ROW = (8 << 20, 16 << 20), 20
"""Bytes that stay in a GPU's L2 cache, and how often they are copied for a sample."""
_SMALL, _LARGE, _PATIENCE = 256, 1024, 0.1
"""Sides of a CPU's matrices, and the seconds a product may take: some dtypes have no fast one."""


def steps(dtypes: Sequence[str], run: Run) -> Steps:
    """The memory, the arithmetic in each dtype; on a GPU the L2 cache and the time of a launch, too."""
    run.say("memory bandwidth and matrix products")
    yield "copy", lambda: [[copy(run.device, _COPY[run.device.type])]]
    for dtype in dtypes:
        yield f"matmul {dtype}", partial(_matmul, run.device, dtype)
    if run.device.type == "cuda":
        for size in _IN_L2:
            yield f"copy of {size >> 20} MiB", partial(_copy_in_l2, run.device, size)
        yield "launch", partial(_launch, run.device)


def copy(device: torch.device, size: int, *, name: str = "copy", times: int = 1) -> Ceiling:
    """Bytes read and written, by a kernel: a copy node of a graph is slower. On a GPU `times` in a row are a sample."""
    source = torch.randn(size // 4, device=device)
    out = torch.empty_like(source)
    seconds = _seconds([partial(torch.neg, source, out=out)] * times, device)
    return Ceiling(name, bytes_per_s=2 * size / seconds)


def _copy_in_l2(device: torch.device, size: int) -> Iterator[Found]:
    yield [copy(device, size, name=f"copy of {size >> 20} MiB", times=_IN_A_ROW)]


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
    return _seconds([lambda: torch.matmul(a, b, out=out)], device)


def _launch(device: torch.device) -> Iterator[Found]:
    x = torch.randn(8, device=device)
    yield {"seconds": _seconds([partial(torch.neg, x, out=x)] * 200, device)}


def _seconds(calls: list[Work], device: torch.device) -> float:
    if device.type == "cuda":
        return timing.graph_seconds(calls, replays=10).p50
    return timing.spread(timing.interleaved_for(0.5, {"": calls[0]})[""]).p50
