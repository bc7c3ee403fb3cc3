"""Residual add + ReLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.device import DeviceFacts
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch
from . import reference
from .checks import channels_last, check_rank, check_tensors, in_channels_last
from .dispatch import AUTO, HAS_TRITON, Modes, mixed_dtypes
from .operation import Operation, Result, Shape, register

if HAS_TRITON:
    from ..kernels.add_relu import add_relu


@dataclass(eq=False)
class AddRelu(Operation):
    """`relu(x + other)`, both (N, C, H, W)."""

    per_image = False

    x: Tensor
    other: Tensor
    modes: Modes = AUTO

    def result(self) -> Result:
        x, other = self.x, self.other
        check_rank("x", x.shape, 4, "(N, C, H, W)")
        check_tensors(x, other=other)
        if other.shape != x.shape:
            raise ValueError(f"other has shape {tuple(other.shape)}, expected x's {tuple(x.shape)}")
        return Result(tuple(x.shape), torch.promote_types(x.dtype, other.dtype))

    def fallback_reason(self, shape: Shape) -> str | None:
        return mixed_dtypes(self.x, self.other)

    def launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        launch = add_relu(out=out, x=channels_last(self.x), other=channels_last(self.other), block=1024, num_warps=4)
        return (launch,)

    def reference(self) -> Tensor:
        return in_channels_last(reference.add_relu(self.x, self.other))

    def cost(self) -> Cost:
        return cost.add_relu(numel=self.x.numel(), itemsize=self.x.element_size())


register("add_relu", AddRelu)
