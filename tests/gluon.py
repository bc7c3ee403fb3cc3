"""As much of Gluon as `conv_halo.py` speaks, on torch tensors: programs run one by one, and their waits are checked.

Copies land at once, but a tile may be read only after a wait for its barrier, overwritten only after a wait for the
products that read it, and copied out only behind a fence. No copy may outlive its program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from resnet_triton.kernels import conv_halo
from resnet_triton.kernels.launch import Launch


class Pointer:
    """A tensor's memory, and places in it."""

    def __init__(self, memory: Tensor, places: Any = 0) -> None:
        self.memory, self.places = memory, places

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.places + offsets)

    def load(self, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        places = torch.as_tensor(self.places)
        mask = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.expand(places.shape)
        assert ((places >= 0) & (places < self.memory.numel()))[mask].all(), "a load beyond its tensor"
        flat = self.memory.as_strided((self.memory.numel(),), (1,))
        return torch.where(mask, flat[torch.where(mask, places, 0)], other)


class Barrier:
    """One phase is over when a thread has arrived and all bytes it announced are there."""

    def __init__(self, shape: Sequence[int]) -> None:
        assert shape[-1] == 1
        self.parts = [Barrier([1]) for _ in range(shape[0])] if len(shape) > 1 else []
        self.count, self.arrivals, self.bytes, self.finished, self.waited = 0, 0, 0, 0, 0

    def index(self, i: int) -> Barrier:
        return self.parts[i]

    def add(self, arrivals: int, size: int) -> None:
        assert self.count, "a barrier that was not initialised"
        self.arrivals += arrivals
        self.bytes += size
        if self.arrivals == self.count and self.bytes == 0:
            self.arrivals = 0
            self.finished += 1

    def wait(self, parity: int) -> None:
        assert parity in (0, 1)
        assert self.finished, "a wait that would not end"
        assert self.finished % 2 != parity, "a wait that would not end"
        assert self.bytes == 0, "a wait for part of the bytes"
        self.waited = self.finished


class Tiles:
    """Shared memory. What is known of a tile is kept under its address."""

    def __init__(self, data: Tensor, gpu: Gpu) -> None:
        self.data, self.gpu = data, gpu

    def index(self, i: int) -> Tiles:
        assert 0 <= i < len(self.data)
        return Tiles(self.data[i], self.gpu)

    def reshape(self, shape: Sequence[int]) -> Tiles:
        return Tiles(self.data.view(shape), self.gpu)

    def permute(self, order: Sequence[int]) -> Tiles:
        return Tiles(self.data.permute(order), self.gpu)

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.data.dtype
        assert not self.gpu.leaving, "written while it is copied out"
        self.data.copy_(value)
        self.gpu.fenced = False

    def read(self) -> Tensor:
        barrier, phase = self.gpu.landing[self.data.data_ptr()]
        assert barrier.waited > phase, "read before it has landed"
        self.gpu.reading.add(self.data.data_ptr())
        return self.data.float()


class Gpu:
    """The state of one program."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.landing: dict[int, tuple[Barrier, int]] = {}
        self.reading: set[int] = set()
        self.leaving = False
        self.fenced = True
        self.columns = 0  # of one product

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        return Barrier(shape) if dtype == torch.int64 else Tiles(torch.full(shape, torch.nan, dtype=dtype), self)

    def copy_in(self, desc: Any, at: Sequence[int], barrier: Barrier, tile: Tiles, pred: bool = True) -> None:
        if not pred:
            return
        address = tile.data.data_ptr()
        assert list(tile.data.shape) == desc.block_shape
        assert address not in self.reading, "overwritten while products read it"
        self.landing[address] = (barrier, barrier.finished)
        tile.data.zero_()
        for source, target in _inside(desc, at, tile.data):
            target.copy_(source)
        barrier.add(0, -tile.data.nbytes)

    def copy_out(self, desc: Any, at: Sequence[int], tile: Tiles) -> None:
        assert list(tile.data.shape) == desc.block_shape
        assert self.fenced, "copied out without a fence behind the stores"
        for target, source in _inside(desc, at, tile.data):
            target.copy_(source)
        self.leaving = True

    def product(self, a: Tiles, b: Tiles, acc: Tensor, *, is_async: bool) -> Tensor:
        assert is_async
        assert acc.shape[1] == self.columns
        return acc + a.read() @ b.read()

    def products_done(self, pending: int, deps: Any) -> Any:
        assert pending == 0
        self.reading.clear()
        return deps

    def stores_done(self, pending: int) -> None:
        assert pending == 0
        self.leaving = False

    def fence(self) -> None:
        self.fenced = True

    def finish(self) -> None:
        assert not self.leaving, "the end, while the last tile is copied out"
        assert all(barrier.waited > phase for barrier, phase in self.landing.values()), "the end, before a copy's"

    def names(self) -> dict[str, Any]:
        """What the kernel's module imports."""

        def expect(barrier: Barrier, size: int, pred: bool = True) -> None:
            barrier.add(int(pred), size * pred)

        def layout(*, version: Any, warps_per_cta: Any, instr_shape: Any) -> None:
            rows, self.columns, depth = instr_shape
            assert (version, warps_per_cta[1:], rows, depth) == ([3, 0], [1], 16, 16)

        def arange(first: int, end: int, layout: Any) -> Tensor:
            return torch.arange(first, end, dtype=torch.int32)

        language = SimpleNamespace(
            program_id=lambda axis: (self.pid,)[axis], minimum=min, where=torch.where, constexpr=None,
            float32=torch.float32, int64=torch.int64, static_range=range, arange=arange, expand_dims=torch.unsqueeze,
            sqrt_rn=torch.sqrt,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            div_rn=lambda a, b: a / b, load=lambda pointer, mask=None, other=0.0: pointer.load(mask, other),
            allocate_shared_memory=self.allocate, SliceLayout=lambda *_: None,
            NVMMADistributedLayout=layout,
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda barrier, count: setattr(barrier, "count", count), expect=expect,
            wait=lambda barrier, parity: barrier.wait(parity),
        )  # fmt: skip
        return {
            "gl": language, "mbarrier": barriers, "tma": SimpleNamespace(store_wait=self.stores_done),
            "async_load": self.copy_in, "async_store": self.copy_out, "fence_async_shared": self.fence,
            "warpgroup_mma": self.product, "warpgroup_mma_wait": self.products_done, "range": range,
        }  # fmt: skip


def _inside(desc: Any, at: Sequence[int], tile: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of a described tensor and of its tile that lie in both, if there are any."""
    memory = desc.base.as_strided(desc.shape, desc.strides)
    tile = tile.view(desc.block_shape)
    spans = [(max(a, 0), min(a + size, edge)) for a, size, edge in zip(at, desc.block_shape, desc.shape, strict=True)]
    if all(first < end for first, end in spans):
        yield (
            memory[tuple(slice(first, end) for first, end in spans)],
            tile[tuple(slice(first - a, end - a) for (first, end), a in zip(spans, at, strict=True))],
        )


def run(launch: Launch, programs: Sequence[int] | None = None) -> None:
    """Every program of a launch of `conv_halo_kernel`, or these, in turns."""
    for pid in range(*launch.grid) if programs is None else programs:
        gpu = Gpu(pid)
        names = gpu.names()
        names |= {
            name: FunctionType(getattr(conv_halo, name).fn.__code__, names)
            for name in ("_load_row", "_batch_norm", "conv_halo_kernel")
        }
        described = {n: _described(v) for n, v in launch.arguments.items() if n.endswith("_desc")}
        tensors = {n: Pointer(v) for n, v in launch.arguments.items() if isinstance(v, Tensor)}
        names["conv_halo_kernel"](**launch.arguments | described | tensors)
        gpu.finish()


def _described(desc: Any) -> Any:
    return SimpleNamespace(
        base=desc.base, shape=desc.shape, strides=desc.strides, block_shape=desc.block_shape, layout=desc.layout,
        dtype=desc.base.dtype,
    )  # fmt: skip
