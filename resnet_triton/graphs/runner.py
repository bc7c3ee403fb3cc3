"""Models that run as CUDA graphs: one for each input shape that comes back, or of the snapshot of a frozen model.

A call first replays its shape's graph and then asks, while the GPU works, whether the model is still the one that was
captured. If it is not, the result is thrown away, the call runs as ever and the shape is captured again. Replaying an
outdated graph does no harm: it reads memory that the fingerprint keeps and writes memory of its own.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..ops.dispatch import Kernels
from . import cuda_graph as cuda
from .cuda_graph import Entry
from .fingerprint import Fingerprint
from .replay import CudaGraph, Graphs, Key, copied, key_of, uncaptured_call_reason
from .snapshot import snapshot


class Graphed(nn.Module):
    """A model whose `forward` may be `run`: recorded, and repeated for other images."""

    cuda_graph: CudaGraph = "auto"
    kernels: Kernels
    _triton_frozen = False
    _triton_runner: Runner | None = None

    @property
    def frozen(self) -> bool:
        """Whether calls use a snapshot of the batch norms. Setting it to another value lets go of the last one."""
        return self._triton_frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value != self._triton_frozen:
            self._triton_frozen = value
            forget(self)  # a call under way keeps to a runner that nobody asks again

    def _forward_impl(self, x: Tensor) -> Tensor:
        """What `forward` computes, operator by operator."""
        raise NotImplementedError

    def _entry(self, x: Tensor) -> Entry:
        """How images like `x` get into a graph: by a copy, unless a first operator can read them where they are.

        Such an operator is launched in front of the graph. It reads any images of the sizes, strides and dtype of `x`
        whose address is a multiple of 16.
        """
        return copied(self._forward_impl, x)

    def uncaptured_model_reason(self) -> str | None:
        """Why a call cannot be recorded once and repeated for other images; None if it can."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        forget_if_moved(self)
        return self

    def __del__(self) -> None:
        """Its graphs end with it at once, though its fingerprint leads from them to its attributes, and so to them."""
        known = self._triton_runner
        if known is not None and known.owner() is self:  # not a replica's
            known.end()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the graphs, which copies and pickles cannot take along."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_triton_runner", None)
        return state


def wanted(model: Graphed, x: Tensor) -> bool:
    """Whether a call may be more than `model._forward_impl(x)`: a graph's replay, or a snapshot's."""
    return model._triton_frozen or _graphs_wanted(model, x)


def run(model: Graphed, x: Tensor) -> Tensor:
    """`model._forward_impl(x)`, from a graph or a snapshot where that is the same. For calls that are `wanted`."""
    runner = _of(model)
    reason = uncaptured_call_reason(x)
    if reason is not None:
        runner.note(reason, model.cuda_graph)
        return model._forward_impl(x)
    return runner.run(model, x, not model._triton_frozen or _graphs_wanted(model, x))


def _graphs_wanted(model: Graphed, x: Tensor) -> bool:
    asked = model.cuda_graph is True or (model.cuda_graph == "auto" and model.kernels != "torch")
    return asked and cuda.takes(x)


def forget(model: Any) -> None:
    """Drop the graphs and the snapshot of a model."""
    vars(model).pop("_triton_runner", None)


def forget_if_moved(model: Graphed) -> None:
    """After `.to()`, `.half()` and the like: let go of the memory that the model has left, if it has."""
    known = model._triton_runner  # another thread may forget it meanwhile
    if known is not None and not known.holds():
        forget(model)


def describe(model: Graphed) -> str:
    """What has been captured, and how many calls ran without a graph, and why."""
    return _of(model).describe_model(model)


def _of(model: Graphed) -> Runner:
    runner = model._triton_runner
    # DataParallel's replicas start with all attributes of the model, a forked process with locks that others hold.
    if runner is None or runner.owner() is not model or runner.process != os.getpid():
        runner = model._triton_runner = Runner(model)
    return runner


class Runner(Graphs):
    """The graphs of one model, by input shape, or its snapshot, or both."""

    def __init__(self, model: Graphed) -> None:
        super().__init__()
        self.owner, self.process = weakref.ref(model), os.getpid()
        self._fingerprint: Fingerprint | None = None
        self._version: int | None = None  # the fingerprint's, before the last capture
        self._snapshot: Graphed | None = None

    def holds(self) -> bool:
        """Whether the model is what it was when it was captured or frozen."""
        known = self._fingerprint  # another thread's call may find it outdated meanwhile
        return known is None or known.holds()

    def end(self) -> None:
        """Let go of the model's parts, when nobody can call it any more."""
        self._fingerprint = None

    def is_stale(self) -> bool:
        if self._snapshot is not None or self.holds():
            return False
        self._fingerprint = None
        return True

    def begin(self) -> None:
        model = self.owner()
        if self._fingerprint is None and model is not None:
            self._fingerprint = Fingerprint(model)
        self._version = None if self._fingerprint is None else self._fingerprint.version()

    def was_written(self) -> bool:
        known = self._fingerprint
        return self._snapshot is None and known is not None and known.version() != self._version

    def run(self, model: Graphed, x: Tensor, graphs: bool) -> Tensor:
        """A call for which `uncaptured_call_reason` found none; `graphs` says whether it may use one."""
        key = key_of(x)
        place = x.data_ptr() if key[-1] else None
        if graphs and (replayed := self.replay(key, x, place, lambda: self._there(model, x))) is not None:
            return replayed
        source = self._source(model, x)
        y = source._forward_impl(x)  # the answer, whatever becomes of a capture
        if graphs:
            reason = model.uncaptured_model_reason if source is model else lambda: None
            self.consider(key, model.cuda_graph, reason, lambda: self._entry(source, key, x))
        return y

    def describe_model(self, model: Graphed) -> str:
        """For `report`."""
        taken = "frozen" if self._snapshot else "to be frozen at the next call"
        mode = f"cuda_graph={model.cuda_graph!r}" + (f", {taken}" if model.frozen else "")
        return f"{mode}; {self.describe()}"

    def _source(self, model: Graphed, x: Tensor) -> Graphed:
        """The model, or its snapshot if it is frozen."""
        if not model._triton_frozen:
            return model
        with self._lock:
            if self._snapshot is None and model.uncaptured_model_reason() is None and not cuda.capturing(x):
                made, known = snapshot(model), Fingerprint(model)
                cuda.finish(x)  # the next call may come on another stream
                self._snapshot, self._fingerprint = made, known
            return model if self._snapshot is None else self._snapshot

    def _entry(self, source: Graphed, key: Key, x: Tensor) -> Entry:
        entry = source._entry(x) if key[-1] else copied(source._forward_impl, x)
        return replace(entry, writes_no_parameter=True)

    def _there(self, model: Graphed, x: Tensor) -> Entry:
        source = model if self._snapshot is None else self._snapshot
        return Entry(x, None, source._forward_impl, writes_no_parameter=True)
