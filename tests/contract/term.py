"""One promise of the contract as data, and whether an answer keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Args = dict[str, Any]
Function = Callable[..., Any]
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
EVERY = (FP32, FP16, BF16)


def call(f: Function, args: Args) -> Any:
    """What is done with a function where a row says nothing else."""
    with torch.no_grad():
        return f(**args)


@dataclass(frozen=True)
class Term:
    """A call, and what it promises. Without another word: PyTorch's answer, on the kernels, bit for bit.

    `edit` changes the subject's usual arguments, `act` is what is done with the function, ours and PyTorch's alike.
    """

    case: str
    subject: str
    promise: str
    edit: Callable[[Args], Any] = lambda args: None
    act: Callable[[Function, Args], Any] = call
    dtypes: tuple[torch.dtype, ...] = (FP16,)
    sizes: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.0
    refused: str = ""
    """The kernels cannot; PyTorch answers, and `kernels="triton"` is a NotImplementedError with these words."""
    raises: tuple[type[Exception], str] | None = None
    """Our error and words of its message, where PyTorch raises `theirs`, too."""
    theirs: type[Exception] | None = RuntimeError
    """PyTorch's error; None: it answers, which makes the row a deviation."""
    expected: Callable[[Args], Any] | None = None
    """The answer where it is not PyTorch's, from the same arguments."""
    because: str = ""
    """Why the row deviates from PyTorch; then it has to be seen to deviate."""
    kernels_alone: bool = False
    """The deviation is the kernels': on PyTorch the answer is PyTorch's."""
    launched: dict[str, Any] = field(default_factory=dict)
    """Arguments that every launch which takes them has to have."""
    pointers: bool = False
    """Pointers even where there are descriptors."""
    needs_gpu: bool = False

    @property
    def expectation(self) -> str:
        """In words."""
        if self.raises is not None:
            theirs = "PyTorch answers" if self.theirs is None else f"PyTorch raises {self.theirs.__name__}"
            return f"{self.raises[0].__name__}; {theirs}"
        where = " on the kernels" if self.kernels_alone else ""
        answer = f"an answer of its own{where}" if self.expected is not None else "as PyTorch"
        return f"{answer}; kernels refuse: {self.refused}" if self.refused else answer


def outcome(f: Callable[[], Any]) -> Any:
    """What a call returns or raises: a tuple of tensors (and other values), or an exception."""
    try:
        result = f()
    except Exception as error:
        return error
    return result if isinstance(result, tuple) else (result,)


def differs(actual: Any, expected: Any, tolerance: float = 0.0) -> str:
    """How an outcome differs from the expected one; "" if it does not."""
    if isinstance(actual, Exception) or isinstance(expected, Exception):
        return "{}, expected {}".format(
            *(repr(o) if isinstance(o, Exception) else "an answer" for o in (actual, expected))
        )
    if len(actual) != len(expected):
        return f"{len(actual)} values, expected {len(expected)}"
    return next(filter(None, (_differ(*pair, tolerance) for pair in zip(actual, expected, strict=True))), "")


def _differ(y: Any, e: Any, tolerance: float) -> str:
    if not isinstance(y, Tensor) or not isinstance(e, Tensor):
        return "" if y == e else f"{y}, expected {e}"
    if (y.dtype, y.shape) != (e.dtype, e.shape):
        return f"{y.dtype} {tuple(y.shape)}, expected {e.dtype} {tuple(e.shape)}"
    if y.dim() == 4 and not y.is_contiguous(memory_format=torch.channels_last):
        return f"strides {y.stride()}, expected channels_last memory"
    if y.dim() != 4 and e.is_contiguous() and not y.is_contiguous():
        return f"strides {y.stride()}, expected contiguous memory"
    y, e = y.detach().double(), e.detach().double()
    for name, kind in (("NaN", Tensor.isnan), ("inf", Tensor.isposinf), ("-inf", Tensor.isneginf)):
        if not torch.equal(kind(y), kind(e)):
            return f"{name} in {int(kind(y).sum())} places, expected {int(kind(e).sum())}: {_few(y, e)}"
    finite = e.isfinite()
    largest = float(e[finite].abs().max()) if finite.any() else 0.0
    if not torch.allclose(y[finite], e[finite], rtol=tolerance, atol=tolerance * largest):
        return f"values {_few(y, e)}"
    zeros = (e == 0) & (y == 0) if tolerance else e == 0
    return "" if torch.equal(y[zeros].signbit(), e[zeros].signbit()) else f"signs of zeros {_few(y, e)}"


def _few(y: Tensor, e: Tensor) -> str:
    wrong = ~((y == e) & (y.signbit() == e.signbit()) | y.isnan() & e.isnan())
    return f"{y[wrong][:5].tolist()}, expected {e[wrong][:5].tolist()}"
