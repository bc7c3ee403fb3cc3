"""Convolution + batch norm [+ residual | + shortcut] [+ activation]."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
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
from . import reference
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
from .operation import Operation, Result, Shape, register
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
    tile: ConvConfig | None = field(default=None, kw_only=True)
    """In place of the configuration that is looked up: the tuner and tests try tiles."""

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
        return mixed_dtypes(x, residual, *others) or too_large(shape, x, padding[1], self.weight.shape[1:].numel())

    def launches(self, out: Tensor, facts: DeviceFacts, *, descriptors: bool = True) -> tuple[Launch, ...]:
        dense = self._dense()
        if self.depthwise:
            return (dense._depthwise_launch(out, facts),)
        chosen = dense.choose_tile(facts, descriptors=descriptors)
        launch = conv_bn_relu(dense._convolution(out, chosen, facts))
        parameters = zip(self._parameters(), dense._parameters(), strict=True)
        dependent = chosen.config.is_gluon and may_depend(facts, parameters)  # the kernels in Gluon wait
        if chosen.trusted and not dependent:
            return (launch,)
        return (replace(launch, trusted=chosen.trusted, dependent=dependent),)

    def choose_tile(self, facts: DeviceFacts, *, descriptors: bool = True) -> Tiling:
        """The configuration of this call, which is not depthwise, on a device with these facts."""
        if self.tile is not None:
            return _tiling(self.tile, self.shape, trusted=False)
        tensors = self.x, self.weight, self.residual, *(self.shortcut[:2] if self.shortcut else ())
        descriptors = descriptors and aligned(*tensors)
        return _choose(config.state(), facts, descriptors, self.modes.batch_invariant, self._sizes())

    def _dense(self) -> Self:
        """This call on tensors as kernels read them."""
        dense = _aligned_channels_last if self.modes.batch_invariant else channels_last
        shortcut = self.shortcut
        if shortcut is not None:
            x, weight, batch_norm, stride = shortcut
            shortcut = Shortcut(dense(x), dense(weight), batch_norm.contiguous(), stride)
        return replace(
            self, x=dense(self.x), weight=dense(self.weight), batch_norm=self.batch_norm.contiguous(),
            residual=None if self.residual is None else dense(self.residual), shortcut=shortcut,
        )  # fmt: skip

    def _depthwise_launch(self, out: Tensor, facts: DeviceFacts) -> Launch:
        return conv_depthwise(
            out=out, x=self.x, weight=self.weight.contiguous(), batch_norm=self.batch_norm, geometry=self.geometry,
            residual=self.residual, activation=self.activation, num_warps=1,
            **_depthwise_tile(facts, self._sizes())._asdict(),
        )  # fmt: skip

    def _convolution(self, out: Tensor, chosen: Tiling, facts: DeviceFacts) -> Convolution:
        """What a launcher takes, memory for the sums of shared tiles included."""
        tile, x, residual, shortcut = chosen.config, self.x, self.residual, self.shortcut
        if chosen.runs:
            out, x, residual = _pixels(out), _pixels(x), residual if residual is None else _pixels(residual)
            shortcut = shortcut if shortcut is None else shortcut._replace(x=_pixels(shortcut.x))
        partials = semaphores = None
        if tile.split_k > 1:
            elements = chosen.tiles * tile.split_k * tile.block_m * tile.block_k
            partials = torch.empty(elements, dtype=torch.float32, device=x.device)
            semaphores = semaphores_for(x.device, 2 * chosen.tiles)  # a warp-specialised tile has two halves
        return Convolution(
            out, x, self.weight, self.batch_norm, self.geometry, residual, shortcut, self.activation,
            conv_precision(x.dtype), tile, programs=facts.sm_count, partials=partials, semaphores=semaphores,
        )  # fmt: skip

    def _parameters(self) -> list[object]:
        found: list[object] = [self.weight, *self.batch_norm]
        return found if self.shortcut is None else [*found, self.shortcut.weight, *self.shortcut.batch_norm]

    def other_launches(self, out: Tensor, facts: DeviceFacts) -> tuple[Launch, ...]:
        return self.launches(out, facts, descriptors=False)

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


class Tiling(NamedTuple):
    """A configuration, whether it is this project's own choice, how many tiles it makes and whether these are runs."""

    config: ConvConfig
    trusted: bool
    tiles: int
    runs: bool


@functools.lru_cache(maxsize=4096)
def _choose(state: object, facts: DeviceFacts, descriptors: bool, invariant: bool, s: _Sizes) -> Tiling:
    """Once for calls alike, and for a `state`, on which the choice depends."""
    shape = _shape(s)
    if s.geometry.groups != 1:
        return Tiling(config.grouped_tile(shape, s.geometry.groups), True, 0, False)
    if invariant:
        chosen, trusted = config.invariant(shape, facts), True
    else:
        chosen, trusted = config.choose(shape, facts, descriptors=descriptors)
    return _tiling(chosen, shape, trusted)


def _tiling(chosen: ConvConfig, shape: ConvShape, trusted: bool) -> Tiling:
    return Tiling(chosen, trusted, config.tiles(chosen, shape), config.is_run(chosen.box, shape))


def _pixels(t: Tensor) -> Tensor:
    """Images (N, C, H, W) in channels_last memory, seen as images of one pixel each."""
    n, c, h, w = t.shape
    return t.as_strided((n * h * w, c, 1, 1), (c, 1, c, c))


def _aligned_channels_last(t: Tensor) -> Tensor:
    return at_aligned(channels_last(t))


register("conv_bn_relu", ConvBnRelu)
