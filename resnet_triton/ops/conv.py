"""Convolution + batch norm [+ residual | + shortcut] [+ activation]."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .. import config
from ..config import ConvConfig, ConvShape
from ..config.device import DeviceFacts
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import Launch
from ..kernels.values import (
    ACTIVATIONS,
    RELU,
    Activation,
    BatchNorm,
    Convolution,
    Geometry,
    Shortcut,
    Size,
    is_depthwise,
)
from . import gluon, reference
from .checks import (
    aligned,
    at_aligned,
    channels_last,
    check_rank,
    check_same_dtype,
    check_tensors,
    check_vectors,
    in_channels_last,
    too_large,
    window,
)
from .dispatch import AUTO, HAS_TRITON, Modes, mixed_dtypes
from .in_graph import may_depend, semaphores_for
from .operation import Operation, Result, Shape, one_image, register
from .precision import conv_precision

if HAS_TRITON:
    from ..kernels.conv_bn_relu import conv_bn_relu
    from ..kernels.conv_depthwise import conv_depthwise


@dataclass(eq=False)
class ConvBnRelu(Operation):
    """`activation(batch_norm(conv2d(x, weight)) + residual)`, or plus a shortcut's convolution and batch norm.

    x (N, C, H, W), weight (K, C / groups, R, S), residual and result (N, K, P, Q).
    """

    autocast = True

    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    geometry: Geometry
    residual: Tensor | None = None
    shortcut: Shortcut | None = None
    activation: Activation = RELU
    modes: Modes = AUTO

    @property
    def shape(self) -> ConvShape:
        """The key under which the configuration of this call is looked up."""
        return _shape(self._sizes())

    @property
    def tiled(self) -> bool:
        """Whether our kernels compute it with a configuration that is looked up: not a grouped one."""
        return self.geometry.groups == 1

    @property
    def depthwise(self) -> bool:
        """Whether our kernels compute it without products of matrices."""
        return is_depthwise(self.x.shape[1], self.weight.shape, self.geometry.groups)

    def _sizes(self) -> _Sizes:
        x, short = self.x, self.shortcut
        return _Sizes(
            x.shape, self.weight.shape, self.geometry, x.dtype, conv_precision(x.dtype), self.residual is not None,
            None if short is None else short.x.shape, (1, 1) if short is None else short.stride,
        )  # fmt: skip

    def result(self) -> Result:
        x, weight, residual, shortcut = self.x, self.weight, self.residual, self.shortcut
        if self.activation.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation.activation!r}, expected one of {ACTIVATIONS}")
        if shortcut is None:
            theirs = None
        elif residual is not None:
            raise ValueError("residual and shortcut_x are both given, expected at most one of them")
        elif None in (shortcut.stride, shortcut.batch_norm.eps) or any(t is None for t in shortcut[:2]):  # by a schema
            raise ValueError("shortcut_x, its weight, stride and statistics belong together, expected all or none")
        else:
            theirs = shortcut.x.shape, shortcut.weight.shape, shortcut.stride
        # Once for sizes alike, except that those of a compiler's trace may be symbols.
        sizes = _output_size if type(x) is Tensor else _output_size.__wrapped__
        shape = sizes(x.shape, weight.shape, self.geometry, None if residual is None else residual.shape, theirs)
        check_tensors(x, weight=weight, residual=residual)
        check_vectors(x, weight, self.batch_norm)
        if shortcut is not None:
            check_tensors(x, shortcut_x=shortcut.x, shortcut_weight=shortcut.weight)
            check_vectors(x, weight, shortcut.batch_norm, "shortcut_")
        return Result(shape, x.dtype)

    def fallback_reason(self, shape: Shape) -> str | None:
        x, residual, shortcut, (_, padding, _, groups) = self.x, self.residual, self.shortcut, self.geometry
        check_same_dtype(x, weight=self.weight)
        if groups != 1 and shortcut is not None:
            return "grouped convolution with a shortcut"
        others = () if shortcut is None else shortcut[:2]
        return mixed_dtypes(x, residual, *others) or too_large(shape, x, padding[1])

    def launches(self, out: Tensor, *, descriptors: bool = True) -> tuple[Launch, ...]:
        dense = _aligned_channels_last if self.modes.batch_invariant else channels_last
        x, weight = dense(self.x), dense(self.weight)
        residual = None if self.residual is None else dense(self.residual)
        shortcut = None
        if self.shortcut is not None:
            images, filters, norm, stride = self.shortcut
            shortcut = Shortcut(dense(images), dense(filters), norm.contiguous(), stride)
        batch_norm = self.batch_norm.contiguous()
        if self.depthwise:
            tile = _depthwise_tile(gluon.facts(x.device), self._sizes())
            return (
                conv_depthwise(
                    out=out, x=x, weight=weight.contiguous(), batch_norm=batch_norm, geometry=self.geometry,
                    residual=residual, activation=self.activation, **tile._asdict(), num_warps=1,
                ),
            )  # fmt: skip
        descriptors = descriptors and aligned(x, weight, residual, *(shortcut[:2] if shortcut else ()))
        sizes, facts = self._sizes(), gluon.facts(x.device)
        chosen, own, tiles, runs = _choose(config.state(), facts, descriptors, self.modes.batch_invariant, sizes)
        if runs:
            out, x, residual = _pixels(out), _pixels(x), residual if residual is None else _pixels(residual)
            shortcut = shortcut if shortcut is None else shortcut._replace(x=_pixels(shortcut.x))
        partials = semaphores = None
        if chosen.split_k > 1:
            elements = tiles * chosen.split_k * chosen.block_m * chosen.block_k
            partials = torch.empty(elements, dtype=torch.float32, device=x.device)
            semaphores = semaphores_for(x.device, 2 * tiles)  # a warp-specialised tile has two halves
        launch = conv_bn_relu(
            Convolution(
                out, x, weight, batch_norm, self.geometry, residual, shortcut, self.activation, sizes.precision,
                config=chosen, programs=facts.sm_count, partials=partials, semaphores=semaphores,
            )
        )  # fmt: skip
        pairs = [(self.weight, weight), *zip(self.batch_norm, batch_norm, strict=True)]
        if self.shortcut is not None and shortcut is not None:
            pairs += [(self.shortcut.weight, shortcut.weight)]
            pairs += zip(self.shortcut.batch_norm, shortcut.batch_norm, strict=True)
        dependent = bool(chosen.kernel) and may_depend(x.device, pairs)  # the Gluon kernels wait
        return (launch if own and not dependent else replace(launch, own=own, dependent=dependent),)

    def other_launches(self, out: Tensor) -> tuple[Launch, ...]:
        return self.launches(out, descriptors=False)

    def reference(self) -> Tensor:
        residual = self.residual
        if self.shortcut is not None:
            x, weight, batch_norm, stride = self.shortcut
            residual = reference.conv_bn_relu(x, weight, *batch_norm, stride=stride, activation="none")
        (stride, padding, dilation, groups), (activation, slope) = self.geometry, self.activation
        y = reference.conv_bn_relu(
            self.x, self.weight, *self.batch_norm, stride=stride, padding=padding, dilation=dilation, groups=groups,
            residual=residual, activation=activation, negative_slope=slope,
        )  # fmt: skip
        return in_channels_last(y)

    def cost(self) -> Cost:
        key = self.shape
        return cost.conv_bn_relu(
            n=key.n, c=key.c, h=key.h, w=key.w, k=key.k, p=key.p, q=key.q, r=key.r, s=key.s, itemsize=key.itemsize,
            stride=key.stride, groups=self.geometry.groups, residual=key.residual, shortcut_c=key.shortcut_c,
        )  # fmt: skip

    def image(self, i: int) -> Self:
        residual = None if self.residual is None else one_image(self.residual, i)
        shortcut = None if self.shortcut is None else self.shortcut._replace(x=one_image(self.shortcut.x, i))
        return replace(self, x=one_image(self.x, i), residual=residual, shortcut=shortcut)


@functools.lru_cache(maxsize=4096)
def _output_size(
    x: Size,
    weight: Size,
    geometry: Geometry,
    residual: Size | None,
    shortcut: tuple[Size, Size, tuple[int, int]] | None,
) -> Size:
    """The result's sizes; ValueError where those of the arguments do not go together."""
    check_rank("x", x, 4, "(N, C, H, W)")
    check_rank("weight", weight, 4, "(K, C, R, S)")
    k, c, r, s = weight
    groups = geometry.groups
    if groups < 1 or k % groups or x[1] != c * groups:
        hint = "; NHWC? permute(0, 3, 1, 2)" if x[3] == c * groups else ""
        expected = f"{c * groups} for weight {tuple(weight)} and groups={groups}"
        raise ValueError(f"x has {x[1]} channels, expected {expected}{hint}")
    size = (x[0], k, *window("x", x, (r, s), geometry))
    if residual is not None and residual != size:
        raise ValueError(f"residual has shape {tuple(residual)}, expected the output's {size}")
    if shortcut is not None:
        images, filters, stride = shortcut
        check_rank("shortcut_x", images, 4, "(N, C, H, W)")
        wanted = (k, images[1], 1, 1)
        if filters != wanted:
            expected = f"{wanted} for shortcut_x {tuple(images)} and weight {tuple(weight)}"
            raise ValueError(f"shortcut_weight has shape {tuple(filters)}, expected {expected}")
        given = (images[0], k, *window("shortcut_x", images, (1, 1), Geometry(stride)))
        if given != size:
            raise ValueError(f"shortcut_x {tuple(images)} by stride {stride} gives {given}, expected {size}")
    return size


class _Sizes(NamedTuple):
    """All that a configuration may depend on, as cheap to take from a call as to hash."""

    x: Size
    weight: Size
    geometry: Geometry
    dtype: torch.dtype
    precision: str
    residual: bool
    short_x: Size | None
    short_stride: tuple[int, int]


def _shape(s: _Sizes) -> ConvShape:
    (n, c, h, w), (k, _, rows, columns) = s.x, s.weight
    stride, padding, dilation, _ = s.geometry
    dtype = str(s.dtype).removeprefix("torch.")
    short_c, short_h, short_w = (0, 0, 0) if s.short_x is None else s.short_x[1:]
    return ConvShape(
        n, c, h, w, k, rows, columns, stride, padding, dilation, dtype, s.precision, s.residual,
        short_c, short_h, short_w, s.short_stride,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _depthwise_tile(facts: DeviceFacts, s: _Sizes) -> config.DepthwiseTile:
    return config.depthwise_tile(_shape(s), facts)


@functools.lru_cache(maxsize=4096)
def _choose(
    state: object, facts: DeviceFacts, descriptors: bool, invariant: bool, s: _Sizes
) -> tuple[ConvConfig, bool, int, bool]:
    """The configuration, whether it is this project's own choice, how many tiles it makes and whether these are runs.

    Once for calls alike, and for a `state`, on which the choice depends.
    """
    shape = _shape(s)
    if s.geometry.groups != 1:
        return config.grouped_tile(shape, s.geometry.groups), True, 0, False
    if invariant:
        chosen, own = config.invariant(shape, facts), True
    else:
        chosen, own = config.choose(shape, facts, descriptors=descriptors)
    return chosen, own, config.tiles(chosen, shape), config.is_run(chosen.box, shape)


def _pixels(t: Tensor) -> Tensor:
    """Images (N, C, H, W) in channels_last memory, seen as images of one pixel each."""
    n, c, h, w = t.shape
    return t.as_strided((n * h * w, c, 1, 1), (c, 1, c, c))


def _aligned_channels_last(t: Tensor) -> Tensor:
    return at_aligned(channels_last(t))


register("conv_bn_relu", ConvBnRelu)
