"""The CUDA calls of the runner, and nothing else: its tests put a fake in place of this module."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ops.in_graph import dependent_launches, graph_semaphores
from ..support.waiting import may_wait

_capturing = threading.RLock()
"""One capture at a time in the process: PyTorch waits for the device first, which a capture elsewhere forbids."""


@dataclass
class Entry:
    """How inputs get into a graph: `fill` writes `buffer`, one or several, which `body` computes the answer from.

    At first the buffer holds inputs of a call, for what kernels make of it is compared with PyTorch's. Without `fill`
    the graph reads the inputs themselves, `buffer`, and keeps none of their memory.
    """

    buffer: Tensor | tuple[Tensor, ...]
    fill: Callable[[Any], object] | None
    body: Callable[[Any], Any]
    writes_no_parameter: bool = False
    """No kernel of `body` writes a parameter of a layer: all are operators of a model of ours."""


@dataclass
class Captured:
    """A graph, and what it reads and writes. Keeping it keeps its memory."""

    graph: torch.cuda.CUDAGraph
    input: Tensor | tuple[Tensor, ...]
    fill: Callable[[Any], object] | None
    output: Any
    semaphores: Tensor
    replays: int = 0
    _streams: set[int] = field(default_factory=set)

    def replay(self, given: Any, stream: torch.cuda.Stream) -> None:
        """Launch on `stream`, the current one. Does not wait."""
        if stream.cuda_stream not in self._streams:  # once for all launches: when a buffer is freed, it counts them
            for buffer in (*_several(self.input), self.semaphores):  # if freed now, reused only after this launch
                buffer.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        if self.fill is not None:
            self.fill(given)
        self.graph.replay()


def _several(buffer: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return buffer if isinstance(buffer, tuple) else (buffer,)


def takes(x: Tensor) -> bool:
    """Whether a call on `x` could run as a graph: on an NVIDIA GPU, and nobody is capturing this stream already."""
    return x.is_cuda and torch.version.hip is None and not capturing(x)


def capturing(x: Tensor) -> bool:
    """Whether somebody captures the current stream of the device of `x`."""
    if x.device.type != "cuda":
        return False
    with on(x.device):  # it is the current device's stream that PyTorch is asked about
        return torch.cuda.is_current_stream_capturing()


def finish(x: Tensor) -> None:
    """Wait until what has been launched on the current stream of the device of `x` is done, if nobody captures it.

    For what is written once, on whichever stream comes first, and read on others, too.
    """
    if x.is_cuda and not capturing(x):
        with may_wait():
            torch.cuda.current_stream(x.device).synchronize()


@contextlib.contextmanager
def at_rest(tensors: Iterable[Tensor]) -> Iterator[None]:
    """At the beginning and at the end nothing runs on the GPUs of `tensors`, on whichever stream it was launched.

    For tensors that are given other memory: other streams may still read the old one, and may read the new one next.
    Not while somebody captures.
    """
    devices = {t.device for t in tensors if t.device.type == "cuda"}
    with _capturing if devices else _HERE:
        for device in devices:
            torch.cuda.synchronize(device)
        try:
            yield
        finally:
            for device in devices:
                torch.cuda.synchronize(device)


_HERE = contextlib.nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which PyTorch launches now."""
    return torch.cuda.current_stream(device)


def event() -> torch.cuda.Event:
    """An event for the GPU to wait on; before it is recorded, waiting is free."""
    return torch.cuda.Event()


def capture(entry: Entry, beside: Captured | None) -> Captured:
    """Capture what follows on an entry, in the memory that the graph of `beside` uses too.

    First its body runs once on the buffer: inside a capture no kernel can be compiled, and the buffer's strides and
    alignment may want others than those of the images. Then PyTorch waits for the device and gives its cached memory
    back.
    """
    device = _several(entry.buffer)[0].device
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if beside is None else beside.graph.pool()
    semaphores = torch.zeros(1024, dtype=torch.int32, device=device)  # by a kernel that waits for whatever was before
    lent, may = graph_semaphores.set(semaphores), dependent_launches.set(entry.writes_no_parameter)
    try:
        entry.body(entry.buffer)  # which compiles what a graph alone has, too: dependent launches
        with _capturing, _without_collections(), may_wait():
            stream = _side_stream(device)
            try:
                with (
                    torch.cuda.stream(stream),  # torch.cuda.graph does not leave its stream if ending a capture fails
                    torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                    _workspaces_of_its_own(),
                ):
                    output = entry.body(entry.buffer)
            except BaseException:
                _end(graph, stream, pool, semaphores)
                raise
    finally:
        graph_semaphores.reset(lent)
        dependent_launches.reset(may)
    return Captured(graph, () if entry.fill is None else entry.buffer, entry.fill, output, semaphores)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Within, no garbage is collected: a graph in it that is destroyed here spoils the capture (pytorch#161037)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """Within, cuBLAS works in memory of the graph.

    PyTorch keeps a workspace for each stream. So graphs of several models would work in one, even at once. And torch
    2.13 lets it go with the first of them (pytorch#193402).
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _end(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int], written: Tensor) -> None:
    """Tell CUDA and PyTorch that a capture is over.

    `torch.cuda.graph` ends none if Ctrl-C comes as soon as it has begun. From then on CUDA refuses whatever waits.

    torch 2.11 does not notice where ending it fails (mended in pytorch#180395). From then on `torch.cuda.empty_cache`
    and every other capture raise, and until a capture ends well, so does whatever draws random numbers on the device.
    """
    with torch.cuda.stream(stream), contextlib.suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():
            _end_with(written, graph)
    try:
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
    except RuntimeError:  # it has noticed
        return
    torch._C._cuda_releasePool(stream.device.index, pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        _end_with(written, graph)


def _end_with(written: Tensor, graph: torch.cuda.CUDAGraph) -> None:
    try:
        written.zero_()  # PyTorch warns of an empty graph
    finally:
        graph.capture_end()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: graphs share memory only if they were captured on the same stream.

    It is the driver's, where there is one to ask: PyTorch has 32 streams, which it hands out in turns, and CUDA
    captures what any thread launches on this one.
    """
    handle, non_blocking = ctypes.c_void_p(), 1  # no work on the default stream, which would spoil a capture, waits
    with contextlib.suppress(OSError, AttributeError), torch.cuda.device(device):
        if ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), non_blocking) == 0:
            return torch.cuda.ExternalStream(handle.value, device)
    return torch.cuda.Stream(device)
