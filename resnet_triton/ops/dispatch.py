"""Where a call runs, our kernels or PyTorch, and the count of both: a fallback is never silent."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..config import device
from ..support import locks
from . import interpreter

Kernels = Literal["auto", "torch", "triton"]
_KERNELS = get_args(Kernels)
_is_neg, _is_zerotensor = torch._C.TensorBase.is_neg, torch._C.TensorBase._is_zerotensor
_PLAIN = {Tensor, torch.nn.Parameter}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None

calls: Counter[tuple[str, str]] = Counter()
"""How often each (operator, backend) ran in this process; the backend is "triton" or "torch"."""
_lock = locks.lock()
tracer: ContextVar[Callable[[str], None] | None] = ContextVar("tracer", default=None)
"""Set while a model is traced: it is told the reason of each call that PyTorch takes over, and nothing is counted."""


class Modes(NamedTuple):
    """How a call is to run: the last arguments of every operator."""

    batch_invariant: bool = False
    kernels: Kernels = "auto"


AUTO = Modes()


class Choice(NamedTuple):
    """A backend, "triton" or "torch", and why it was chosen."""

    backend: str
    reason: str


GRADIENT, AUTOCAST, TRAINING = "a gradient is wanted", "autocast is on", "training mode"
REMEDIES = {
    GRADIENT: "call the model under torch.inference_mode()",
    AUTOCAST: "call the model without it, converted, as by model.half()",
    TRAINING: "call model.eval()",
}
"""What to do about some of the reasons against our kernels."""
_ON_GPU, _INTERPRETED = Choice("triton", ""), Choice("triton", "interpreted on the CPU")


def choose(kernels: str, where: torch.device, dtype: torch.dtype, reason: str | None = None) -> Choice:
    """Decide where a call with a result in `dtype` runs; `reason` is one against the kernels, found already.

    Under `kernels="triton"` such a reason is a NotImplementedError.
    """
    check_kernels(kernels)
    if kernels == "torch":
        return Choice("torch", 'kernels="torch" was asked for')
    reason = reason or _fallback_reason(where, forced=kernels == "triton")
    if reason is None and dtype not in DTYPES:
        reason = f"dtype {dtype}"
    if reason is None:
        return _INTERPRETED if where.type == "cpu" else _ON_GPU
    raise_if_required(kernels, reason)
    return Choice("torch", reason)


def raise_if_required(kernels: str, reason: str) -> None:
    """NotImplementedError if the kernels were asked for, which cannot run a call for this reason."""
    if kernels == "triton":
        remedy = f"; {REMEDIES[reason]}" if reason in REMEDIES else ""
        raise NotImplementedError(f'kernels="triton" cannot run this call: {reason}{remedy}')


def warn_of_coverage(reasons: Sequence[str], convolutions: int) -> None:
    """Warn if PyTorch runs more than half of the convolutions; `reasons` has one for each that it runs."""
    if 2 * len(reasons) > convolutions:
        most, _ = Counter(reasons).most_common(1)[0]
        warnings.warn(
            f"{len(reasons)} of {convolutions} convolutions run on PyTorch, most of them for this reason: {most}; "
            "resnet_triton.report(model, shape) lists them",
            RuntimeWarning,
            stacklevel=4,  # who called the caller's caller
        )


def meant(kernels: str, t: Tensor) -> bool:
    """Whether calls on the device of `t` are meant for kernels."""
    return kernels == "triton" or (t.is_cuda and kernels == "auto")


def check_kernels(kernels: str) -> None:
    """ValueError unless `kernels` is one of `Kernels`."""
    if kernels not in _KERNELS:
        raise ValueError(f"kernels={kernels!r}, expected one of {', '.join(map(repr, _KERNELS))}")


def count(operator: str, backend: str, reason: str = "") -> None:
    """Record one call; in a trace, tell the tracer instead. Nothing is counted inside torch.compile's graphs."""
    if torch.compiler.is_compiling():
        return
    if (tell := tracer.get()) is not None:
        tell(reason)
        return
    with _lock:
        calls[operator, backend] += 1


def _fallback_reason(where: torch.device, *, forced: bool) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if where.type == "cpu":
        if forced and interpreter.active():
            return None
        return "CPU tensors, and TRITON_INTERPRET is not set" if forced else "CPU tensors"
    if where.type != "cuda":
        return f"tensors on device {where.type!r}"
    if torch.version.hip is not None:
        return "AMD GPU, not verified"
    arch = device.facts(where).arch
    return f"compute capability {arch / 10}, below 8.0" if arch < 80 else None


def transformed() -> bool:
    """Whether a transform (`torch.func`), a tracer or a mode sees every operator of this thread."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    )


def in_function_mode() -> bool:
    """Whether a mode sees every function of PyTorch's that Python calls, other than that of a default device."""
    count = torch._C._len_torch_function_stack()  # asked first: it takes no time
    return count > 0 and any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def is_watched(tensors: list[Tensor]) -> bool:
    """Whether the dispatcher would do more with a call on these tensors than call its kernel."""
    looks = transformed() or torch._C._len_torch_function_stack() > 0 or torch._C._autograd._profiler_enabled()
    if looks or not _PLAIN.issuperset(map(type, tensors)) or tensors[0].is_meta:
        return True
    return any(map(_is_neg, tensors)) or any(map(_is_zerotensor, tensors))


def is_differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether a gradient of a call on these tensors is wanted, forward or backward."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def mixed_dtypes(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, if they do not share one dtype."""
    for t in others:
        if t is not None and t.dtype != x.dtype:
            dtypes = {str(t.dtype) for t in (x, *others) if t is not None}
            return f"mixed dtypes {', '.join(sorted(dtypes))}"
    return None
