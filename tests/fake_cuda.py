"""A stand-in for `resnet_triton.graphs.cuda_graph` on the CPU: what a CUDA graph fixes, it fixes too.

A capture records every operator with the memory that it read and wrote. A replay runs the record again, on that memory,
whatever has become of the model's tensors since. Outside of the turn that a replay takes, from the wait for the one
before to the record of its end, the shared buffers belong to others: the fake fills them with NaN (bytes with 255).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from resnet_triton import models, optimize
from resnet_triton.graphs.cuda_graph import Entry


class FakeCuda:
    """The functions of `resnet_triton.graphs.cuda_graph`. `failure` is raised by the next captures, if it is set."""

    def __init__(self) -> None:
        self.available = True
        self.failure: Exception | None = None
        self.graphs: list[FakeGraph] = []
        self._begun = threading.local()
        self.captured_by_others = False
        self.finished = 0  # how often the host has waited

    def takes(self, x: Tensor) -> bool:
        return self.available

    def capturing(self, x: Tensor) -> bool:
        return self.captured_by_others

    def finish(self, x: Tensor) -> None:
        self.finished += 1

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, device: torch.device) -> None:
        return None

    def event(self) -> FakeEvent:
        self._begun.pool = _Pool()  # for the graphs that this thread captures next
        return FakeEvent(self._begun.pool)

    def capture(self, entry: Entry, beside: Any) -> FakeGraph:
        pool = self._begun.pool if beside is None else beside.pool
        assert pool.turn is None, "a capture while a replay uses the shared memory"
        if pool.lost:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if self.failure is not None:
            pool.lost = True
            raise self.failure
        graph = FakeGraph(pool, entry, beside)
        self.graphs.append(graph)
        pool.graphs.add(graph)
        return graph


class _Pool:
    """The memory that the graphs of one model share: a graph that a model has forgotten shares it with no new one."""

    def __init__(self) -> None:
        self.turn: int | None = None  # the thread whose replay it is
        self.lost = False  # for captures: in torch 2.11, where one could not be ended
        self.graphs: weakref.WeakSet[FakeGraph] = weakref.WeakSet()


class FakeEvent:
    def __init__(self, pool: _Pool) -> None:
        self.pool = pool

    def wait(self, stream: None) -> None:
        assert self.pool.turn is None, "two replays at once"
        self.pool.turn = threading.get_ident()
        for graph in self.pool.graphs:
            for buffer in _tensors(graph.input):
                buffer.fill_(torch.nan if buffer.is_floating_point() else 255)

    def record(self, stream: None) -> None:
        assert self.pool.turn == threading.get_ident(), "the end of a replay that did not wait for the one before"
        for graph in self.pool.graphs:
            for output in _tensors(graph.output):
                output.fill_(torch.nan)
        self.pool.turn = None


class FakeGraph:
    def __init__(self, pool: _Pool, entry: Entry, beside: Any) -> None:
        self.pool, self.fill, self.beside = pool, entry.fill, beside
        self.input = () if entry.fill is None else entry.buffer
        self.replays, self.writes_no_parameter = 0, entry.writes_no_parameter
        with _Tape() as tape:
            self.output = entry.body(entry.buffer)
        self.tape = tape.calls

    def replay(self, given: Any, stream: None) -> None:
        assert self.pool.turn == threading.get_ident(), "a replay that did not wait for the one before"
        if self.fill is not None:
            self.fill(given)
        for func, args, kwargs, old in self.tape:
            new = func(*args, **kwargs)
            for target, value in zip(_tensors(old), _tensors(new), strict=True):
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, _aliases(args), _aliases(kwargs or {}), _aliases(out)))
        return out


def _aliases(values: Any) -> Any:
    """The same memory, but not the same tensor objects: those may be given other memory."""
    return tree_map_only(Tensor, lambda t: t.detach(), values)


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, tuple | list) else [values]) if isinstance(v, Tensor)]


def small(**modes: Any) -> models.ResNet:
    """A ResNet with one block a stage and batch norms that do something."""
    torch.manual_seed(0)
    model = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=512).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.2, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    return optimize(model, **modes, inplace=True)


def images(n: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)).to(dtype)


def captured(model: Any, *inputs: Tensor) -> None:
    """Call twice: afterwards each input has its graph."""
    for x in inputs:
        model(x)
        model(x)


def doubled(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return output * 2


def with_grad(model: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return model(x)
