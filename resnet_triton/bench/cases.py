"""What is measured of layers: every distinct operator call of some models, and random data to make it on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..codegen.roofline import least
from ..kernels.cost import Cost
from ..ops import OPERATORS
from ..ops.stem import POOL, StemCall
from ..ops.trace import Call, trace

MODELS = ("resnet18", "resnet34", "resnet50")


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
    def cost(self) -> Cost | None:
        """FLOPs and bytes that no implementation can do without."""
        return least(self.call)


def cases(
    families: Sequence[str] = MODELS, batches: Sequence[int] = (1,), dtypes: Sequence[str] = ("float32",),
    image: int = 224,
) -> list[Case]:  # fmt: skip
    """What the models call, in their order and without what an earlier one calls too.

    Behind each model's calls stand the operators that its fused calls replace, at the same shapes.
    """
    if unknown := [family for family in families if family not in MODELS]:
        raise ValueError(f"no model {unknown[0]!r}, expected some of {', '.join(MODELS)}")
    found: dict[Any, Case] = {}
    for family in families:
        with torch.device("meta"):
            model = getattr(models, family)().eval()
        for batch, dtype in product(batches, dtypes):
            calls = trace(model, (batch, 3, image, image), getattr(torch, dtype))
            for call in [*calls, *chain.from_iterable(map(_unfused, calls))]:
                if call.operator in OPERATORS:
                    key = (call.operator, *map(_key, call.args))
                    found.setdefault(key, Case(family, call.name, batch, image, dtype, call))
    return list(found.values())


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.shape
    return tuple(argument) if isinstance(argument, list) else argument


def _unfused(call: Call) -> Iterator[Call]:
    """What follows the convolution, or replaces the head, where they are not fused."""

    def other(operator: str, *args: Any) -> Call:
        return replace(call, name=f"{call.name} {operator}", operator=operator, args=args)

    if call.operator == "stem":
        convolved = OPERATORS["conv_bn_relu"].output(*StemCall(*call.args).convolution(call.args[0]))
        yield other("max_pool2d", convolved, *POOL, call.args[-1])
    elif call.operator == "conv_bn_relu" and (call.shape.residual or call.shape.shortcut_c):
        y = OPERATORS["conv_bn_relu"].output(*call.args)
        yield other("add_relu", y, y, call.args[-1])
    elif call.operator == "avg_pool_linear":
        x, weight, bias, *modes = call.args
        yield other("global_avg_pool", x, *modes)
        yield other("linear", OPERATORS["global_avg_pool"].output(x, *modes).flatten(1), weight, bias, *modes)


def names(operator: str) -> list[str]:
    """An operator's arguments by name."""
    return [argument.name for argument in getattr(torch.ops.resnet_triton, operator).default._schema.arguments]


def arguments(call: Call, device: torch.device, *, seed: int, kernels: str) -> tuple[Any, ...]:
    """Normally distributed data for a call, scaled as in a trained network, images and filters in channels_last."""
    generator = torch.Generator(device).manual_seed(seed)

    def fill(name: str, like: Any) -> Any:
        if not isinstance(like, Tensor):
            return like
        values = torch.randn(like.shape, generator=generator, device=device)
        if name.endswith("var"):
            values = values.abs() + 0.5
        elif name.endswith("weight") and like.dim() > 1:
            values /= prod(like.shape[1:]) ** 0.5
        memory = torch.channels_last if like.dim() == 4 else torch.contiguous_format
        return values.to(like.dtype, memory_format=memory)

    return (*map(fill, names(call.operator), call.args[:-1]), kernels)
