"""Residual add + ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import channels_last, check_rank, check_tensors
from .dispatch import HAS_TRITON, mixed_dtypes
from .registry import Operator, Result, Shape, register

if HAS_TRITON:
    from ..kernels.add_relu import add_relu as add_relu_launch
    from ..kernels.launch import Launch


def _add_relu_result(x: Tensor, other: Tensor, kernels: str) -> Result:
    check_rank("x", x, 4, "(N, C, H, W)")
    check_tensors(x, other=other)
    if other.shape != x.shape:
        raise ValueError(f"other has shape {tuple(other.shape)}, expected x's {tuple(x.shape)}")
    return Result(tuple(x.shape), torch.promote_types(x.dtype, other.dtype))


def _add_relu_obstacle(shape: Shape, x: Tensor, other: Tensor, kernels: str) -> str | None:
    return mixed_dtypes(x, other)


def _plan_add_relu(out: Tensor, x: Tensor, other: Tensor, kernels: str) -> tuple[Launch, ...]:
    launch = add_relu_launch(out=out, x=channels_last(x), other=channels_last(other), block=1024, num_warps=4)
    return (launch,)


def _torch_add_relu(x: Tensor, other: Tensor, kernels: str) -> Tensor:
    return channels_last(reference.add_relu(x, other))


register(
    Operator("add_relu", _add_relu_result, _add_relu_obstacle, _plan_add_relu, _torch_add_relu),
    "(Tensor x, Tensor other, str kernels) -> Tensor",
)
