"""Max pooling and global average pooling."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..config.device import DeviceFacts
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch, cdiv, next_power_of_2
from ..kernels.values import Geometry
from . import reference
from .checks import at_aligned, channels_last, check_rank, check_tensors, in_channels_last, too_large, window
from .dispatch import AUTO, HAS_TRITON, Modes
from .operation import Operation, Result, Shape, register

if HAS_TRITON:
    from ..kernels.global_avg_pool import global_avg_pool
    from ..kernels.max_pool import max_pool


@dataclass(eq=False)
class MaxPool2d(Operation):
    """Max pooling of x (N, C, H, W)."""

    per_image = False

    x: Tensor
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool = False
    modes: Modes = AUTO

    def result(self) -> Result:
        x = self.x
        check_rank("x", x.shape, 4, "(N, C, H, W)")
        check_tensors(x)
        p, q = window("x", x.shape, self.kernel_size, Geometry(self.stride, self.padding), self.ceil_mode)
        if any(2 * pad > edge for pad, edge in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding is {self.padding}, expected at most half of kernel_size {self.kernel_size}")
        return Result((x.shape[0], x.shape[1], p, q), x.dtype)

    def fallback_reason(self, shape: Shape) -> str | None:
        return too_large(shape, self.x, self.padding[1])

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        block_c = min(next_power_of_2(self.x.shape[1]), 64)
        taps = prod(self.kernel_size)
        unroll = taps if taps <= 25 else 8  # that many loads are on their way at once
        launch = max_pool(
            out=out, x=channels_last(self.x), kernel_size=self.kernel_size, stride=self.stride, padding=self.padding,
            block_m=2048 // block_c, block_c=block_c, unroll=unroll, num_warps=4,
        )  # fmt: skip
        return (launch,)

    def reference(self) -> Tensor:
        y = reference.max_pool2d(self.x, self.kernel_size, self.stride, self.padding, self.ceil_mode)
        return in_channels_last(y)

    def cost(self) -> Cost:
        (n, c, h, w), (_, _, p, q) = self.x.shape, self.result().shape
        return cost.max_pool(n=n, c=c, h=h, w=w, p=p, q=q, itemsize=self.x.element_size())


@dataclass(eq=False)
class GlobalAvgPool(Operation):
    """Mean over all pixels: x (N, C, H, W), result (N, C, 1, 1)."""

    x: Tensor
    modes: Modes = AUTO

    def result(self) -> Result:
        x = self.x
        check_rank("x", x.shape, 4, "(N, C, H, W)")
        check_tensors(x)
        if 0 in x.shape[1:]:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one channel and one pixel")
        return Result((x.shape[0], x.shape[1], 1, 1), x.dtype)

    def fallback_reason(self, shape: Shape) -> str | None:
        return too_large(shape, self.x, 0)

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        x = channels_last(self.x)
        x = at_aligned(x) if self.modes.batch_invariant else x
        n, c, h, w = x.shape
        few = not self.modes.batch_invariant and n * cdiv(c, 64) < facts.sm_count
        # Few programs that take turns: narrower, so that there are more, of more pixels, so that these take fewer.
        most_p, most_c, num_warps = (512, 16, 8) if few and h * w > 64 else (64, 64, 4)
        block_p, block_c = min(next_power_of_2(h * w), most_p), min(next_power_of_2(c), most_c)
        return (global_avg_pool(out=out, x=x, block_p=block_p, block_c=block_c, num_warps=num_warps),)

    def reference(self) -> Tensor:
        return in_channels_last(reference.global_avg_pool(self.x))

    def cost(self) -> Cost:
        n, c, h, w = self.x.shape
        return cost.global_avg_pool(n=n, c=c, h=h, w=w, itemsize=self.x.element_size())


register("max_pool2d", MaxPool2d)
register("global_avg_pool", GlobalAvgPool)
