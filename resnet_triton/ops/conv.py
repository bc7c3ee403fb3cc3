"""Convolution + batch norm [+ residual | + shortcut] [+ ReLU]."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import config
from ..config import device
from . import reference
from .checks import (
    aligned,
    as_tuple,
    at_aligned,
    channels_last,
    check_rank,
    check_same_dtype,
    check_tensors,
    contiguous,
    too_large,
    window,
)
from .dispatch import HAS_TRITON, mixed_dtypes
from .precision import conv_precision
from .registry import Operator, Result, Shape, register

if HAS_TRITON:
    from ..kernels.conv_bn_relu import BatchNorm, Shortcut
    from ..kernels.conv_bn_relu import conv_bn_relu as conv_bn_relu_launch
    from ..kernels.launch import Launch


class ConvCall(NamedTuple):
    """The arguments of `resnet_triton::conv_bn_relu`, in the order of its schema."""

    x: Tensor
    weight: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    residual: Tensor | None
    short_x: Tensor | None  # the shortcut's input; with it come its weight and statistics
    short_weight: Any
    short_mean: Any
    short_var: Any
    short_gamma: Tensor | None
    short_beta: Tensor | None
    short_eps: float
    short_stride: list[int]
    relu: bool
    batch_invariant: bool
    kernels: str

    @property
    def shape(self) -> config.ConvShape:
        """The key under which the configuration of this call is looked up."""
        n, c, h, w = self.x.shape
        k, _, r, s = self.weight.shape
        short_c, short_h, short_w = (0, 0, 0) if self.short_x is None else self.short_x.shape[1:]
        return config.ConvShape(
            n, c, h, w, k, r, s, as_tuple(self.stride), as_tuple(self.padding), as_tuple(self.dilation),
            str(self.x.dtype).removeprefix("torch."), conv_precision(self.x.dtype), self.residual is not None,
            short_c, short_h, short_w, as_tuple(self.short_stride),
        )  # fmt: skip


NO_SHORTCUT: Any = (None, None, None, None, None, None, 0.0, (1, 1))
"""What stands for the shortcut's arguments, from `short_x` to `short_stride`, where there is none."""


def conv_result(*args: Any) -> Result:
    call = ConvCall(*args)
    x, weight = call.x, call.weight
    check_rank("x", x, 4, "(N, C, H, W)")
    check_rank("weight", weight, 4, "(K, C, R, S)")
    k, c, r, s = weight.shape
    for name, t in (("running_mean", call.mean), ("running_var", call.var)):
        if t is None:  # which a schema's Tensor may be in Python
            raise TypeError(f"{name} is None, expected ({k},): inference normalises with running statistics")
    per_channel = {
        "running_mean": call.mean, "running_var": call.var, "bn_weight": call.gamma, "bn_bias": call.beta,
        "shortcut_mean": call.short_mean, "shortcut_var": call.short_var,
        "shortcut_bn_weight": call.short_gamma, "shortcut_bn_bias": call.short_beta,
    }  # fmt: skip
    whole = {"residual": call.residual, "shortcut_x": call.short_x, "shortcut_weight": call.short_weight}
    check_tensors(x, weight=weight, **per_channel, **whole)
    if call.groups < 1 or k % call.groups or x.shape[1] != c * call.groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, expected {c * call.groups} for weight {tuple(weight.shape)} "
            f"and groups={call.groups}"
        )
    for name, t in per_channel.items():
        if t is not None and t.shape != (k,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({k},) for weight {tuple(weight.shape)}")
    p, q = window("x", x, [r, s], call.stride, call.padding, call.dilation)
    shape = (x.shape[0], k, p, q)
    if call.residual is not None and call.residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(call.residual.shape)}, expected the output's {shape}")
    if call.short_x is not None and call.residual is not None:
        raise ValueError("residual and shortcut_x are both given, expected at most one of them")
    parts = (call.short_x, call.short_weight, call.short_mean, call.short_var)
    if len({part is None for part in parts}) > 1:
        raise ValueError("shortcut_x, its weight, mean and var belong together, expected all of them or none")
    if call.short_x is not None:
        rows, columns = window("shortcut_x", call.short_x, [1, 1], call.short_stride, [0, 0], [1, 1])
        given = (call.short_x.shape[0], call.short_weight.shape[0], rows, columns)
        if given != shape or call.short_weight.shape[1:] != (call.short_x.shape[1], 1, 1):
            raise ValueError(f"shortcut by weight {tuple(call.short_weight.shape)} gives {given}, expected {shape}")
    return Result(shape, x.dtype)


def _conv_obstacle(shape: Shape, *args: Any) -> str | None:
    call = ConvCall(*args)
    check_same_dtype(call.x, weight=call.weight)
    if call.groups != 1:
        return "grouped convolution"
    return mixed_dtypes(call.x, call.residual, call.short_x, call.short_weight) or too_large(
        shape, call.x, call.padding[1]
    )


def plan_conv(out: Tensor, *args: Any, descriptors: bool = True) -> tuple[Launch, ...]:
    call = ConvCall(*args)

    def dense(t: Any) -> Any:
        return at_aligned(channels_last(t)) if call.batch_invariant else channels_last(t)

    x, weight, residual = dense(call.x), dense(call.weight), dense(call.residual)
    shortcut = None
    if call.short_x is not None:
        norm = batch_norm(call.short_mean, call.short_var, call.short_gamma, call.short_beta, call.short_eps)
        images, filters = dense(call.short_x), dense(call.short_weight)
        shortcut = Shortcut(images, filters, norm, as_tuple(call.short_stride))
    shape = call.shape
    c, own = _config(call, descriptors and aligned(x, weight, residual, *(shortcut[:2] if shortcut else ())))
    workspace = arrivals = None
    if c.split_k > 1:
        shared = config.tiles(c, shape)
        workspace = x.new_empty(shared * c.split_k * c.block_m * c.block_k, dtype=torch.float32)
        arrivals = _arrivals(x.device, shared)
    launch = conv_bn_relu_launch(
        out=out, x=x, weight=weight,
        batch_norm=batch_norm(call.mean, call.var, call.gamma, call.beta, call.eps),
        residual=residual, shortcut=shortcut,
        stride=shape.stride, padding=shape.padding, dilation=shape.dilation, relu=call.relu, precision=shape.precision,
        flat=config.is_flat(shape.c), box=c.box, swap=c.swap,
        early_residual=c.early_residual, block_m=c.block_m, block_k=c.block_k, block_c=c.block_c,
        split_k=c.split_k, workspace=workspace, arrivals=arrivals, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return (launch if own else replace(launch, own=False),)


def _config(call: ConvCall, descriptors: bool) -> tuple[config.ConvConfig, bool]:
    """The configuration of a call, and whether it is this project's own choice."""
    shape, facts = call.shape, device.facts(call.x.device)
    if call.batch_invariant:
        return config.invariant(shape, facts), True
    chosen = config.lookup(shape, facts, descriptors=descriptors)
    return chosen, chosen == config.conv_heuristic(shape, facts, descriptors=descriptors)


_counters: dict[tuple[torch.device, int], Tensor] = {}
graph_counters: ContextVar[Tensor | None] = ContextVar("graph_counters", default=None)
"""Zeros (int32) for the launches of the graph being captured: zeroed inside, every replay would zero them again."""


def _arrivals(where: torch.device, tiles: int) -> Tensor:
    """Zeroed counters for launches that follow each other, on a stream or in a graph, and leave them at zero."""
    stream = 0
    if where.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: counters of its own
            prepared = graph_counters.get()
            if prepared is not None and prepared.numel() >= tiles:
                return prepared
            return torch.zeros(tiles, dtype=torch.int32, device=where)
        stream = torch.cuda.current_stream(where).cuda_stream
    counters = _counters.get((where, stream))
    if counters is None or counters.numel() < tiles:
        counters = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=where)
        _counters[where, stream] = counters
    return counters


def batch_norm(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> BatchNorm:
    mean, var = mean.contiguous(), var.contiguous()
    return BatchNorm(mean, var, contiguous(gamma), contiguous(beta), eps)


def _torch_conv_bn_relu(*args: Any) -> Tensor:
    call = ConvCall(*args)
    residual = call.residual
    if call.short_x is not None:
        residual = reference.conv_bn_relu(
            call.short_x, call.short_weight, call.short_mean, call.short_var, call.short_gamma, call.short_beta,
            call.short_eps, stride=as_tuple(call.short_stride), relu=False,
        )  # fmt: skip
    y = reference.conv_bn_relu(
        *call[:7], stride=as_tuple(call.stride), padding=as_tuple(call.padding), dilation=as_tuple(call.dilation),
        groups=call.groups, residual=residual, relu=call.relu,
    )  # fmt: skip
    return channels_last(y)


register(
    Operator(
        "conv_bn_relu",
        conv_result,
        _conv_obstacle,
        plan_conv,
        _torch_conv_bn_relu,
        batched=(0, 11, 12),
        plan_again=partial(plan_conv, descriptors=False),
    ),
    "(Tensor x, Tensor weight, Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? residual, Tensor? shortcut_x, "
    "Tensor? shortcut_weight, Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? shortcut_bn_weight, "
    "Tensor? shortcut_bn_bias, float shortcut_eps, int[2] shortcut_stride, bool relu, "
    "bool batch_invariant, str kernels) -> Tensor",
    autocast=True,
)
