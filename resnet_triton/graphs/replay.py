"""CUDA graphs for calls that come back: captured when they are due, replayed one at a time.

Replays never wait for the GPU, and never overlap on it: they share buffers, so each makes its stream wait for the one
before. Capturing waits once; meanwhile CUDA forbids other threads to call `torch.cuda.synchronize`, and torch 2.11 to
draw random numbers on the device.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..ops import dispatch, gluon
from ..ops.dispatch import DTYPES
from ..ops.precision import conv_precision, matmul_precision
from . import cuda_graph as cuda
from .cuda_graph import Entry

LIMIT = 8
"""Shapes of which one model keeps graphs; the least recently used goes first. Each costs its first buffer, and each
graph its results; all else they share."""
_REMEMBERED = 1024  # shapes whose calls are counted, and places whose replays are
SETTLED = 32
"""Replays on inputs at the same addresses after which a further graph reads them there; twice as many for each next."""
_PLACES = 4  # such graphs of a shape
_IMAGES = frozenset((*DTYPES, torch.uint8))
WAITING = "a shape's first calls"
FAILED = "the capture failed"
FAILED_BEFORE = "an earlier capture failed"

CudaGraph = bool | Literal["auto"]


def check_cuda_graph(cuda_graph: object) -> None:
    """ValueError unless `cuda_graph` is one of `CudaGraph`."""
    if not (isinstance(cuda_graph, bool) or cuda_graph == "auto"):
        raise ValueError(f"cuda_graph={cuda_graph!r}, expected 'auto', True or False")


def uncaptured_call_reason(x: Tensor) -> str | None:
    """What about this call, rather than about the model, wants every operator run again; None if nothing does."""
    if x.dtype not in _IMAGES or x.numel() == 0:
        return "the input is not a batch of images in fp32, fp16, bf16 or bytes"
    return watched_reason(x.device)


def watched_reason(device: torch.device) -> str | None:
    """`uncaptured_call_reason` of a call whose inputs may be any."""
    if torch.is_grad_enabled():
        return "grad mode is on"
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if _has_any_global_hook():
        return "a hook on all modules"
    if dispatch.transformed() or dispatch.in_function_mode() or forward_ad._current_level >= 0:
        return "a transform, a tracer or a mode sees every operator"
    return None


def copied(body: Callable[[Tensor], Tensor], x: Tensor) -> Entry:
    # Not allocated inside the capture: under torch.use_deterministic_algorithms the graph would fill it.
    buffer = torch.empty_like(x).copy_(x)
    return Entry(buffer, lambda images: buffer.copy_(images), body)


Key = tuple[Any, ...]
Place = Any  # addresses of inputs; None if no kernel may read them there


@dataclass
class _Shape:
    """What is remembered of an input shape: calls without a graph, and how many of them earn it one."""

    wanted: float  # infinitely many, if it is to have none
    calls: int = 0
    wasted: int = 0
    failed: bool = False  # the last capture
    settled: int = field(default_factory=lambda: SETTLED)  # replays on inputs at one place that earn the next graph

    def again(self) -> None:
        """The next graph has to be earned by 1, 2, 4, ... calls."""
        self.wanted, self.calls, self.wasted = 2**self.wasted, 0, self.wasted + 1


@dataclass
class _Replayed:
    """The graphs of a shape: of inputs from anywhere, and those that read them at one place, once they stay there."""

    anywhere: cuda.Captured
    there: dict[Place, cuda.Captured] = field(default_factory=dict)
    seen: Counter[Place] = field(default_factory=Counter)  # replays of the first

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in (self.anywhere, *self.there.values()))


class Graphs:
    """CUDA graphs by key, for calls that come back. They share memory, so one is replayed at a time.

    A shape's first call runs without a graph, and behind its second `consider` captures one. From then on `replay`
    answers. If the graph is dropped, because the model has changed or other shapes needed its room, the next call
    captures again, or a later one if the graph had not been used (`_drop`). Inputs that keep coming from the same
    addresses earn further graphs, which read them there (`_settle`). A shape whose capture failed has none for good, or
    earns it again if the reason is passing: memory has run out, or somebody else captures.
    """

    def __init__(self) -> None:
        self.eager: Counter[str] = Counter()
        self._lock = threading.Lock()  # held from a replay's first launch to its clone: the buffers between are shared
        self._graphs: OrderedDict[Key, _Replayed] = OrderedDict()
        self._shapes: OrderedDict[Key, _Shape] = OrderedDict()
        self._done: Any = None  # the event that the next replay waits for

    def is_stale(self) -> bool:
        """Whether calls compute something else than what was captured. Asked behind each replay."""
        return False

    def begin(self) -> None:
        """What there is to do before each capture."""

    def was_written(self) -> bool:
        """Whether another thread has changed what was just captured, be it for a moment. Asked behind each capture."""
        return False

    def note(self, reason: str, cuda_graph: CudaGraph) -> None:
        """Count a call without a graph; where graphs were demanded, warn once of each reason not warned of already."""
        with self._lock:
            self.eager[reason] += 1
            first = self.eager[reason] == 1
        if first and cuda_graph is True and reason not in (WAITING, FAILED, FAILED_BEFORE):
            warnings.warn(f"cuda_graph=True, but calls run without a graph: {reason}", RuntimeWarning, stacklevel=2)

    def describe(self) -> str:
        """What has been captured, and how many calls ran without a graph, and why: for `report`."""
        with self._lock:
            captured = [f"{_name(key)} replayed {graphs.replays} times" for key, graphs in self._graphs.items()]
            eager = [f"{reason} {n} times" for reason, n in self.eager.items()]
        return f"graphs: {', '.join(captured) or 'none'}; calls without: {', '.join(eager) or 'none counted'}"

    def replay(self, key: Key, given: Any, place: Place, entry: Callable[[], Entry]) -> Any:
        """The results of a call on inputs at `place`; None if there is no graph that holds.

        Once they have come from there often, a graph of `entry` is captured, which reads them there.
        """
        with self._lock:
            graphs = self._graphs.get(key)
            if graphs is None:
                return None
            graph = graphs.there.get(place, graphs.anywhere)
            with cuda.on(key[0]):
                stream = cuda.current_stream(key[0])
                self._done.wait(stream)
                try:
                    graph.replay(given, stream)
                    y = _cloned(graph.output)
                finally:  # whatever has been launched, the next replay has to wait for it
                    self._done.record(stream)
            if self.is_stale():
                self._drop_all()
                return None
            if len(self._graphs) > 1:
                self._graphs.move_to_end(key)
            graph.replays += 1
            if graph is graphs.anywhere and place is not None and len(graphs.there) < _PLACES:
                self._settle(key, place, entry)
            return y

    def consider(
        self, key: Key, cuda_graph: CudaGraph, reason: Callable[[], str | None], entry: Callable[[], Entry]
    ) -> None:
        """Capture a call that has just run without a graph, by its `entry`, if it is due and `reason` finds nothing."""
        with self._lock:
            why = self._why_not(key, cuda_graph) or reason() or self._capture(key, reason, entry)
        self.note(why or WAITING, cuda_graph)

    def drop(self) -> None:
        """Let go of all graphs."""
        with self._lock:
            self._drop_all()

    def _why_not(self, key: Key, cuda_graph: CudaGraph) -> str | None:
        shape = self._shapes.setdefault(key, _Shape(wanted=1 if cuda_graph is True else 2))
        self._shapes.move_to_end(key)
        if len(self._shapes) > _REMEMBERED:
            self._shapes.popitem(last=False)
        shape.calls += 1
        if key in self._graphs or shape.calls < shape.wanted:  # another thread may have captured it a moment ago
            return FAILED_BEFORE if shape.failed else WAITING
        return None

    def _capture(self, key: Key, reason: Callable[[], str | None], entry: Callable[[], Entry]) -> str | None:
        """Why there is none, or None."""
        if self.is_stale():
            self._drop_all()
        while len(self._graphs) >= LIMIT:
            self._drop(next(iter(self._graphs)))
        if not self._graphs:
            self._done = cuda.event()
        beside = next((graphs.anywhere for graphs in self._graphs.values()), None)
        with self._capturing(key):
            self.begin()
            if (why := reason()) is not None:  # by what another thread has changed before it is watched
                return why
            self._graphs[key] = _Replayed(cuda.capture(entry(), beside))
        if key not in self._graphs:
            return FAILED
        self._shapes[key].failed = False
        if self.is_stale():
            self._drop_all()
        elif self.was_written():
            self._drop(key)
        return None

    def _settle(self, key: Key, place: Place, entry: Callable[[], Entry]) -> None:
        """Count a replay on inputs at `place`. If it is time, capture a graph that reads them there.

        Nothing is launched or copied in front of such a graph.
        """
        graphs = self._graphs[key]
        shape = self._shapes.setdefault(key, _Shape(wanted=1))  # where it has been forgotten meanwhile
        if len(graphs.seen) == _REMEMBERED:
            graphs.seen.clear()
        graphs.seen[place] += 1
        if graphs.seen[place] < shape.settled:
            return
        shape.settled *= 2
        graphs.seen.clear()
        with self._capturing(key):
            self.begin()
            graphs.there[place] = cuda.capture(entry(), graphs.anywhere)
        if self.is_stale():
            self._drop_all()
        elif self.was_written():
            graphs.there.pop(place, None)

    @contextlib.contextmanager
    def _capturing(self, key: Key) -> Iterator[None]:
        """Where a graph of a key is captured. If that fails, there is none at all, for the caller has an answer."""
        try:
            # Outside inference mode, or only calls inside it could write the input buffer.
            with cuda.on(key[0]), torch.inference_mode(False), torch.no_grad():
                yield
        except Exception as error:
            if key not in self._graphs:  # it would have been the first
                shape = self._shapes[key]
                shape.failed = True
                shape.again()
                if not gluon.is_passing(error):
                    shape.wanted = math.inf
            self._drop_all()  # torch 2.11 captures nothing more into memory where ending a capture has failed
            warnings.warn(f"no CUDA graph for {_name(key)}, its capture failed: {error}", RuntimeWarning, stacklevel=4)

    def _drop_all(self) -> None:
        for key in list(self._graphs):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        """Where a graph was never used, the shape's next one has to be earned: more shapes than `LIMIT` in turns, or a
        model changed before each call, would be captured every time."""
        graphs, shape = self._graphs.pop(key), self._shapes.get(key)
        if shape is not None and graphs.replays == 0:
            shape.again()


def _cloned(output: Any) -> Any:
    """Results of a graph for its caller: the graph writes its own again."""
    if isinstance(output, tuple):
        return [_like(t) if isinstance(t, Tensor) else t for t in output]
    return output.clone()


def _like(t: Tensor) -> Tensor:
    """A copy with the strides of `t`, which may have gaps or repeat elements."""
    copy = t.clone()
    if copy.stride() == t.stride() or t.numel() == 0:
        return copy
    extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).clone().as_strided(t.shape, t.stride())


def key_of(x: Tensor) -> Key:
    """What two calls must have in common to use one graph, besides the model: first the device, then the shape and the
    dtype; last, whether a kernel may read `x`."""
    readable = x.data_ptr() % 16 == 0 and not (x.is_neg() or x.is_conj() or x._is_zerotensor())
    layout = x.stride() if readable else x.is_contiguous(memory_format=torch.channels_last)
    # TF32 or not is read when a kernel is launched. Asked for bytes, too: they may become fp32 on the way in.
    wide = x.dtype == torch.float32 or x.dtype == torch.uint8
    return x.device, x.shape, x.dtype, layout, tf32() if wide else None, readable


def tf32() -> tuple[str, str]:
    return conv_precision(torch.float32), matmul_precision(torch.float32)


def _name(key: Key) -> str:
    return "x".join(map(str, key[1])) + " " + str(key[2]).removeprefix("torch.")
