"""The linear layer, and global average pooling with the linear layer behind it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .. import config
from . import reference
from .checks import at_aligned, channels_last, check_rank, check_same_dtype, check_tensors, contiguous
from .dispatch import HAS_TRITON
from .pool import avg_pool_obstacle, avg_pool_result, plan_avg_pool
from .precision import matmul_precision
from .registry import Operator, Result, Shape, register

if HAS_TRITON:
    from ..kernels.avg_pool_linear import avg_pool_linear as avg_pool_linear_launch
    from ..kernels.launch import Launch, next_power_of_2
    from ..kernels.linear import linear as linear_launch

# --- linear ----------------------------------------------------------------------------------------------------------


def _linear_result(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str) -> Result:
    check_rank("weight", weight, 2, "(out_features, in_features)")
    check_tensors(x, weight=weight, bias=bias)
    k, c = weight.shape
    if x.dim() < 1 or x.shape[-1] != c:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {c}) for weight {tuple(weight.shape)}")
    _check_bias(weight, bias)
    return Result((*x.shape[:-1], k), x.dtype, torch.contiguous_format)


def _check_bias(weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        shapes = tuple(bias.shape), tuple(weight.shape[:1]), tuple(weight.shape)
        raise ValueError("bias has shape {}, expected {} for weight {}".format(*shapes))


def _linear_obstacle(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str
) -> str | None:
    check_same_dtype(x, weight=weight, bias=bias)
    rows = prod(shape[:-1])
    if rows >= 2**31 - 2**10:
        return f"{rows} rows exceed int32"
    return "no input features" if weight.shape[1] == 0 else None


def _plan_linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str
) -> tuple[Launch, ...]:
    k, c = weight.shape
    rows = x.reshape(-1, c).contiguous()
    rows = at_aligned(rows) if batch_invariant else rows
    precision = matmul_precision(x.dtype)
    tile = config.linear_heuristic(1 if batch_invariant else rows.shape[0], k, x.element_size(), precision)
    launch = linear_launch(
        out=out.view(-1, k), x=rows, weight=weight.contiguous(), bias=contiguous(bias),
        precision=precision, block_m=tile.block_m, block_k=tile.block_k, block_c=tile.block_c,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str) -> Tensor:
    return reference.linear(x, weight, bias)


register(
    Operator("linear", _linear_result, _linear_obstacle, _plan_linear, _torch_linear, batched=(0,)),
    "(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant, str kernels) -> Tensor",
    autocast=True,
)


# --- global average pool + linear ------------------------------------------------------------------------------------

# One launch saves a gap of about a microsecond and reads every image once for each of its tiles of classes; from here
# on two launches are faster (predicted, H200).
FEW_IMAGES = 16


def _head_result(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str) -> Result:
    pooled, dtype, _ = avg_pool_result(x)
    check_rank("weight", weight, 2, "(out_features, in_features)")
    check_tensors(x, weight=weight, bias=bias)
    n, c = pooled[:2]
    k = weight.shape[0]
    if weight.shape[1] != c:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {weight.shape[1]} channels for weight {(k, c)}")
    _check_bias(weight, bias)
    return Result((n, k), dtype, torch.contiguous_format)


def _head_obstacle(
    shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str
) -> str | None:
    check_same_dtype(x, weight=weight, bias=bias)
    return avg_pool_obstacle((shape[0], x.shape[1], 1, 1), x)


def _plan_head(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str
) -> tuple[Launch, ...]:
    if x.shape[0] > FEW_IMAGES or batch_invariant:
        shape, dtype, memory = avg_pool_result(x)
        pooled = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory)
        modes = batch_invariant, kernels
        return *plan_avg_pool(pooled, x, *modes), *_plan_linear(out, pooled.flatten(1), weight, bias, *modes)
    launch = avg_pool_linear_launch(
        out=out, x=channels_last(x), weight=weight.contiguous(), bias=contiguous(bias),
        block_p=min(next_power_of_2(x.shape[2] * x.shape[3]), 64), block_k=16,
        block_c=min(next_power_of_2(x.shape[1]), 256), num_warps=8,
    )  # fmt: skip
    return (launch,)


def _torch_head(x: Tensor, weight: Tensor, bias: Tensor | None, batch_invariant: bool, kernels: str) -> Tensor:
    return reference.linear(reference.global_avg_pool(x).flatten(1), weight, bias)


register(
    Operator("avg_pool_linear", _head_result, _head_obstacle, _plan_head, _torch_head, batched=(0,)),
    "(Tensor x, Tensor weight, Tensor? bias, bool batch_invariant, str kernels) -> Tensor",
    autocast=True,
)
