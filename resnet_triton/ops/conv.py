"""Convolution + batch norm [+ residual | + shortcut] [+ ReLU]."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from .. import config
from ..config import device
from ..kernels import cost
from ..kernels.cost import Cost
from ..kernels.launch import BatchNorm, Geometry, Launch, Shortcut
from . import reference
from .checks import (
    aligned,
    at_aligned,
    channels_last,
    check_rank,
    check_same_dtype,
    check_tensors,
    check_vectors,
    too_large,
    window,
)
from .dispatch import AUTO, HAS_TRITON, Modes, mixed_dtypes
from .operation import Operation, Result, Shape, one_image, register
from .precision import conv_precision

if HAS_TRITON:
    from ..kernels.conv_bn_relu import conv_bn_relu


@dataclass(frozen=True, eq=False)
class ConvBnRelu(Operation):
    """`relu(batch_norm(conv2d(x, weight)) + residual)`, or plus a shortcut's convolution and batch norm.

    x (N, C, H, W), weight (K, C / groups, R, S), residual and result (N, K, P, Q).
    """

    autocast = True

    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    geometry: Geometry
    residual: Tensor | None = None
    shortcut: Shortcut | None = None
    relu: bool = True
    modes: Modes = AUTO

    @property
    def shape(self) -> config.ConvShape:
        """The key under which the configuration of this call is looked up."""
        n, c, h, w = self.x.shape
        k, _, r, s = self.weight.shape
        stride, padding, dilation, _ = self.geometry
        dtype = self.x.dtype
        if (shortcut := self.shortcut) is None:
            short_c, short_h, short_w, short_stride = 0, 0, 0, (1, 1)
        else:
            (_, short_c, short_h, short_w), short_stride = shortcut.x.shape, shortcut.stride
        return config.ConvShape(
            n, c, h, w, k, r, s, stride, padding, dilation, str(dtype).removeprefix("torch."), conv_precision(dtype),
            self.residual is not None, short_c, short_h, short_w, short_stride,
        )  # fmt: skip

    def result(self) -> Result:
        x, weight, shortcut = self.x, self.weight, self.shortcut
        check_rank("x", x, 4, "(N, C, H, W)")
        check_rank("weight", weight, 4, "(K, C, R, S)")
        k, c, r, s = weight.shape
        groups = self.geometry.groups
        check_tensors(x, weight=weight, residual=self.residual)
        if groups < 1 or k % groups or x.shape[1] != c * groups:
            raise ValueError(
                f"x has {x.shape[1]} channels, expected {c * groups} for weight {tuple(weight.shape)} "
                f"and groups={groups}"
            )
        check_vectors(x, weight, self.batch_norm)
        p, q = window("x", x, (r, s), self.geometry)
        shape = (x.shape[0], k, p, q)
        if self.residual is not None and self.residual.shape != shape:
            raise ValueError(f"residual has shape {tuple(self.residual.shape)}, expected the output's {shape}")
        if shortcut is not None:
            self._check_shortcut(shortcut, shape)
        return Result(shape, x.dtype)

    def _check_shortcut(self, shortcut: Shortcut, shape: Shape) -> None:
        if self.residual is not None:
            raise ValueError("residual and shortcut_x are both given, expected at most one of them")
        x, weight, batch_norm, stride = shortcut
        if x is None or weight is None or stride is None:  # which a schema's arguments may be
            raise ValueError("shortcut_x, its weight, stride and statistics belong together, expected all or none")
        check_tensors(self.x, shortcut_x=x, shortcut_weight=weight)
        check_vectors(self.x, self.weight, batch_norm, "shortcut_")
        rows, columns = window("shortcut_x", x, (1, 1), Geometry(stride))
        given = (x.shape[0], weight.shape[0], rows, columns)
        if given != shape or weight.shape[1:] != (x.shape[1], 1, 1):
            raise ValueError(f"shortcut by weight {tuple(weight.shape)} gives {given}, expected {shape}")

    def fallback_reason(self, shape: Shape) -> str | None:
        check_same_dtype(self.x, weight=self.weight)
        if self.geometry.groups != 1:
            return "grouped convolution"
        short_x, short_weight = self.shortcut[:2] if self.shortcut else (None, None)
        return mixed_dtypes(self.x, self.residual, short_x, short_weight) or too_large(
            shape, self.x, self.geometry.padding[1]
        )

    def plan(self, out: Tensor, *, descriptors: bool = True) -> tuple[Launch, ...]:
        dense = _aligned_channels_last if self.modes.batch_invariant else channels_last
        x, weight = dense(self.x), dense(self.weight)
        residual = None if self.residual is None else dense(self.residual)
        shortcut = None
        if self.shortcut is not None:
            images, filters, norm, stride = self.shortcut
            shortcut = Shortcut(dense(images), dense(filters), norm.contiguous(), stride)
        shape, facts = self.shape, device.facts(x.device)
        own = True
        if self.modes.batch_invariant:
            chosen = config.invariant(shape, facts)
        else:
            descriptors = descriptors and aligned(x, weight, residual, *(shortcut[:2] if shortcut else ()))
            chosen = config.lookup(shape, facts, descriptors=descriptors)
            own = chosen == config.conv_heuristic(shape, facts, descriptors=descriptors)
        partials = semaphores = None
        if chosen.split_k > 1:
            shared = config.tiles(chosen, shape)
            elements = shared * chosen.split_k * chosen.block_m * chosen.block_k
            partials = torch.empty(elements, dtype=torch.float32, device=x.device)
            semaphores = _semaphores(x.device, shared)
        launch = conv_bn_relu(
            out=out, x=x, weight=weight, batch_norm=self.batch_norm.contiguous(), geometry=self.geometry,
            residual=residual, shortcut=shortcut, relu=self.relu, precision=shape.precision,
            config=chosen, partials=partials, semaphores=semaphores,
        )  # fmt: skip
        return (launch if own else replace(launch, own=False),)

    def plan_again(self, out: Tensor) -> tuple[Launch, ...]:
        return self.plan(out, descriptors=False)

    def reference(self) -> Tensor:
        residual = self.residual
        if self.shortcut is not None:
            x, weight, batch_norm, stride = self.shortcut
            residual = reference.conv_bn_relu(x, weight, *batch_norm, stride=stride, relu=False)
        stride, padding, dilation, groups = self.geometry
        y = reference.conv_bn_relu(
            self.x, self.weight, *self.batch_norm, stride=stride, padding=padding, dilation=dilation, groups=groups,
            residual=residual, relu=self.relu,
        )  # fmt: skip
        return channels_last(y)

    def cost(self) -> Cost:
        key = self.shape
        return cost.conv_bn_relu(
            n=key.n, c=key.c, h=key.h, w=key.w, k=key.k, p=key.p, q=key.q, r=key.r, s=key.s, itemsize=key.itemsize,
            stride=key.stride, residual=key.residual, shortcut_c=key.shortcut_c,
        )  # fmt: skip

    def image(self, i: int) -> Self:
        residual = None if self.residual is None else one_image(self.residual, i)
        shortcut = None if self.shortcut is None else self.shortcut._replace(x=one_image(self.shortcut.x, i))
        return replace(self, x=one_image(self.x, i), residual=residual, shortcut=shortcut)


def _aligned_channels_last(t: Tensor) -> Tensor:
    return at_aligned(channels_last(t))


_kept: dict[tuple[torch.device, int], Tensor] = {}
graph_semaphores: ContextVar[Tensor | None] = ContextVar("graph_semaphores", default=None)
"""Zeros (int32) for the launches of the graph being captured: zeroed inside, every replay would zero them again."""


def _semaphores(where: torch.device, tiles: int) -> Tensor:
    """Zeros for launches that follow each other, on a stream or in a graph, and leave them at zero."""
    stream = 0
    if where.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: semaphores of its own
            prepared = graph_semaphores.get()
            if prepared is not None and prepared.numel() >= tiles:
                return prepared
            return torch.zeros(tiles, dtype=torch.int32, device=where)
        stream = torch.cuda.current_stream(where).cuda_stream
    semaphores = _kept.get((where, stream))
    if semaphores is None or semaphores.numel() < tiles:
        semaphores = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=where)
        _kept[where, stream] = semaphores
    return semaphores


register("conv_bn_relu", ConvBnRelu)
