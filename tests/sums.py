"""How far a sum of products may be from fp64, element by element, and how much of that an answer needs.

The bound grants one rounding of the output and a random walk of fp32 rounding errors over the sum:

    |y - y64| <= half a unit in y's last place + lam * sqrt(length) * 2**-24 * magnitude

`magnitude` is the same sum over absolute values. It has no room for sums kept in 16 bits, nor for TF32 where IEEE was
asked for. TF32 cuts both factors of a product by less than 2**-10 each: it is granted `cuts * 2**-11 * magnitude` more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.ops import (
    AddRelu,
    AvgPoolLinear,
    BatchNorm,
    ConvBnRelu,
    Geometry,
    GlobalAvgPool,
    Linear,
    Stem,
    reference,
)
from resnet_triton.ops.stem import STEM_POOL

BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of a significand
LAM, CUTS = 1.0, 4.0
"""The most that may be needed: of TF32, two factors cut by 2**-10 are four times 2**-11."""
BATCH_NORM = 36
"""What batch norm adds to the length: six roundings, which may all go one way, are as far as a walk of 36."""


class Sums(NamedTuple):
    """A call's answer in fp64, the same with every term made positive, and how many products each sum has.

    `slack` is an error that is granted besides.
    """

    answer: Tensor
    magnitude: Tensor
    length: int
    slack: Tensor | float = 0.0

    def needed(self, y: Tensor, precision: str = "ieee") -> float:
        """The least `lam` for which every element of `y` is within the bound, or, with "tf32", the least `cuts`."""
        error = (y.double() - self.answer).abs() - half_unit(y, self.answer) - self.slack
        unit = math.sqrt(self.length) * 2.0**-24 * self.magnitude
        if precision == "tf32":
            error, unit = error - LAM * unit, 2.0**-11 * self.magnitude
        return torch.where(error <= 0, 0.0, error / unit).max().item()  # NaN, in an unwritten output, stays NaN


def half_unit(y: Tensor, exact: Tensor) -> Tensor:
    """The most that one rounding to y's dtype moves a value near both."""
    _, exponent = torch.maximum(y.double().abs(), exact.abs()).frexp()
    smallest = torch.finfo(y.dtype).smallest_normal * 2.0 ** -BITS[y.dtype]
    return torch.ldexp(torch.ones_like(exact), exponent - BITS[y.dtype] - 1).clamp(min=smallest)


def conv(call: ConvBnRelu) -> Sums:
    answer, magnitude, length = _normed(call.x, call.weight, call.batch_norm, call.geometry)
    if call.residual is not None:
        answer, magnitude = answer + call.residual.double(), magnitude + call.residual.double().abs()
    if call.shortcut is not None:
        x, weight, norm, stride = call.shortcut
        short = _normed(x, weight, norm, Geometry(stride))
        answer, magnitude, length = answer + short[0], magnitude + short[1], length + short[2]
    return Sums(reference.activate(answer, *call.activation), magnitude, length)


def _normed(x: Tensor, weight: Tensor, norm: BatchNorm, geometry: Geometry) -> tuple[Tensor, Tensor, int]:
    """Convolution and batch norm, their magnitude, and the products in a sum."""
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.bn_weight is None else scale * norm.bn_weight.double()
    bn_bias = torch.zeros_like(mean) if norm.bn_bias is None else norm.bn_bias.double()
    scale, shift, most = (
        t[:, None, None] for t in (scale, bn_bias - mean * scale, bn_bias.abs() + mean.abs() * scale.abs())
    )  # fmt: skip
    x, w = x.double(), weight.double()
    answer, magnitude = F.conv2d(x, w, None, *geometry), F.conv2d(x.abs(), w.abs(), None, *geometry)
    return answer * scale + shift, magnitude * scale.abs() + most, w[0].numel() + BATCH_NORM


def stem(call: Stem) -> Sums:
    """Of images of floats. The maximum of a window is no further off than the worst element of it."""
    answer, magnitude, length, _ = conv(call.convolution(call.x))
    return Sums(F.max_pool2d(answer, *STEM_POOL), F.max_pool2d(magnitude, *STEM_POOL), length)


def linear(call: Linear) -> Sums:
    x, w, b = (None if t is None else t.double() for t in (call.x, call.weight, call.bias))
    magnitude = F.linear(x.abs(), w.abs(), None if b is None else b.abs())
    return Sums(F.linear(x, w, b), magnitude, w.shape[1])


def global_avg_pool(call: GlobalAvgPool) -> Sums:
    x = call.x.double()
    return Sums(*(t.mean((2, 3), keepdim=True) for t in (x, x.abs())), x.shape[2] * x.shape[3])


def avg_pool_linear(call: AvgPoolLinear) -> Sums:
    """Of means rounded to x's dtype. In two of an image, fp32 may miss the side of a tie."""
    x, w = call.x, call.weight
    mean = x.double().mean((2, 3)).to(x.dtype)
    largest = (mean.double().abs()[:, None] * w.double().abs()).amax(2)
    return linear(Linear(mean, w, call.bias))._replace(slack=2 * 2.0 ** (1 - BITS[x.dtype]) * largest)


def add_relu(call: AddRelu) -> Sums:
    x, other = call.x.double(), call.other.double()
    return Sums((x + other).relu(), x.abs() + other.abs(), 2)


OF: dict[str, Callable[[Any], Sums]] = {
    "conv_bn_relu": conv, "stem": stem, "linear": linear, "global_avg_pool": global_avg_pool,
    "avg_pool_linear": avg_pool_linear, "add_relu": add_relu,
}  # fmt: skip
"""By operator."""
