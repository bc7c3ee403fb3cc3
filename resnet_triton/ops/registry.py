"""What an operator is, and how `torch.library` learns of it: what torch.compile, export and autograd see.

An operator validates its call, chooses between kernels and PyTorch (`dispatch.choose`), allocates the result and
launches; most need one launch. Around it stand a fake for tracing, and autograd and autocast kernels that hand the call
to PyTorch.

Call operators as `torch.ops.resnet_triton.x`; holding the operator object would break deepcopy and pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..config import device
from . import interpreter
from .dispatch import Choice, check_mode, choose, count, observed

if TYPE_CHECKING:
    from ..kernels.launch import Launch

Shape = tuple[int, ...]

_library = torch.library.Library("resnet_triton", "DEF")


class Result(NamedTuple):
    """What a valid call returns, before anything is computed."""

    shape: Shape
    dtype: torch.dtype
    memory: torch.memory_format = torch.channels_last


class Operator(NamedTuple):
    """One operator's parts; all take the operator's arguments, in the order of its schema."""

    name: str
    result: Callable[..., Result]
    obstacle: Callable[..., str | None]
    plan: Callable[..., tuple[Launch, ...]]
    torch_form: Callable[..., Tensor]
    batched: tuple[int, ...] = ()
    """Which arguments hold one entry an image, if sums over the batch could differ: then `Modes` come last."""
    plan_again: Callable[..., tuple[Launch, ...]] | None = None
    """Another plan, for GPUs on which the machine code of the first one may give wrong answers."""

    def choose(self, *args: Any) -> Choice:
        """Validate a call and say where it runs, and why. A batch-invariant call runs where one of its images would."""
        shape, dtype, _ = self.result(*args)
        obstacle = self.obstacle(shape, *args)
        choice = choose(args[-1], args[0].device, dtype, obstacle)
        if obstacle is not None and self.batched and args[-2]:
            alone = choose(args[-1], args[0].device, dtype, self.obstacle((1, *shape[1:]), *args))
            if alone.backend != choice.backend:
                raise NotImplementedError(f"batch_invariant=True cannot run so large a batch: {obstacle}; split it")
        return choice

    def output(self, *args: Any) -> Tensor:
        """Validate a call and allocate its result, uninitialised: also the fake for tracing."""
        shape, dtype, memory = self.result(*args)
        return torch.empty(shape, dtype=dtype, device=args[0].device, memory_format=memory)

    def run(self, *args: Any) -> Tensor:
        """Validate, choose, and run on the kernel or on PyTorch."""
        if self.choose(*args).backend == "torch":
            return self.run_torch(*args)
        out = self.output(*args)
        if out.numel() == 0:
            return out
        with torch.cuda.device(out.device) if out.device.type == "cuda" else interpreter.ready():
            launches, reason = self.launches(out, *args)
            for launch in launches:
                launch.run()
        if reason is not None:
            return self.refuse_kernels(reason, *args)
        count(self.name, "triton")
        return out

    def launches(self, out: Tensor, *args: Any) -> tuple[tuple[Launch, ...], str | None]:
        """What writes `out`, of the first plan that may be launched here; if none may be, nothing, and why."""
        launches = self.plan(out, *args)
        if not _asynchronous(out.device):
            return launches, None
        reason = _unsafe(launches)
        if reason is not None and self.plan_again is not None and not (self.batched and args[-2]):
            launches = self.plan_again(out, *args)
            reason = _unsafe(launches)
        if reason is not None and self.batched and args[-2]:  # at another batch size the kernel may be another
            raise NotImplementedError(f"batch_invariant=True cannot run here: {reason}")
        return (launches, None) if reason is None else ((), reason)

    def refuse_kernels(self, obstacle: str, *args: Any) -> Tensor:
        """Validate and run on PyTorch, or raise if the kernels were asked for."""
        choose(args[-1], args[0].device, self.result(*args).dtype, obstacle)
        return self.run_torch(*args)

    def run_torch(self, *args: Any) -> Tensor:
        """Run on PyTorch, counted."""
        count(self.name, "torch")
        if self.batched and args[-2] and args[0].dim() > 1 and len(args[0]) > 0:
            return self._run_alone(*args)
        return self.torch_form(*args)

    def _run_alone(self, *args: Any) -> Tensor:
        """PyTorch's form of one image after another, for it may choose another algorithm for another batch size."""
        if get_proxy_mode() is not None:  # a compiler that sees the images one by one may put them together again
            raise NotImplementedError(
                "batch_invariant=True cannot be compiled with gradients or autocast; call it under no_grad"
            )

        def only(i: int) -> Iterator[Any]:
            for at, a in enumerate(args):
                yield _image(a, i) if at in self.batched and a is not None else a

        result = torch.cat([self.torch_form(*only(i)) for i in range(len(args[0]))])
        return result.contiguous(memory_format=self.result(*args).memory)


def _asynchronous(where: torch.device) -> bool:
    """Whether right answers of a kernel do not show that its next one is right: see `machine_code/verdict.py`."""
    return where.type == "cuda" and device.facts(where).arch == 90 and not interpreter.active()


def _unsafe(launches: tuple[Launch, ...]) -> str | None:
    from ..machine_code import verdict  # not above: it asks for Triton

    return next((reason for reason in map(verdict.obstacle, launches) if reason is not None), None)


def _image(t: Tensor, i: int) -> Tensor:
    """A copy, because the layout and the alignment of the original could make a difference as well."""
    return t[i : i + 1].clone(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)


OPERATORS: dict[str, Operator] = {}


def call(name: str, *args: Any) -> Tensor:
    """Run an operator as the models do: a plain CPU tensor goes to PyTorch without a detour through the dispatcher.

    The detour costs about 0.1 ms a call, which at batch 1 is more than channels_last gains. Everything else (tracing,
    compiling, tensor subclasses, GPUs, interpreted kernels) calls the operator itself.
    """
    x, kernels = args[0], args[-1]
    if type(x) is Tensor and x.device.type == "cpu" and kernels != "triton" and not observed():
        check_mode(kernels)
        try:
            return OPERATORS[name].run_torch(*args)
        except RuntimeError:
            OPERATORS[name].choose(*args)  # raises our error, if it was a wrong argument
            raise
    return getattr(torch.ops.resnet_triton, name)(*args)


def register(operator: Operator, schema: str, *, autocast: bool = False) -> None:
    """Define `resnet_triton::<name>`. The first argument of every operator is x, the last is `kernels`."""
    name = operator.name

    def autograd(*args: Any) -> Tensor:
        gradient = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if gradient or forward_ad._current_level >= 0:
            return operator.refuse_kernels("a gradient is asked for", *args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.resnet_triton, name)(*args)

    def under_autocast(*args: Any) -> Tensor:
        return operator.refuse_kernels("autocast is on", *args)

    OPERATORS[name] = operator
    _library.define(name + schema)
    _library.impl(name, operator.run, "CPU")
    _library.impl(name, operator.run, "CUDA")
    _library.impl(name, autograd, "Autograd")
    if autocast:
        _library.impl(name, under_autocast, "AutocastCPU")
        _library.impl(name, under_autocast, "AutocastCUDA")
    torch.library.register_fake(f"resnet_triton::{name}", operator.output, lib=_library)
