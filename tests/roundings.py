"""Instructions of Triton's interpreter that round where they should not: what hardware may do, and what faults do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from resnet_triton.ops import interpreter

Rounding = Callable[[Any], Any]


def unchanged(data: Any) -> Any:
    return data


def as_tf32(data: Any) -> Any:
    """fp32 with the 13 low bits cut off, as tensor cores read it: our PTX rounds nothing before they do."""
    if data.dtype != np.float32:
        return data
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def through(dtype: torch.dtype) -> Rounding:
    """fp32 values rounded to `dtype` and back."""
    return lambda data: torch.tensor(data).to(dtype).float().numpy() if data.dtype == np.float32 else data


@contextlib.contextmanager
def rounding(method: str, operands: Rounding = unchanged, result: Rounding = unchanged) -> Iterator[None]:
    """Make an instruction round its first two operands or its result."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreter.repair()
    right = getattr(InterpreterBuilder, method)

    def wrong(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (TensorHandle(operands(h.data), h.dtype) for h in (a, b))
        handle = right(builder, a, b, *others)
        return TensorHandle(result(handle.data), handle.dtype)

    with mock.patch.object(InterpreterBuilder, method, wrong):
        yield


def in_fours(data: Any) -> Any:
    """fp32 with the 2 low bits cut off: sums that keep fewer bits than they should."""
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFFFFC)).view(np.float32)


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """fp32 products, added to the sum in their order."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreter.repair()

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        total = d.data.copy()
        for i in range(a.data.shape[1]):
            total += a.data[:, i : i + 1] * b.data[i : i + 1]
        return TensorHandle(total, d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield
