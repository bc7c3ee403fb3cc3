"""Fixed-shape execution: a CUDA graph for each input shape that comes back, and the snapshot of a frozen model.

A call first replays its shape's graph and then asks, while the GPU works, whether the model is still the one that was
captured. If it is not, the result is thrown away, the call runs as ever and the shape is captured again. Replaying an
outdated graph does no harm: it reads memory that the fingerprint keeps and writes memory of its own.

Replays never wait for the GPU, and never overlap on it: they share buffers, so each makes its stream wait for the one
before. Capturing waits once; meanwhile CUDA forbids other threads to call `torch.cuda.synchronize`.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..ops import dispatch
from ..ops.dispatch import DTYPES, Kernels
from ..ops.precision import conv_precision, matmul_precision
from . import cuda_graph as cuda
from .cuda_graph import Entry
from .fingerprint import Fingerprint
from .snapshot import snapshot

LIMIT = 8
"""Graphs a model keeps; the least recently used goes first. Each costs its first buffer; all else they share."""
_REMEMBERED = 1024  # shapes whose calls are counted
_IMAGES = frozenset((*DTYPES, torch.uint8))
_WAITING = "a shape's first calls"
_FAILED = "the capture failed"

CudaGraph = bool | Literal["auto"]


def check_mode(cuda_graph: object) -> None:
    """ValueError unless `cuda_graph` is one of `CudaGraph`."""
    if not (isinstance(cuda_graph, bool) or cuda_graph == "auto"):
        raise ValueError(f"cuda_graph={cuda_graph!r}, expected 'auto', True or False")


class Graphed(nn.Module):
    """A model whose `forward` may be `run`: recorded, and repeated for other images."""

    cuda_graph: CudaGraph = "auto"
    frozen = False
    kernels: Kernels
    _runner: Runner | None = None

    def _forward_impl(self, x: Tensor) -> Tensor:
        """What `forward` computes, operator by operator."""
        raise NotImplementedError

    def _entry(self, x: Tensor) -> Entry:
        """How images like `x` get into a graph: by a copy, unless a first operator can read them where they are.

        Such an operator is launched in front of the graph. It reads any images of the sizes, strides and dtype of `x`
        whose address is a multiple of 16.
        """
        return _copied(self._forward_impl, x)

    def uncaptured_reason(self) -> str | None:
        """Why a call cannot be recorded once and repeated for other images; None if it can."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        forget_if_moved(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which copies and pickles cannot take along."""
        return {name: value for name, value in vars(self).items() if name != "_runner"}


def _copied(body: Callable[[Tensor], Tensor], x: Tensor) -> Entry:
    # Not allocated inside the capture: under torch.use_deterministic_algorithms the graph would fill it.
    buffer = torch.empty_like(x)
    return Entry(buffer, lambda images: buffer.copy_(images), body)


def wanted(model: Graphed, x: Tensor) -> bool:
    """Whether a call may be more than `model._forward_impl(x)`: a graph's replay, or a snapshot's."""
    return model.frozen or _graphs_wanted(model, x)


def run(model: Graphed, x: Tensor) -> Tensor:
    """`model._forward_impl(x)`, from a graph or a snapshot where that is the same. For calls that are `wanted`."""
    runner = _of(model)
    reason = uncaptured_reason(x)
    if reason is not None:
        runner.note(model, reason)
        return model._forward_impl(x)
    return runner.run(model, x, not model.frozen or _graphs_wanted(model, x))


def _graphs_wanted(model: Graphed, x: Tensor) -> bool:
    asked = model.cuda_graph is True or (model.cuda_graph == "auto" and model.kernels != "torch")
    return asked and cuda.takes(x)


def uncaptured_reason(x: Tensor) -> str | None:
    """What about this call, rather than about the model, wants every operator run again; None if nothing does."""
    if torch.is_grad_enabled():
        return "grad mode is on"
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if x.dtype not in _IMAGES or x.numel() == 0:
        return "the input is not a batch of images in fp32, fp16, bf16 or bytes"
    if _has_any_global_hook():
        return "a hook on all modules"
    if dispatch.transformed() or forward_ad._current_level >= 0:
        return "a transform, a tracer or a mode sees every operator"
    return None


def forget(model: Any) -> None:
    """Drop the graphs and the snapshot of a model."""
    vars(model).pop("_runner", None)


def forget_if_moved(model: Graphed) -> None:
    """After `.to()`, `.half()` and the like: let go of the memory that the model has left, if it has."""
    known = model._runner  # another thread may forget it meanwhile
    if known is not None and not known.holds():
        forget(model)


def describe(model: Graphed) -> str:
    """What has been captured, and how many calls ran without a graph, and why."""
    return _of(model).describe(model)


def _of(model: Graphed) -> Runner:
    runner = model._runner
    # DataParallel's replicas start with all attributes of the model, a forked process with locks that others hold.
    if runner is None or runner.owner() is not model or runner.process != os.getpid():
        runner = model._runner = Runner(model)
    return runner


Key = tuple[Any, ...]


@dataclass
class _Shape:
    """What is remembered of an input shape: calls without a graph, and how many of them earn it one."""

    wanted: int
    calls: int = 0
    wasted: int = 0
    failed: bool = False


class Runner:
    """The graphs of one model, by input shape, or its snapshot, or both."""

    def __init__(self, model: Graphed) -> None:
        self.owner, self.process = weakref.ref(model), os.getpid()
        self.eager: Counter[str] = Counter()
        self._lock = threading.Lock()  # held from a replay's first launch to its clone: the buffers between are shared
        self._graphs: OrderedDict[Key, cuda.Captured] = OrderedDict()
        self._shapes: OrderedDict[Key, _Shape] = OrderedDict()
        self._done: Any = None  # the event that the next replay waits for
        self._fingerprint: Fingerprint | None = None
        self._snapshot: Graphed | None = None

    def holds(self) -> bool:
        """Whether the model is what it was when it was captured or frozen."""
        return self._fingerprint is None or self._fingerprint.holds()

    def run(self, model: Graphed, x: Tensor, graphs: bool) -> Tensor:
        """A call for which `uncaptured_reason` found none; `graphs` says whether it may use one."""
        key = _key(x)
        if graphs and (replayed := self._replay(key, x)) is not None:
            return replayed
        source = self._source(model, x)
        y = source._forward_impl(x)  # the answer, whatever becomes of a capture
        if graphs:
            self._consider(model, source, key, x)
        return y

    def note(self, model: Graphed, reason: str) -> None:
        """Count a call without a graph; where graphs were demanded, warn once of each reason not warned of already."""
        with self._lock:
            self.eager[reason] += 1
            first = self.eager[reason] == 1
        if first and model.cuda_graph is True and reason not in (_WAITING, _FAILED):
            warnings.warn(f"cuda_graph=True, but calls run without a graph: {reason}", RuntimeWarning, stacklevel=2)

    def describe(self, model: Graphed) -> str:
        """For `report`."""
        with self._lock:
            captured = [f"{_name(key)} replayed {graph.replays} times" for key, graph in self._graphs.items()]
            eager = [f"{reason} {n} times" for reason, n in self.eager.items()]
            taken = "frozen" if self._snapshot else "to be frozen at the next call"
        mode = f"cuda_graph={model.cuda_graph!r}" + (f", {taken}" if model.frozen else "")
        return f"{mode}; graphs: {', '.join(captured) or 'none'}; calls without: {', '.join(eager) or 'none counted'}"

    def _source(self, model: Graphed, x: Tensor) -> Graphed:
        """The model, or its snapshot if it is frozen."""
        if not model.frozen:
            return model
        with self._lock:
            if self._snapshot is None and model.uncaptured_reason() is None and not cuda.capturing(x):
                self._snapshot, self._fingerprint = snapshot(model), Fingerprint(model)
                cuda.finish(x)  # the next call may come on another stream
            return model if self._snapshot is None else self._snapshot

    def _replay(self, key: Key, x: Tensor) -> Tensor | None:
        with self._lock:
            captured = self._graphs.get(key)
            if captured is None:
                return None
            with cuda.on(x.device):
                stream = cuda.current_stream(x.device)
                self._done.wait(stream)
                try:
                    captured.replay(x, stream)
                    y = captured.output.clone()
                finally:  # whatever has been launched, the next replay has to wait for it
                    self._done.record(stream)
            if self._snapshot is None and not self.holds():
                self._drop_all()
                return None
            self._graphs.move_to_end(key)
            captured.replays += 1
            return y

    def _consider(self, model: Graphed, source: Graphed, key: Key, x: Tensor) -> None:
        """Capture the shape of a call that has just run without a graph, if it is due."""
        with self._lock:
            reason = self._why_not(model, source, key) or self._capture(source, key, x)
        self.note(model, reason or _WAITING)

    def _why_not(self, model: Graphed, source: Graphed, key: Key) -> str | None:
        shape = self._shapes.setdefault(key, _Shape(wanted=1 if model.cuda_graph is True else 2))
        self._shapes.move_to_end(key)
        if len(self._shapes) > _REMEMBERED:
            self._shapes.popitem(last=False)
        shape.calls += 1
        if shape.failed:
            return _FAILED
        if key in self._graphs or shape.calls < shape.wanted:  # another thread may have captured it a moment ago
            return _WAITING
        return model.uncaptured_reason() if source is model else None

    def _capture(self, source: Graphed, key: Key, x: Tensor) -> str | None:
        """Why it failed, or None."""
        if self._snapshot is None and not self.holds():
            self._drop_all()
        while len(self._graphs) >= LIMIT:
            self._drop(next(iter(self._graphs)))
        if not self._graphs:
            self._done = cuda.event()
        if self._fingerprint is None:
            self._fingerprint = Fingerprint(source)
        beside = next(iter(self._graphs.values()), None)
        try:
            # Outside inference mode, or only calls inside it could write the input buffer.
            with cuda.on(x.device), torch.inference_mode(False), torch.no_grad():
                entry = source._entry(x) if key[-1] else _copied(source._forward_impl, x)
                self._graphs[key] = cuda.capture(entry, beside)
        except Exception as error:  # the caller has an answer; whatever this was, the shape goes on without a graph
            self._shapes[key].failed = True
            warnings.warn(f"no CUDA graph for {_name(key)}, its capture failed: {error}", RuntimeWarning, stacklevel=2)
            return _FAILED
        return None

    def _drop_all(self) -> None:
        for key in list(self._graphs):
            self._drop(key)
        self._fingerprint = None

    def _drop(self, key: Key) -> None:
        """Where a graph was never used, the shape's next one has to be earned by 1, 2, 4, ... calls: more shapes than
        `LIMIT` in turns, or a model changed before each call, would be captured every time."""
        captured, shape = self._graphs.pop(key), self._shapes.get(key)
        if shape is not None and captured.replays == 0:
            shape.wanted, shape.calls, shape.wasted = 2**shape.wasted, 0, shape.wasted + 1


def _key(x: Tensor) -> Key:
    """What two calls must have in common to use one graph, besides the model. Last, whether a kernel may read `x`."""
    readable = x.data_ptr() % 16 == 0 and not (x.is_neg() or x._is_zerotensor())
    layout = x.stride() if readable else x.is_contiguous(memory_format=torch.channels_last)
    # TF32 or not is read when a kernel is launched. Asked for bytes, too: they may become fp32 on the way in.
    wide = x.dtype == torch.float32 or x.dtype == torch.uint8
    tf32 = (conv_precision(torch.float32), matmul_precision(torch.float32)) if wide else None
    return x.device, x.shape, x.dtype, layout, tf32, readable


def _name(key: Key) -> str:
    return "x".join(map(str, key[1])) + " " + str(key[2]).removeprefix("torch.")
