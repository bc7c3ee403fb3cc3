"""Max pooling and global average pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .checks import as_tuple, at_aligned, channels_last, check_rank, check_tensors, too_large, window
from .dispatch import HAS_TRITON
from .registry import Operator, Result, Shape, register

if HAS_TRITON:
    from ..kernels.global_avg_pool import global_avg_pool as global_avg_pool_launch
    from ..kernels.launch import Launch, next_power_of_2
    from ..kernels.max_pool import max_pool as max_pool_launch

# --- max pool --------------------------------------------------------------------------------------------------------


def _max_pool_result(x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str) -> Result:
    check_rank("x", x, 4, "(N, C, H, W)")
    check_tensors(x)
    p, q = window("x", x, size, stride, padding, [1, 1])
    if any(2 * pad > edge for pad, edge in zip(padding, size, strict=True)):
        raise ValueError(f"padding is {tuple(padding)}, expected at most half of kernel_size {tuple(size)}")
    return Result((x.shape[0], x.shape[1], p, q), x.dtype)


def _max_pool_obstacle(
    shape: Shape, x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str
) -> str | None:
    return too_large(shape, x, padding[1])


def plan_max_pool(
    out: Tensor, x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str
) -> tuple[Launch, ...]:
    block_c = min(next_power_of_2(x.shape[1]), 64)
    launch = max_pool_launch(
        out=out, x=channels_last(x), kernel_size=as_tuple(size), stride=as_tuple(stride), padding=as_tuple(padding),
        block_m=2048 // block_c, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return (launch,)


def _torch_max_pool(x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str) -> Tensor:
    return channels_last(reference.max_pool2d(x, as_tuple(size), as_tuple(stride), as_tuple(padding)))


register(
    Operator("max_pool2d", _max_pool_result, _max_pool_obstacle, plan_max_pool, _torch_max_pool),
    "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, str kernels) -> Tensor",
)


# --- global average pool ---------------------------------------------------------------------------------------------


def avg_pool_result(x: Tensor, *modes: Any) -> Result:
    check_rank("x", x, 4, "(N, C, H, W)")
    check_tensors(x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one channel and one pixel")
    return Result((x.shape[0], x.shape[1], 1, 1), x.dtype)


def avg_pool_obstacle(shape: Shape, x: Tensor, *modes: Any) -> str | None:
    return too_large(shape, x, 0)


def plan_avg_pool(out: Tensor, x: Tensor, batch_invariant: bool, kernels: str) -> tuple[Launch, ...]:
    block_c = min(next_power_of_2(x.shape[1]), 64)
    block_p = min(next_power_of_2(x.shape[2] * x.shape[3]), 64)
    x = at_aligned(channels_last(x)) if batch_invariant else channels_last(x)
    launch = global_avg_pool_launch(out=out, x=x, block_p=block_p, block_c=block_c, num_warps=4)
    return (launch,)


def _torch_avg_pool(x: Tensor, *modes: Any) -> Tensor:
    return channels_last(reference.global_avg_pool(x))


register(
    Operator("global_avg_pool", avg_pool_result, avg_pool_obstacle, plan_avg_pool, _torch_avg_pool, batched=(0,)),
    "(Tensor x, bool batch_invariant, str kernels) -> Tensor",
)
