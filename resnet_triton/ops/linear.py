"""The linear layer, and global average pooling with the linear layer behind it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .. import config
from ..config.device import DeviceFacts
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch, next_power_of_2
from . import reference
from .checks import at_aligned, channels_last, check_rank, check_same_dtype, check_tensors, contiguous
from .dispatch import AUTO, HAS_TRITON, Modes
from .in_graph import may_depend
from .operation import Operation, Result, Shape, register
from .pool import GlobalAvgPool
from .precision import matmul_precision

if HAS_TRITON:
    from ..kernels.avg_pool_linear import avg_pool_linear
    from ..kernels.linear import linear

HEAD_IMAGES = 16
"""Up to here a classifier's head is one launch: that saves a gap of about a microsecond, and reads every image once for
each of its tiles of classes. With more, two launches are faster (predicted, H200)."""


@dataclass(eq=False)
class Linear(Operation):
    """`x @ weight.T + bias`: x (..., C), weight (K, C), bias (K,), result (..., K)."""

    autocast = True

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    modes: Modes = AUTO

    def result(self) -> Result:
        x, weight = self.x, self.weight
        k, c = _check_weight(x, weight, self.bias)
        if x.dim() < 1 or x.shape[-1] != c:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {c}) for weight {tuple(weight.shape)}")
        return Result((*x.shape[:-1], k), x.dtype, torch.contiguous_format)

    def fallback_reason(self, shape: Shape) -> str | None:
        check_same_dtype(self.x, weight=self.weight, bias=self.bias)
        rows, k = prod(shape[:-1]), shape[-1]
        if max(rows, k) >= 2**31 - 2**10:
            return f"{rows} rows or {k} columns exceed int32"
        return "no input features" if self.weight.shape[1] == 0 else None

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        k, c = self.weight.shape
        rows = self.x.reshape(-1, c).contiguous()
        rows = at_aligned(rows) if self.modes.batch_invariant else rows
        precision = matmul_precision(rows.dtype)
        m = 1 if self.modes.batch_invariant else rows.shape[0]
        tile = config.linear_heuristic(m, c, k, rows.element_size(), precision, facts)
        launch = linear(
            out=out.view(-1, k), x=rows, weight=self.weight.contiguous(), bias=contiguous(self.bias),
            precision=precision, block_m=tile.block_m, block_k=tile.block_k, block_c=tile.block_c,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return (launch,)

    def reference(self) -> Tensor:
        return reference.linear(self.x, self.weight, self.bias)

    def cost(self) -> Cost:
        k, c = self.weight.shape
        return cost.linear(m=self.x.numel() // c, c=c, k=k, itemsize=self.x.element_size())


@dataclass(eq=False)
class AvgPoolLinear(Operation):
    """A classifier's head, `linear(global_avg_pool(x).flatten(1), weight, bias)`.

    x (N, C, H, W), weight (K, C), bias (K,), result (N, K).
    """

    rounds_between = True
    autocast = True

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    modes: Modes = AUTO

    def result(self) -> Result:
        x = self.x
        (n, c, _, _), dtype, _ = GlobalAvgPool(x).result()
        k, expected = _check_weight(x, self.weight, self.bias)
        if expected != c:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {expected} channels for weight {(k, expected)}")
        return Result((n, k), dtype, torch.contiguous_format)

    def fallback_reason(self, shape: Shape) -> str | None:
        check_same_dtype(self.x, weight=self.weight, bias=self.bias)
        return GlobalAvgPool(self.x).fallback_reason((shape[0], self.x.shape[1], 1, 1))

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        x = self.x
        if x.shape[0] > HEAD_IMAGES or self.modes.batch_invariant:
            pool = GlobalAvgPool(x, self.modes)
            pooled = pool.result().empty(x.device)
            linear = Linear(pooled.flatten(1), self.weight, self.bias, self.modes)
            return *pool.launches(pooled, facts), *linear.launches(out, facts)
        weight, bias = self.weight.contiguous(), contiguous(self.bias)
        launch = avg_pool_linear(
            out=out, x=channels_last(x), weight=weight, bias=bias,
            block_p=min(next_power_of_2(x.shape[2] * x.shape[3]), 64),
            block_k=config.head_classes(x.shape[0], weight.shape[0], facts),
            block_c=min(next_power_of_2(x.shape[1]), 512 if x.element_size() == 2 else 128), num_warps=16,
            dependent=may_depend(facts, [(self.weight, weight), (self.bias, bias)]),
        )  # fmt: skip
        return (launch,)

    def reference(self) -> Tensor:
        return reference.linear(reference.global_avg_pool(self.x).flatten(1), self.weight, self.bias)

    def cost(self) -> Cost:
        n, c, h, w = self.x.shape
        return cost.avg_pool_linear(n=n, c=c, h=h, w=w, k=self.weight.shape[0], itemsize=self.x.element_size())


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Output and input features of `weight`, which goes with x and bias."""
    check_rank("weight", weight.shape, 2, "(out_features, in_features)")
    check_tensors(x, weight=weight, bias=bias)
    k, c = weight.shape
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({k},) for weight {(k, c)}")
    return k, c


register("linear", Linear)
register("avg_pool_linear", AvgPoolLinear)
