"""Calls on real-valued data of several kinds, in the shapes and tiles of a ResNet-18, from a seed.

A convolution is one tile of the output as the lookup would tile the layer at full size: few pixels and filters, but
sums at their full length, in the steps and parts that a GPU would take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from unittest import mock

import photos
import torch
from calls import with_tensors
from exact import channels_last, dtype_id, run, run_conv
from torch import Tensor

from resnet_triton import config, ops, resnet18
from resnet_triton.config import ConvShape
from resnet_triton.config.device import DeviceFacts, facts
from resnet_triton.ops import (
    NONE,
    AddRelu,
    AvgPoolLinear,
    BatchNorm,
    ConvBnRelu,
    Geometry,
    GlobalAvgPool,
    Linear,
    Operation,
    Shortcut,
    Stem,
)
from resnet_triton.ops.trace import trace

EIGHT_CHANNELS = "8 channels"
"""A convolution of so few products that the rounding of batch norm shows."""


GROUPS_OF_4 = "groups of 4 channels"
"""A convolution whose products have eight groups each, seven of them times zero."""


class Series(NamedTuple):
    """What is measured separately."""

    operator: str
    path: str
    """"descriptor" or "pointer", by which our kernels load, or "torch"."""
    dtype: torch.dtype
    precision: str = "ieee"
    shapes: str = "ResNet-18"
    """Or `EIGHT_CHANNELS` or `GROUPS_OF_4`."""

    def __str__(self) -> str:
        number = "tf32" if self.precision == "tf32" else dtype_id(self.dtype)
        return "-".join([self.operator, *[self.shapes] * (self.shapes != "ResNet-18"), self.path, number])


# --- data ------------------------------------------------------------------------------------------------------------


class Take(Protocol):
    """Data in fp32 for an argument of this name, in this shape."""

    def __call__(self, name: str, *shape: int) -> Tensor: ...


class Kind(NamedTuple):
    """How inputs and filters are drawn; `scale` is that of what is added to their products."""

    inputs: Callable[..., Tensor]
    filters: Callable[..., Tensor]
    scale: float = 1.0


def _heavy(*shape: int, generator: torch.Generator) -> Tensor:
    """Log-normal with a sign: two values in a thousand are 300 times the median."""
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    return sign * (2 * torch.randn(shape, generator=generator)).exp().clamp(max=500.0)


def _filters(draw: Callable[..., Tensor] = torch.randn) -> Callable[..., Tensor]:
    return lambda *shape, generator: draw(*shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5


def _balanced(*shape: int, generator: torch.Generator) -> Tensor:
    w = _filters()(*shape, generator=generator)
    return w - w.mean(tuple(range(1, len(shape))), keepdim=True)


KINDS = {
    "normal": Kind(torch.randn, _filters()),
    "uniform, positive": Kind(torch.rand, _filters(torch.rand)),
    "heavy tails": Kind(_heavy, lambda *shape, generator: _filters(_heavy)(*shape, generator=generator) / 16),
    "large and cancelling": Kind(lambda *shape, generator: torch.randn(*shape, generator=generator) + 64, _balanced),
    "fp16 subnormal": Kind(lambda *shape, generator: torch.randn(*shape, generator=generator) * 2**-16, _filters(),
                           2**-16),
}  # fmt: skip
PHOTOGRAPHS = "photographs"
"""Activations of a ResNet-18 for photographs, with its filters and statistics."""
DATA = [*KINDS, *([PHOTOGRAPHS] if importlib.util.find_spec("sklearn") else [])]


def drawn(kind: Kind, seed: int) -> Take:
    g = torch.Generator().manual_seed(seed)

    def take(name: str, *shape: int) -> Tensor:
        if name in ("weight", "shortcut_weight"):
            return kind.filters(*shape, generator=g)
        if name in ("x", "shortcut_x", "residual", "other"):
            return kind.inputs(*shape, generator=g)
        if name.endswith("running_var"):
            return torch.rand(shape, generator=g) + 0.5
        t = torch.randn(shape, generator=g)
        return t if name.endswith("bn_weight") else t * kind.scale

    return take


def cut(tensors: dict[str, Tensor], seed: int) -> Take:
    """A piece of each tensor: any images and pixels, all channels, any filters; repeated where it is too small."""
    rng = random.Random(seed)
    image, filters, row, column = (rng.randrange(1000) for _ in range(4))
    starts = dict.fromkeys(("x", "shortcut_x"), (image, 0, row, column))
    starts |= dict.fromkeys(("residual", "other"), (image, filters, row, column))

    def take(name: str, *shape: int) -> Tensor:
        t, first = tensors[name], starts.get(name, (filters, 0, 0, 0))
        for dim, size in enumerate(shape):
            t = t.index_select(dim, (torch.arange(size) + first[dim]) % t.shape[dim])
        return t

    return take


# --- calls -----------------------------------------------------------------------------------------------------------


@functools.cache
def layers() -> list[ConvShape]:
    """ResNet-18's convolutions for one image, in order; the first is the stem's."""
    traced = trace(resnet18().eval(), (1, 3, 224, 224))
    stem = traced[0].ours
    assert isinstance(stem, Stem)
    return [stem.convolution(stem.x).shape] + [c.shape for c in traced if c.operator == "conv_bn_relu"]


class Case(NamedTuple):
    """A call on a row's path, and the configuration of its kernel where that is looked up."""

    row: Series
    call: Operation
    chosen: Any = None

    def run(self) -> Tensor:
        if self.row.path == "torch":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self.call.run_torch()
        with in_precision(self.row.precision):
            if isinstance(self.call, ConvBnRelu):
                return run_conv(self.call, self.chosen)
            with mock.patch.object(config, "stem_heuristic", return_value=self.chosen):
                return run(self.call)


@contextlib.contextmanager
def in_precision(precision: str) -> Iterator[None]:
    """What torch's flags for fp32 products would say."""
    with (
        mock.patch.object(ops.conv, "conv_precision", return_value=precision),
        mock.patch.object(ops.linear, "matmul_precision", return_value=precision),
    ):
        yield


def case(row: Series, data: str, seed: int, device: torch.device) -> Case:
    """A call with data of this kind."""
    rng = random.Random(f"{row} {data} {seed}")
    made = MAKERS[row.operator](row, data, rng, facts(device))
    return made._replace(call=with_tensors(made.call, lambda t: t.to(device)))


def _take(data: str, rng: random.Random, operator: str, index: int = 0) -> Take:
    """From a distribution, or from the model's call `index` of this operator."""
    if data != PHOTOGRAPHS:
        return drawn(KINDS[data], rng.getrandbits(31))
    call = [c for c in photos.calls() if c.name == operator][index]
    values = zip(call.schema.arguments, call.schema.flatten(call), strict=True)
    return cut({a.name: value for a, value in values}, rng.getrandbits(31))


def _norm(take: Take, k: int, prefix: str = "") -> BatchNorm:
    return BatchNorm(*(take(prefix + name, k) for name in BatchNorm._fields[:4]), eps=1e-5)


def _grouped(row: Series, data: str, rng: random.Random) -> Case:
    take = _take(data, rng, "conv_bn_relu", 1)
    x, weight, residual = (
        channels_last(take(name, *size).to(row.dtype))
        for name, *size in (("x", 2, 64, 8, 8), ("weight", 64, 4, 3, 3), ("residual", 2, 64, 8, 8))
    )
    geometry = Geometry(padding=(1, 1), groups=16)
    return Case(row, ConvBnRelu(x, weight, _norm(take, 64), geometry, residual, activation=NONE))


def _conv(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    if row.shapes == GROUPS_OF_4:
        return _grouped(row, data, rng)
    if row.path != "descriptor":
        gpu = dataclasses.replace(gpu, arch=80)  # has none
    while True:
        index = rng.randrange(len(layers()))
        shape = ConvShape(1, 8, 56, 56, 64, 1, 1) if row.shapes == EIGHT_CHANNELS else layers()[index]
        shape = dataclasses.replace(
            shape, n=rng.choice([1, 8, 32, 128]), dtype=dtype_id(row.dtype), precision=row.precision
        )
        chosen = config.lookup(shape, gpu)
        if row.path == "torch" or chosen.kernel == {"pointer": "conv_pointer", "descriptor": "conv_box"}[row.path]:
            break
    take = _take(data, rng, "conv_bn_relu", index - 1) if index else _take(data, rng, "stem")
    p, q, n = chosen.box or (4, 4, chosen.block_m // 16)
    k = chosen.block_k

    def wide(name: str, *size: int) -> Tensor:
        return channels_last(take(name, *size).to(row.dtype))

    shortcut = None
    if shape.shortcut_c:
        stride = shape.shortcut_stride
        images = wide("shortcut_x", n, shape.shortcut_c, p * stride[0], q * stride[1])
        filters = wide("shortcut_weight", k, shape.shortcut_c, 1, 1)
        shortcut = Shortcut(images, filters, _norm(take, k, "shortcut_"), stride)
    x = wide("x", n, shape.c, p * shape.stride[0], q * shape.stride[1])
    norm = _norm(take, k)
    if row.shapes == EIGHT_CHANNELS:  # of every second filter, a variance that an approximate root takes for zero
        norm.running_var[::2] *= 2.0**-130
        norm.bn_weight[::2] *= 2.0**-65
        norm = norm._replace(eps=0.0)
    weight, geometry = wide("weight", k, shape.c, shape.r, shape.s), Geometry(shape.stride, shape.padding)
    residual = wide("residual", n, k, p, q) if shape.residual else None
    return Case(row, ConvBnRelu(x, weight, norm, geometry, residual, shortcut, activation=NONE), chosen)


def _stem(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """The convolution is ReLU'd and pooled, so half of its errors do not show."""
    take = _take(data, rng, "stem")
    x, weight = take("x", 1, 3, 24, 40).to(row.dtype), channels_last(take("weight", 64, 3, 7, 7).to(row.dtype))
    chosen = config.stem_heuristic(rng.choice([1, 8, 32, 128]), 64, 56, 56, gpu)
    return Case(row, Stem(x, weight, _norm(take, 64)), chosen)


def _linear(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """The last layer of a ResNet-18 or a ResNet-50, or one that fills no tile."""
    take, c = _take(data, rng, "avg_pool_linear"), rng.choice([512, 2048, 65])
    x = take("x", rng.choice([2, 20]), c, 1, 1).flatten(1)
    return Case(row, Linear(*(t.to(row.dtype) for t in (x, take("weight", 100, c), take("bias", 100)))))


def _avg_pool_linear(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    take = _take(data, rng, "avg_pool_linear")
    tensors = take("x", rng.choice([2, 20]), 512, 7, 7), take("weight", 20, 512), take("bias", 20)
    return Case(row, AvgPoolLinear(*(t.to(row.dtype) for t in tensors)))


def _global_avg_pool(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """Images of the last layer's size, of the first's, or small ones."""
    take, size = _take(data, rng, "conv_bn_relu", 1), rng.choice([(7, 7), (56, 56), (3, 5)])
    return Case(row, GlobalAvgPool(take("x", 2, 64, *size).to(row.dtype)))


def _add_relu(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    take = _take(data, rng, "conv_bn_relu", 1)
    return Case(row, AddRelu(*(take(name, 2, 64, 8, 8).to(row.dtype) for name in ("x", "residual"))))


MAKERS: dict[str, Callable[[Series, str, random.Random, DeviceFacts], Case]] = {
    "conv_bn_relu": _conv, "stem": _stem, "linear": _linear, "avg_pool_linear": _avg_pool_linear,
    "global_avg_pool": _global_avg_pool, "add_relu": _add_relu,
}  # fmt: skip
