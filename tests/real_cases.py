"""Calls on real-valued data of several kinds, in the shapes and tiles of a ResNet-18, from a seed.

A convolution is one tile of the output as the lookup would tile the layer at full size: few pixels and filters, but
sums at their full length, in the steps and shares that a GPU would take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from unittest import mock

import photos
import torch
from exact import channels_last, dtype_id, run, run_conv
from torch import Tensor

from resnet_triton import config, ops, resnet18
from resnet_triton.config import ConvShape
from resnet_triton.config.device import DeviceFacts, facts
from resnet_triton.ops import ConvCall
from resnet_triton.ops.stem import StemCall
from resnet_triton.ops.trace import trace

EIGHT_CHANNELS = "8 channels"
"""A convolution of so few products that the rounding of batch norm shows."""


class Series(NamedTuple):
    """What is measured separately."""

    operator: str
    path: str
    """"descriptor" or "pointer", by which our kernels load, or "torch"."""
    dtype: torch.dtype
    precision: str = "ieee"
    shapes: str = "ResNet-18"
    """Or `EIGHT_CHANNELS`."""

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
        if name in ("weight", "short_weight"):
            return kind.filters(*shape, generator=g)
        if name in ("x", "short_x", "residual", "other"):
            return kind.inputs(*shape, generator=g)
        if name in ("var", "short_var"):
            return torch.rand(shape, generator=g) + 0.5
        t = torch.randn(shape, generator=g)
        return t if name in ("gamma", "short_gamma") else t * kind.scale

    return take


def cut(tensors: dict[str, Tensor], seed: int) -> Take:
    """A piece of each tensor: any images and pixels, all channels, any filters; repeated where it is too small."""
    rng = random.Random(seed)
    image, filters, row, column = (rng.randrange(1000) for _ in range(4))
    starts = dict.fromkeys(("x", "short_x"), (image, 0, row, column))
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
    stem = StemCall(*traced[0].args)
    return [stem.convolution(stem.x).shape] + [c.shape for c in traced if c.operator == "conv_bn_relu"]


class Case(NamedTuple):
    """A call on a row's path, and the configuration of its kernel where that is looked up."""

    row: Series
    args: tuple[Any, ...]
    chosen: Any = None

    def run(self) -> Tensor:
        if self.row.path == "torch":
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return ops.OPERATORS[self.row.operator].run_torch(*self.args)
        with in_precision(self.row.precision):
            if self.row.operator == "conv_bn_relu":
                return run_conv(ConvCall(*self.args), self.chosen)
            with mock.patch.object(config, "stem_heuristic", return_value=self.chosen):
                return run(self.row.operator, *self.args)


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
    return made._replace(args=tuple(a.to(device) if isinstance(a, Tensor) else a for a in made.args))


def _take(data: str, rng: random.Random, operator: str, index: int, fields: Sequence[str]) -> Take:
    """From a distribution, or from the model's call `index` of this operator."""
    if data != PHOTOGRAPHS:
        return drawn(KINDS[data], rng.getrandbits(31))
    call = [c for c in photos.calls() if c.operator == operator][index]
    return cut(dict(zip(fields, call.args, strict=False)), rng.getrandbits(31))


def _conv(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    if row.path != "descriptor":
        gpu = dataclasses.replace(gpu, arch=80)  # has none
    while True:
        index = rng.randrange(len(layers()))
        shape = ConvShape(1, 8, 56, 56, 64, 1, 1) if row.shapes == EIGHT_CHANNELS else layers()[index]
        shape = dataclasses.replace(
            shape, n=rng.choice([1, 8, 32, 128]), dtype=dtype_id(row.dtype), precision=row.precision
        )
        chosen = config.lookup(shape, gpu)
        if row.path in (chosen.path, "torch"):
            break
    take = _take(data, rng, *(("conv_bn_relu", index - 1) if index else ("stem", 0)), ConvCall._fields)
    p, q, n = chosen.box or (4, 4, chosen.block_m // 16)
    k = chosen.block_k

    def norm(prefix: str) -> list[Tensor]:
        return [take(prefix + name, k) for name in ("mean", "var", "gamma", "beta")]

    def wide(name: str, *size: int) -> Tensor:
        return channels_last(take(name, *size).to(row.dtype))

    short: Sequence[Any] = ops.NO_SHORTCUT
    if shape.shortcut_c:
        stride = shape.shortcut_stride
        images = wide("short_x", n, shape.shortcut_c, p * stride[0], q * stride[1])
        short = (images, wide("short_weight", k, shape.shortcut_c, 1, 1), *norm("short_"), 1e-5, list(stride))
    x = wide("x", n, shape.c, p * shape.stride[0], q * shape.stride[1])
    (mean, var, gamma, beta), eps = norm(""), 1e-5
    if row.shapes == EIGHT_CHANNELS:  # of every second filter, a variance that an approximate root takes for zero
        var[::2], gamma[::2], eps = var[::2] * 2.0**-130, gamma[::2] * 2.0**-65, 0.0
    args = (
        x, wide("weight", k, shape.c, shape.r, shape.s), mean, var, gamma, beta, eps, list(shape.stride),
        list(shape.padding), [1, 1], 1, wide("residual", n, k, p, q) if shape.residual else None, *short, False, False,
        "triton",
    )  # fmt: skip
    return Case(row, args, chosen)


def _stem(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """The convolution is ReLU'd and pooled, so half of its errors do not show."""
    take = _take(data, rng, "stem", 0, StemCall._fields)
    x, weight = take("x", 1, 3, 24, 40).to(row.dtype), channels_last(take("weight", 64, 3, 7, 7).to(row.dtype))
    norm = [take(name, 64) for name in ("mean", "var", "gamma", "beta")]
    chosen = config.stem_heuristic(rng.choice([1, 8, 32, 128]), 64, 56, 56, gpu)
    return Case(row, (x, weight, *norm, 1e-5, None, None, False, "triton"), chosen)


def _linear(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """The last layer of a ResNet-18 or a ResNet-50, or one that fills no tile."""
    take, c = _take(data, rng, "avg_pool_linear", 0, ("x", "weight", "beta")), rng.choice([512, 2048, 65])
    x = take("x", rng.choice([2, 20]), c, 1, 1).flatten(1)
    return Case(row, (*(t.to(row.dtype) for t in (x, take("weight", 100, c), take("beta", 100))), False, "triton"))


def _avg_pool_linear(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    take = _take(data, rng, "avg_pool_linear", 0, ("x", "weight", "beta"))
    tensors = take("x", rng.choice([2, 20]), 512, 7, 7), take("weight", 20, 512), take("beta", 20)
    return Case(row, (*(t.to(row.dtype) for t in tensors), False, "triton"))


def _global_avg_pool(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    """Images of the last layer's size, of the first's, or small ones."""
    take, size = _take(data, rng, "conv_bn_relu", 1, ConvCall._fields), rng.choice([(7, 7), (56, 56), (3, 5)])
    return Case(row, (take("x", 2, 64, *size).to(row.dtype), False, "triton"))


def _add_relu(row: Series, data: str, rng: random.Random, gpu: DeviceFacts) -> Case:
    take = _take(data, rng, "conv_bn_relu", 1, ConvCall._fields)
    return Case(row, (*(take(name, 2, 64, 8, 8).to(row.dtype) for name in ("x", "residual")), "triton"))


MAKERS: dict[str, Callable[[Series, str, random.Random, DeviceFacts], Case]] = {
    "conv_bn_relu": _conv, "stem": _stem, "linear": _linear, "avg_pool_linear": _avg_pool_linear,
    "global_avg_pool": _global_avg_pool, "add_relu": _add_relu,
}  # fmt: skip
