"""What an operator is: its call as a value, which is validated, planned and run, and which `torch.library` knows.

An `Operation` says what it returns, what keeps it off our kernels, which launches compute it and what PyTorch would
compute; here is what all of them do with that. Its fields are its schema (`schema.py`). torch.compile, export,
autograd, autocast and modes see `torch.ops.resnet_triton.NAME`; where none of them looks, a call goes straight to its
launches, for the detour through the dispatcher costs more than one of them.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from typing_extensions import Self

from ..config.device import DeviceFacts
from ..kernels.cost import Cost
from ..kernels.launch import Launch
from . import dispatch, first_run, gluon, in_graph, interpreter
from .dispatch import AUTOCAST, GRADIENT, REMEDIES, Choice, Modes, choose, count
from .schema import Schema

Shape = tuple[int, ...]

_library = torch.library.Library("resnet_triton", "DEF")
_told: set[str] = set()
"""Reasons of which somebody on a GPU was told."""
IMAGES = {"x", "other", "residual", "shortcut_x"}
"""Arguments whose first dimension is the batch."""


class Result(NamedTuple):
    """What a valid call returns, before anything is computed."""

    shape: Shape
    dtype: torch.dtype
    memory: torch.memory_format = torch.channels_last

    def empty(self, where: torch.device) -> Tensor:
        """A tensor for it, uninitialised."""
        return torch.empty(self.shape, dtype=self.dtype, device=where, memory_format=self.memory)


class Prepared(NamedTuple):
    """A valid call's result, uninitialised, and what writes it; or why our kernels do not, and None."""

    out: Tensor | None
    launches: tuple[Launch, ...] = ()
    reason: str = ""


class Operation:
    """A call of one operator. Subclasses are dataclasses, and `register` makes operators of them.

    A call goes through `run`, which hands it on:

    * where a compiler, a tracer, a mode or a transform looks on, to `dispatched`, from which it comes to `compute`;
    * with autocast or a gradient, to `fall_back`: to `run_torch`, or an error if our kernels were asked for;
    * otherwise straight to `compute`: where `choose` says PyTorch, `run_torch`; else `prepare` and its launches,
      or `fall_back` if their machine code may be wrong, or their result was.
    """

    name: ClassVar[str]
    schema: ClassVar[Schema]
    per_image: ClassVar[bool] = True
    """Whether sums over the batch could differ: then a batch-invariant call on PyTorch computes images one by one."""

    rounds_between: ClassVar[bool] = False
    """Whether the kernels round to the result's dtype before the end: what they sum."""

    autocast: ClassVar[bool] = False
    """Whether PyTorch would compute it in another dtype under autocast; then PyTorch does."""

    x: Tensor
    modes: Modes

    def result(self) -> Result:
        """Validate the call: ValueError or TypeError, naming the argument."""
        raise NotImplementedError

    def fallback_reason(self, shape: Shape) -> str | None:
        """Why our kernels cannot compute a result of this shape."""
        raise NotImplementedError

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        """The launches that write `out`, on a device with these facts."""
        raise NotImplementedError

    def other_launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        """Other launches, where the first ones may give wrong answers, by their machine code, or have; or none."""
        return ()

    def output(self) -> Tensor:
        """Validate, and allocate the result, uninitialised: also the fake for tracing."""
        return self.result().empty(self.x.device)

    def reference(self) -> Tensor:
        """The result as PyTorch computes it."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """FLOPs and bytes that no implementation of a valid call can do without."""
        raise NotImplementedError

    def image(self, i: int) -> Self:
        """The call of image `i` alone."""
        alone: Self = self.schema.with_tensors(self, lambda name, t: _one(t, i) if name in IMAGES else t)
        return alone

    def run(self) -> Tensor:
        """Compute the result on our kernels or on PyTorch, before torch's eyes where it looks."""
        if torch.compiler.is_compiling():
            return self.dispatched()
        try:
            if dispatch.is_watched(tensors := self.schema.tensors(self)):
                self.schema.check(self)
                if torch._C._is_tracing() and self.backend_of_trace() == "torch":
                    return self.run_torch()  # so that the trace runs where this package is not
                return self.dispatched()
            if self.autocast and torch.is_autocast_enabled(self.x.device.type):
                return self.fall_back(AUTOCAST)
            if dispatch.is_differentiated(tensors):
                return self.fall_back(GRADIENT)
            return self.compute()
        except (AttributeError, IndexError):  # of what is no tensor, most likely; asking first would cost each call
            self.schema.check(self)
            raise

    def dispatched(self) -> Tensor:
        """The call as torch sees it: an operator of ours, or PyTorch's for ONNX, which knows no others."""
        if torch.onnx.is_in_onnx_export():
            return self.reference()
        return getattr(torch.ops.resnet_triton, self.name)(*self.schema.flatten(self))

    def backend_of_trace(self) -> str:
        """Where it runs, decided beside torch.jit's trace, which would hold every size that is looked at."""
        torch_c: Any = torch._C
        tracing = torch_c._get_tracing_state()
        torch_c._set_tracing_state(None)
        try:
            return self.choose()[1].backend
        finally:
            torch_c._set_tracing_state(tracing)

    def compute(self, facts: DeviceFacts | None = None) -> Tensor:
        """The result, where nothing looks: here the dispatcher comes in.

        By launches for the device's facts, or for those that are given.
        """
        result, choice = self.choose()
        if choice.backend == "torch":
            return self.run_torch()
        if facts is None:
            facts = gluon.facts(self.x.device)
        with on(self.x.device):
            launches: Sequence[Launch] = ()
            kernels: list[Any] = []
            try:
                out, launches, reason = self.prepare(result, facts)
                for launch in launches:
                    kernels.append(launch.run())
            except Exception as error:
                return gluon.in_place_of(launches, error, partial(self.compute, gluon.without(facts)))
            if out is not None and not first_run.is_right(self, out, launches, kernels):
                return self.compute(facts)  # by others
        if out is None:
            return self.fall_back(reason)
        if launches:
            count(self.name, "triton")
        return out

    def choose(self) -> tuple[Result, Choice]:
        """Validate; say where the call runs, and why. A batch-invariant call runs where one of its images would."""
        result, (batch_invariant, kernels) = self.result(), self.modes
        reason = self.fallback_reason(result.shape)
        choice = choose(kernels, self.x.device, result.dtype, reason)
        if reason is not None and batch_invariant and self.per_image:
            alone = choose(kernels, self.x.device, result.dtype, self.fallback_reason((1, *result.shape[1:])))
            if alone.backend != choice.backend:
                raise NotImplementedError(f"batch_invariant=True cannot run so large a batch: {reason}; split it")
        return result, choice

    def prepare(self, result: Result, facts: DeviceFacts) -> Prepared:
        """The output of a valid call and its launches, those that may be launched here."""
        out = result.empty(self.x.device)
        if out.numel() == 0:
            return Prepared(out)
        launches = self.launches(out, facts)
        if (reason := _reason_against(launches, out.device, facts)) is None:
            return Prepared(out, launches)
        if self.modes.batch_invariant and self.per_image:  # at another batch size the kernel may be another
            raise NotImplementedError(f"batch_invariant=True cannot run here: {reason}")
        again = self.other_launches(out, facts)
        if again and (reason := _reason_against(again, out.device, facts)) is None:
            return Prepared(out, again)
        return Prepared(None, (), reason or "")

    def fall_back(self, reason: str) -> Tensor:
        """Validate and run on PyTorch, or raise if the kernels were asked for."""
        choose(self.modes.kernels, self.x.device, self.result().dtype, reason)
        wanted = self.modes.kernels == "auto" and self.x.is_cuda
        if wanted and reason in REMEDIES and reason not in _told:
            _told.add(reason)
            said = f"{self.name} runs on PyTorch, not on our kernels, because {reason}; {REMEDIES[reason]}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        return self.run_torch()

    def run_torch(self) -> Tensor:
        """Run on PyTorch, counted."""
        count(self.name, "torch")
        if not (self.modes.batch_invariant and self.per_image) or self.x.dim() < 2 or len(self.x) == 0:
            return self.reference()
        # One image after another, for PyTorch may choose another algorithm for another batch size.
        if get_proxy_mode() is not None:  # a compiler that sees the images one by one may put them together again
            raise NotImplementedError(
                "batch_invariant=True cannot be compiled with gradients or autocast; call it under no_grad"
            )
        result = torch.cat([self.image(i).reference() for i in range(len(self.x))])
        return result.contiguous(memory_format=self.result().memory)


def _one(t: Tensor, i: int) -> Tensor:
    """A copy, because the layout and the alignment of the original could make a difference as well."""
    return t[i : i + 1].clone(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


def _fold(t: Tensor | None, dim: int | None, n: int) -> Tensor | None:
    """The images of `n` calls as one batch, split along `dim` or the same for all."""
    if t is None:
        return None
    return (t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)


_threads = threading.local()


def on(where: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where launches for a device may run: it is the current one, or the interpreter this thread's."""
    if where.type != "cuda":
        return interpreter.ready()
    if not hasattr(_threads, "ready"):
        # A new thread has no CUDA context before it asks the runtime for anything. Triton sees to that when it launches
        # a kernel (triton#3729), but not when it makes tensor maps for it.
        torch.cuda.is_current_stream_capturing()
        _threads.ready = True
    return torch.cuda.device(where)


def _asynchronous(where: torch.device, facts: DeviceFacts) -> bool:
    """Whether right answers of a kernel do not show that its next one is right: see `machine_code/verdict.py`."""
    return where.type == "cuda" and facts.arch == 90 and not interpreter.active()


def _reason_against(launches: Sequence[Launch], where: torch.device, facts: DeviceFacts) -> str | None:
    """Why these launches must not go ahead: a wrong result of one, or what its machine code may do.

    `gluon.NotCompiled` if that asks for a kernel which does not compile.
    """
    try:
        if (reason := first_run.wrong_reason(launches)) is not None or not _asynchronous(where, facts):
            return reason
        from ..machine_code import verdict  # not above: it asks for Triton

        return next((reason for reason in map(verdict.unsafe_reason, launches) if reason is not None), None)
    except Exception as error:  # whatever a compiler raises
        raise gluon.NotCompiled(launches, error) from error


OPERATORS: dict[str, type[Operation]] = {}


def register(name: str, cls: type[Operation]) -> None:
    """Define `resnet_triton::NAME` by a subclass of `Operation`."""
    cls.name, cls.schema = name, Schema(cls)
    build = cls.schema.build

    def compute(*values: Any) -> Tensor:
        token = in_graph.borrowing.set(True)
        try:
            return build(values).compute()
        finally:
            in_graph.borrowing.reset(token)

    def fake(*values: Any) -> Tensor:
        return build(values).output()

    def autograd(*values: Any) -> Tensor:
        if dispatch.is_differentiated(v for v in values if isinstance(v, Tensor)):
            return build(values).fall_back(GRADIENT)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.resnet_triton, name)(*values)

    def under_autocast(*values: Any) -> Tensor:
        return build(values).fall_back(AUTOCAST)

    def vmapped(info: Any, dims: Sequence[Any], *values: Any) -> tuple[Tensor, int]:
        """A batch of calls: as one of larger batches, or one after the other if their parameters differ."""
        n, split = info.batch_size, [isinstance(d, int) for d in dims]  # a list of numbers has a list of Nones
        known = list(zip(cls.schema.arguments, values, dims, split, strict=True))
        if values[0].dim() - split[0] < 2 or any(s and a.name not in IMAGES for a, _, _, s in known):
            calls = ([v.select(d, i) if s else v for _, v, d, s in known] for i in range(n))
            return torch.stack([build(call).dispatched() for call in calls]), 0
        out = build([v if a.name not in IMAGES else _fold(v, d, n) for a, v, d, _ in known]).dispatched()
        return out.unflatten(0, (n, len(out) // n)), 0

    OPERATORS[name] = cls
    _library.define(name + cls.schema.text)
    _library.impl(name, compute, "CPU")
    _library.impl(name, compute, "CUDA")
    _library.impl(name, autograd, "Autograd")
    if cls.autocast:
        _library.impl(name, under_autocast, "AutocastCPU")
        _library.impl(name, under_autocast, "AutocastCUDA")
    torch.library.register_fake(f"resnet_triton::{name}", fake, lib=_library)
    torch.library.register_vmap(f"resnet_triton::{name}", vmapped, lib=_library)
