"""What is measured of layers: every distinct operator call of some models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..kernels.cost import Cost
from ..ops import (
    AddRelu,
    AvgPoolLinear,
    BatchNorm,
    ConvBnRelu,
    Geometry,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Operation,
    Stem,
)
from ..ops.stem import STEM_POOL
from ..ops.trace import Call, trace
from ..support.names import check_known

MODELS = ("resnet18", "resnet34", "resnet50")
_GROUPED = (
    (32, 1, 112, 3, 1), (96, 1, 112, 3, 2), (144, 1, 56, 3, 1), (384, 1, 14, 3, 1), (960, 1, 7, 3, 1),  # of MobileNetV2
    (96, 1, 56, 7, 1), (768, 1, 7, 7, 1),  # of ConvNeXt-T
    (128, 4, 56, 3, 1), (256, 8, 28, 3, 1), (512, 16, 14, 3, 1), (1024, 32, 7, 3, 1),  # of ResNeXt-50 32x4d
    (216, 24, 28, 3, 1), (576, 24, 14, 3, 1), (448, 112, 28, 3, 1), (1392, 232, 14, 3, 1),  # of RegNetYs
)  # fmt: skip
"""Channels, those of a group, rows and columns, those of the filter, stride."""


@dataclass(frozen=True)
class Case:
    """A distinct operator call, by the first model and layer that make it."""

    model: str
    layer: str
    batch: int
    image: int
    dtype: str
    call: Call

    @property
    def cost(self) -> Cost:
        """FLOPs and bytes that no implementation can do without."""
        return self.call.ours.cost()


def cases(
    families: Sequence[str] = MODELS, batches: Sequence[int] = (1,), dtypes: Sequence[str] = ("float32",),
    image: int = 224,
) -> list[Case]:  # fmt: skip
    """What the models call, in their order and without what an earlier one calls too.

    Behind each model's calls stand the operators that its fused calls replace, at the same shapes.
    """
    check_known("model", families, MODELS)
    found: dict[Any, Case] = {}
    for family in families:
        with torch.device("meta"):
            model = getattr(models, family)().eval()
        for batch, dtype in product(batches, dtypes):
            calls = trace(model, (batch, 3, image, image), getattr(torch, dtype))
            for call in [*calls, *chain.from_iterable(map(_unfused, calls))]:
                if call.operation is not None:
                    key = (call.operator, *map(_key, call.operation.schema.flatten(call.operation)))
                    found.setdefault(key, Case(family, call.name, batch, image, dtype, call))
    return list(found.values())


def grouped(batches: Sequence[int], dtypes: Sequence[str]) -> list[Case]:
    """Depthwise and other grouped convolutions, batch norm and ReLU, which no ResNet has."""
    return [_grouped(*sizes, n, dtype) for n, dtype in product(batches, dtypes) for sizes in _GROUPED]


def _grouped(c: int, width: int, edge: int, size: int, stride: int, n: int, dtype: str) -> Case:
    with torch.device("meta"):
        shapes = (n, c, edge, edge), (c, width, size, size)
        x, weight = (torch.empty(shape, dtype=getattr(torch, dtype)) for shape in shapes)
        mean, var, bn_weight, bn_bias = torch.empty(4, c)
    geometry = Geometry((stride, stride), (size // 2, size // 2), groups=c // width)
    norm = BatchNorm(mean, var, bn_weight, bn_bias, 1e-5)
    operation = ConvBnRelu(x, weight, norm, geometry)
    kind = "depthwise" if width == 1 else f"groups of {width}"
    name = f"{c} channels, {edge}x{edge}, {size}x{size}" + f", stride {stride}" * (stride > 1)
    return Case(kind, name, n, edge, dtype, Call(name, operation.name, operation, x.device, "triton", ""))


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape
    return argument


def _unfused(call: Call) -> Iterator[Call]:
    """What follows the convolution, or replaces the head, where they are not fused."""

    def other(operation: Operation) -> Call:
        return replace(call, name=f"{call.name} {operation.name}", operator=operation.name, operation=operation)

    fused = call.operation
    if isinstance(fused, Stem):
        yield other(MaxPool2d(fused.convolution(fused.x).output(), *STEM_POOL, modes=fused.modes))
    elif isinstance(fused, ConvBnRelu) and (fused.residual is not None or fused.shortcut is not None):
        y = fused.output()
        yield other(AddRelu(y, y, fused.modes))
    elif isinstance(fused, AvgPoolLinear):
        pool = GlobalAvgPool(fused.x, fused.modes)
        yield other(pool)
        yield other(Linear(pool.output().flatten(1), fused.weight, fused.bias, fused.modes))
