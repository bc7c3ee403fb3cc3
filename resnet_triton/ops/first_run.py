"""The first result of each compiled kernel in a process, compared with PyTorch's on the same GPU.

Tests execute kernels without a GPU, so what they rest on is a description of the hardware. Here the hardware itself is
asked, once for each kernel: a few images are computed again by PyTorch, in fp32 or TF32 as its switches say. A kernel
whose results differ by more than rounding is not launched again by any call in this process; others run in its place,
or PyTorch.

What this cannot show is a fault that comes and goes. Data that say nothing prove nothing, as images of one colour: then
the kernel's next results are compared, some of them. What a CUDA graph repeats is not.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.launch import Launch
from ..kernels.values import NONE
from ..support.waiting import may_wait
from . import gluon
from .in_graph import forget_semaphores

if TYPE_CHECKING:
    from .operation import Operation

IMAGES = 4
"""How many images of a batch are compared: the first, the last, and some between."""
_TRIES = 8
"""How many results of a kernel are compared until one proves something."""
_TINY = 1e-30
"""What kernels may lose where they take the smallest numbers of fp32 for zero."""

# Kernels are Triton's objects, one for each device; interpreted launches have none.
_right: set[Any] = {None}  # those that are compared no more
_wrong: dict[Any, str] = {}  # and what is said of them
_tried: Counter[Any] = Counter()


def wrong_reason(launches: Iterable[Launch]) -> str | None:
    """Why one of these launches must not go ahead: its kernel has given a wrong result in this process."""
    if not _wrong:
        return None
    return next((reason for launch in launches if (reason := _wrong.get(launch.compile())) is not None), None)


def is_right(call: Operation, out: Tensor, launches: Sequence[Launch], kernels: Sequence[Any]) -> bool:
    """Whether `out`, which these launches have just written, is right, if one of their kernels has yet to be compared.

    Waits for the GPU then, and warns if it is wrong. Nothing is compared while somebody captures the stream, nor where
    PyTorch cannot compute the call, as for lack of memory. RuntimeError, naming the kernels, if CUDA fails.
    """
    new = set(kernels) - _right
    if not new or not _can_be_compared(out):
        return True
    names = " + ".join(
        dict.fromkeys(launch.name for launch, kernel in zip(launches, kernels, strict=True) if kernel in new)
    )
    with may_wait():
        _finish(out.device, names, any(launch.is_gluon for launch in launches))
        wrong, proven = _compared(call, out)
        if wrong:  # or another thread has just edited a weight
            for launch in launches:
                launch.run()
            wrong, proven = _compared(call, out)
    _tried.update(new)
    if not wrong:
        _right.update(kernel for kernel in new if proven or _tried[kernel] >= _TRIES)
        return True
    reason = f"{names} gave a wrong result on this GPU ({torch.cuda.get_device_name(out.device)})"
    _wrong.update(dict.fromkeys(new, reason))
    forget_semaphores()
    warnings.warn(
        f"{reason}, by PyTorch's of the same call; it is not launched again in this process, and what runs in its "
        "place may be slower; please report it, with what resnet-triton doctor prints",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _compared(call: Operation, out: Tensor) -> tuple[bool, bool]:
    """What `compare` says; where PyTorch cannot compute the call, that nothing is wrong and nothing proven."""
    try:
        wrong, proven = torch.stack(compare(call, out)).tolist()
    except Exception:
        return False, False
    return wrong, proven


def describe() -> str | None:
    """How many kernels have been compared in this process, and which were wrong; None before the first."""
    compared, wrong = len(_right) - 1 + len(_wrong), "; ".join(dict.fromkeys(_wrong.values()))
    if not compared:
        return None
    return f"kernels whose first result was compared with PyTorch's: {compared}, {wrong or 'all right'}"


def _can_be_compared(out: Tensor) -> bool:
    return out.is_cuda and not torch.cuda.is_current_stream_capturing()


def _finish(where: torch.device, names: str, is_gluon: bool) -> None:
    """Wait for the current stream, where kernels of these names were launched last."""
    try:
        torch.cuda.current_stream(where).synchronize()
    except RuntimeError as error:
        if gluon.is_passing(error):
            raise
        said = f"CUDA failed when {names} ran for the first time, or what was launched before"
        remedy = f"; {gluon.VARIABLE}=0 has other kernels run" if is_gluon else ""
        raise RuntimeError(f"{said}: {str(error).partition(chr(10))[0]}{remedy}") from error


def compare(call: Operation, out: Tensor) -> tuple[Tensor, Tensor]:
    """Whether `out` differs from the call's result by more than rounding, and whether that it does not tells something.

    Results that are infinite, or nearly so, are left out, and so are images beside anything that is not finite.
    """
    differ, told, count = [], [], out.shape[0] if call.x.dim() > 1 else 1
    for i in sorted({j * (count - 1) // max(IMAGES - 1, 1) for j in range(IMAGES)}):
        one, got = (call.image(i), out[i : i + 1].float()) if call.x.dim() > 1 else (call, out.float())
        expected = _in_fp32(one).reference()
        terms = _in_fp32(one, positive=True).reference()
        finite = (expected.abs() < torch.finfo(out.dtype).max / 2) & terms.isfinite()
        finite &= torch.stack([t.isfinite().all() for t in one.schema.tensors(one)]).all()
        right = (got - expected).abs() <= _allowed(one, out.dtype, expected, terms)  # not where one is NaN
        differ.append((finite & ~right).any())
        told.append(
            (finite.count_nonzero() * 2 > finite.numel()) & _varies(one.x) & (expected.amin() < expected.amax())
        )
    return torch.stack(differ).any(), torch.stack(told).any()


def _allowed(call: Operation, dtype: torch.dtype, expected: Tensor, terms: Tensor) -> Tensor:
    """How far results may be off that are sums of these terms, each taken as positive.

    Sums are kept in fp32, of products that are exact, or of TF32; some calls round what they sum to `dtype`. What
    PyTorch's algorithms for convolutions spread is measured by the largest.
    """
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    share = max(2**-9 if dtype == torch.float32 else 2**-11, eps if call.rounds_between else 0.0)
    spread = 2**-18 * terms.nan_to_num(0, 0, 0).amax()
    return share * _steepness(call) * terms + eps * expected.abs() + spread + max(smallest * eps, _TINY)


def _varies(x: Tensor) -> Tensor:
    """Whether images are not of one colour."""
    values = x.flatten(2) if x.dim() == 4 and x.shape[2] * x.shape[3] > 1 else x.reshape(1, -1)
    return (values.amin(-1) < values.amax(-1)).any()


def _in_fp32(call: Operation, *, positive: bool = False) -> Any:
    """The same call on tensors in fp32; or on their magnitudes, with no activation, so that no terms cancel out."""

    def changed(name: str, t: Tensor) -> Tensor:
        magnitude = -t.abs() if name.endswith("running_mean") else t.abs()  # means are subtracted
        return (magnitude if positive else t).float()

    wide: Any = call.schema.with_tensors(call, changed)
    return replace(wide, activation=NONE) if positive and hasattr(wide, "activation") else wide


def _steepness(call: Any) -> float:
    """By how much an activation may enlarge an error: hardswish by 1.5."""
    activation = getattr(call, "activation", None)
    return 1.0 if activation is None else max(1.5, abs(activation.negative_slope))
