"""A small call of every operator on random data, some on integers, and what can be done with any call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from exact import KERNELS, channels_last, depthwise_call, generator, grouped_call, integers, stem_call
from torch import Tensor

from resnet_triton import ops
from resnet_triton.ops import Operation
from resnet_triton.ops.dispatch import Modes
from resnet_triton.ops.stem import STEM_POOL

WITH_SHORTCUT, OF_BYTES = "conv_bn_relu with a shortcut", "stem of bytes"
CALLS = (*ops.OPERATORS, WITH_SHORTCUT, OF_BYTES)
PIXELS = ((0.5, 0.4, 0.6), (0.25, 0.2, 0.3))
"""Mean and standard deviation of each channel."""


def small(name: str, device: Any, dtype: torch.dtype = torch.float32, kernels: str = "triton") -> Any:
    """The call `name` of `CALLS`."""
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def norm() -> ops.BatchNorm:
        return ops.BatchNorm(randn(8), randn(8).abs() + 0.5, randn(8), randn(8), 1e-3)

    x, modes = randn(2, 4, 5, 6), Modes(kernels=kernels)
    match name:
        case "conv_bn_relu":
            geometry, residual = ops.Geometry(padding=(1, 1)), randn(2, 8, 5, 6)
            return ops.ConvBnRelu(x, randn(8, 4, 3, 3), norm(), geometry, residual, modes=modes)
        case "conv_bn_relu with a shortcut":
            shortcut = ops.Shortcut(randn(2, 4, 9, 12), randn(8, 4, 1, 1), norm(), (2, 2))
            return replace(small("conv_bn_relu", device, dtype, kernels), residual=None, shortcut=shortcut)
        case "stem":
            return ops.Stem(randn(2, 3, 9, 10), randn(8, 3, 7, 7) / 12, norm(), modes=modes)
        case "stem of bytes":
            pixels = torch.randint(256, (2, 3, 9, 10), device=device).byte()
            return ops.Stem(pixels, randn(8, 3, 7, 7) / 12, norm(), *PIXELS, modes)
        case "add_relu":
            return ops.AddRelu(x, randn(2, 4, 5, 6), modes)
        case "max_pool2d":
            return ops.MaxPool2d(x, *STEM_POOL, modes=modes)
        case "global_avg_pool":
            return ops.GlobalAvgPool(x, modes)
        case "linear":
            return ops.Linear(randn(3, 10), randn(6, 10), randn(6), modes)
        case "avg_pool_linear":
            return ops.AvgPoolLinear(x, randn(7, 4), randn(7), modes)
        case _:
            raise ValueError(name)


def data(*shape: int) -> Tensor:
    """Small integers in fp16."""
    return integers(generator(torch.device("cpu"), 1), 3, *shape, dtype=torch.float16)


def _images(*shape: int) -> Tensor:
    return channels_last(data(*shape))


def _grouped(make: Callable[..., ops.ConvBnRelu], *sizes: Any, **options: Any) -> ops.ConvBnRelu:
    g = generator(torch.device("cpu"), 0)
    return make(g, *sizes, ops.Geometry((2, 1), (1, 1), **options), torch.float16, residual=True)


ON_INTEGERS: dict[str, Callable[[], Operation]] = {
    "groups": lambda: _grouped(grouped_call, (1, 28, 9, 10), (28, 3, 3), groups=7),
    "depthwise": lambda: _grouped(depthwise_call, (1, 24, 9, 10), (3, 3)),
    "stem": lambda: stem_call(generator(torch.device("cpu"), 0), 1, 3, 20, 16, 64, torch.float16),
    "linear": lambda: ops.Linear(data(3, 300), data(10, 300), data(10), KERNELS),
    "avg_pool_linear": lambda: ops.AvgPoolLinear(data(2, 64, 2, 2), data(10, 64), data(10), KERNELS),
    "max_pool": lambda: ops.MaxPool2d(_images(1, 8, 9, 9), *STEM_POOL, modes=KERNELS),
    "max_pool of 28": lambda: ops.MaxPool2d(_images(1, 8, 5, 9), (4, 7), (2, 1), (1, 3), modes=KERNELS),
    "add_relu": lambda: ops.AddRelu(_images(1, 8, 9, 9), _images(1, 8, 9, 9), KERNELS),
    "global_avg_pool": lambda: ops.GlobalAvgPool(_images(2, 8, 4, 4), KERNELS),
    "global_avg_pool, narrow": lambda: ops.GlobalAvgPool(_images(1, 24, 8, 9), KERNELS),
}
"""Calls in fp16 whose answers are exact."""


def with_tensors(call: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The call with each of its tensors changed, in the order of the schema."""
    return call.schema.with_tensors(call, lambda _, t: change(t))


def through_the_dispatcher(call: Operation) -> Tensor:
    """The call as a compiled or exported model makes it."""
    return getattr(torch.ops.resnet_triton, call.name)(*call.schema.flatten(call))
