"""The operators.

Each is four functions in a row and a schema: its result's shape and dtype (here calls are validated), what keeps it off
our kernels, the launches planned for it, and its PyTorch form. `registry.register` makes an operator of them.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import config, device, reference
from .dispatch import HAS_TRITON, mixed_dtypes
from .precision import conv_precision, matmul_precision
from .registry import OPERATORS, Operator, Result, Shape, call, register

__all__ = ["OPERATORS", "ConvCall", "call"]

if HAS_TRITON:
    from .kernels.add_relu import add_relu as add_relu_launch
    from .kernels.conv_bn_relu import BatchNorm, Shortcut
    from .kernels.conv_bn_relu import conv_bn_relu as conv_bn_relu_launch
    from .kernels.global_avg_pool import global_avg_pool as global_avg_pool_launch
    from .kernels.launch import Launch, next_power_of_2
    from .kernels.linear import linear as linear_launch
    from .kernels.max_pool import max_pool as max_pool_launch

# --- shared by the operators -----------------------------------------------------------------------------------------


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {rank} dimensions {meaning}")


def _check_tensors(x: Tensor, **others: Tensor | None) -> None:
    for name, t in {"x": x, **others}.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, expected {x.device} like x")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point dtype")


def _check_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {x.dtype} like x")


def _window(
    name: str, x: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Output rows and columns of a sliding window; ValueError where it does not fit."""
    if min(size) < 1 or min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        raise ValueError(
            f"kernel_size is {tuple(size)}, stride {tuple(stride)}, padding {tuple(padding)}, dilation "
            f"{tuple(dilation)}; expected positive numbers (padding may be 0)"
        )
    span = [d * (f - 1) + 1 for f, d in zip(size, dilation, strict=True)]
    padded = [extent + 2 * p for extent, p in zip(x.shape[2:], padding, strict=True)]
    if any(a < b for a, b in zip(padded, span, strict=True)) or 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected at least {tuple(span)} pixels with padding")
    return [(a - b) // s + 1 for a, b, s in zip(padded, span, stride, strict=True)]


def _too_large(shape: Shape, x: Tensor, padding: int) -> str | None:
    """Kernels count pixels, and elements within one image row, in int32; everything else in int64."""
    pixels = max(shape[0] * shape[2] * shape[3], x.shape[2] * x.shape[3])
    row = (x.shape[3] + 2 * padding) * x.shape[1]
    return f"{pixels} pixels, {row} elements a row exceed int32" if max(pixels, row) >= 2**31 - 2**10 else None


# --- convolution + batch norm [+ residual | + shortcut] [+ ReLU] -----------------------------------------------------


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
    kernels: str

    @property
    def shape(self) -> config.ConvShape:
        """The key under which the configuration of this call is looked up."""
        n, c, h, w = self.x.shape
        k, _, r, s = self.weight.shape
        short_c, short_w = (0, 0) if self.short_x is None else (self.short_x.shape[1], self.short_x.shape[3])
        return config.ConvShape(
            n, c, h, w, k, r, s, _pair(self.stride), _pair(self.padding), _pair(self.dilation),
            str(self.x.dtype).removeprefix("torch."), conv_precision(self.x.dtype), self.residual is not None,
            short_c, short_w, _pair(self.short_stride),
        )  # fmt: skip


def _conv_result(*args: Any) -> Result:
    call = ConvCall(*args)
    x, weight = call.x, call.weight
    _check_rank("x", x, 4, "(N, C, H, W)")
    _check_rank("weight", weight, 4, "(K, C, R, S)")
    k, c, r, s = weight.shape
    per_channel = {
        "running_mean": call.mean, "running_var": call.var, "bn_weight": call.gamma, "bn_bias": call.beta,
        "shortcut_mean": call.short_mean, "shortcut_var": call.short_var,
        "shortcut_bn_weight": call.short_gamma, "shortcut_bn_bias": call.short_beta,
    }  # fmt: skip
    whole = {"residual": call.residual, "shortcut_x": call.short_x, "shortcut_weight": call.short_weight}
    _check_tensors(x, weight=weight, **per_channel, **whole)
    if call.groups < 1 or k % call.groups or x.shape[1] != c * call.groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, expected {c * call.groups} for weight {tuple(weight.shape)} "
            f"and groups={call.groups}"
        )
    for name, t in per_channel.items():
        if t is not None and t.shape != (k,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({k},) for weight {tuple(weight.shape)}")
    p, q = _window("x", x, [r, s], call.stride, call.padding, call.dilation)
    shape = (x.shape[0], k, p, q)
    if call.residual is not None and call.residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(call.residual.shape)}, expected the output's {shape}")
    if call.short_x is not None and call.short_weight is not None:
        rows, columns = _window("shortcut_x", call.short_x, [1, 1], call.short_stride, [0, 0], [1, 1])
        given = (call.short_x.shape[0], call.short_weight.shape[0], rows, columns)
        if given != shape or call.short_weight.shape[1:] != (call.short_x.shape[1], 1, 1):
            raise ValueError(f"shortcut by weight {tuple(call.short_weight.shape)} gives {given}, expected {shape}")
    return Result(shape, x.dtype)


def _conv_obstacle(shape: Shape, *args: Any) -> str | None:
    call = ConvCall(*args)
    _check_same_dtype(call.x, weight=call.weight)
    if call.groups != 1:
        return "grouped convolution"
    return mixed_dtypes(call.x, call.residual, call.short_x, call.short_weight) or _too_large(
        shape, call.x, call.padding[1]
    )


def _plan_conv(out: Tensor, *args: Any) -> tuple[Launch, ...]:
    call = ConvCall(*args)
    x, weight = _channels_last(call.x), _channels_last(call.weight)
    residual = None if call.residual is None else _channels_last(call.residual)
    shortcut = None
    if call.short_x is not None:
        norm = _norm(call.short_mean, call.short_var, call.short_gamma, call.short_beta, call.short_eps)
        images, filters = _channels_last(call.short_x), _channels_last(call.short_weight)
        shortcut = Shortcut(images, filters, norm, _pair(call.short_stride))
    shape = call.shape
    aligned = _aligned(x, weight, residual, *(shortcut[:2] if shortcut else ()))
    c = config.lookup(shape, device.facts(x.device), descriptors=aligned)
    workspace = arrivals = None
    if c.split_k > 1:
        shared = config.tiles(c, shape)
        workspace = x.new_empty(shared * c.split_k * c.block_m * c.block_k, dtype=torch.float32)
        arrivals = _arrivals(x.device, shared)
    launch = conv_bn_relu_launch(
        out=out, x=x, weight=weight,
        batch_norm=_norm(call.mean, call.var, call.gamma, call.beta, call.eps),
        residual=residual, shortcut=shortcut,
        stride=shape.stride, padding=shape.padding, dilation=shape.dilation, relu=call.relu, precision=shape.precision,
        flat=config.is_flat(shape.c), box=c.box, block_m=c.block_m, block_k=c.block_k, block_c=c.block_c,
        split_k=c.split_k, workspace=workspace, arrivals=arrivals, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return (launch,)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrivals(where: torch.device, tiles: int) -> Tensor:
    """Zeroed counters for the launches of one stream, which follow each other and leave them at zero."""
    stream = 0
    if where.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: counters of its own
            return torch.zeros(tiles, dtype=torch.int32, device=where)
        stream = torch.cuda.current_stream(where).cuda_stream
    counters = _counters.get((where, stream))
    if counters is None or counters.numel() < tiles:
        counters = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=where)
        _counters[where, stream] = counters
    return counters


def _norm(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> BatchNorm:
    mean, var = mean.contiguous(), var.contiguous()
    return BatchNorm(mean, var, _contiguous(gamma), _contiguous(beta), eps)


def _torch_conv_bn_relu(*args: Any) -> Tensor:
    call = ConvCall(*args)
    residual = call.residual
    if call.short_x is not None:
        residual = reference.conv_bn_relu(
            call.short_x, call.short_weight, call.short_mean, call.short_var, call.short_gamma, call.short_beta,
            call.short_eps, stride=_pair(call.short_stride), relu=False,
        )  # fmt: skip
    y = reference.conv_bn_relu(
        *call[:7], stride=_pair(call.stride), padding=_pair(call.padding), dilation=_pair(call.dilation),
        groups=call.groups, residual=residual, relu=call.relu,
    )  # fmt: skip
    return _channels_last(y)


register(
    Operator("conv_bn_relu", _conv_result, _conv_obstacle, _plan_conv, _torch_conv_bn_relu),
    "(Tensor x, Tensor weight, Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? residual, Tensor? shortcut_x, "
    "Tensor? shortcut_weight, Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? shortcut_bn_weight, "
    "Tensor? shortcut_bn_bias, float shortcut_eps, int[2] shortcut_stride, bool relu, str kernels) -> Tensor",
    autocast=True,
)


# --- residual add + ReLU ---------------------------------------------------------------------------------------------


def _add_relu_result(x: Tensor, other: Tensor, kernels: str) -> Result:
    _check_rank("x", x, 4, "(N, C, H, W)")
    _check_tensors(x, other=other)
    if other.shape != x.shape:
        raise ValueError(f"other has shape {tuple(other.shape)}, expected x's {tuple(x.shape)}")
    return Result(tuple(x.shape), torch.promote_types(x.dtype, other.dtype))


def _add_relu_obstacle(shape: Shape, x: Tensor, other: Tensor, kernels: str) -> str | None:
    return mixed_dtypes(x, other)


def _plan_add_relu(out: Tensor, x: Tensor, other: Tensor, kernels: str) -> tuple[Launch, ...]:
    launch = add_relu_launch(out=out, x=_channels_last(x), other=_channels_last(other), block=1024, num_warps=4)
    return (launch,)


def _torch_add_relu(x: Tensor, other: Tensor, kernels: str) -> Tensor:
    return _channels_last(reference.add_relu(x, other))


register(
    Operator("add_relu", _add_relu_result, _add_relu_obstacle, _plan_add_relu, _torch_add_relu),
    "(Tensor x, Tensor other, str kernels) -> Tensor",
)


# --- max pool --------------------------------------------------------------------------------------------------------


def _max_pool_result(x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str) -> Result:
    _check_rank("x", x, 4, "(N, C, H, W)")
    _check_tensors(x)
    p, q = _window("x", x, size, stride, padding, [1, 1])
    if any(2 * pad > edge for pad, edge in zip(padding, size, strict=True)):
        raise ValueError(f"padding is {tuple(padding)}, expected at most half of kernel_size {tuple(size)}")
    return Result((x.shape[0], x.shape[1], p, q), x.dtype)


def _max_pool_obstacle(
    shape: Shape, x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str
) -> str | None:
    return _too_large(shape, x, padding[1])


def _plan_max_pool(
    out: Tensor, x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str
) -> tuple[Launch, ...]:
    block_c = min(next_power_of_2(x.shape[1]), 64)
    launch = max_pool_launch(
        out=out, x=_channels_last(x), kernel_size=_pair(size), stride=_pair(stride), padding=_pair(padding),
        block_m=2048 // block_c, block_c=block_c, num_warps=4,
    )  # fmt: skip
    return (launch,)


def _torch_max_pool(x: Tensor, size: list[int], stride: list[int], padding: list[int], kernels: str) -> Tensor:
    return _channels_last(reference.max_pool2d(x, _pair(size), _pair(stride), _pair(padding)))


register(
    Operator("max_pool2d", _max_pool_result, _max_pool_obstacle, _plan_max_pool, _torch_max_pool),
    "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, str kernels) -> Tensor",
)


# --- global average pool ---------------------------------------------------------------------------------------------


def _avg_pool_result(x: Tensor, kernels: str) -> Result:
    _check_rank("x", x, 4, "(N, C, H, W)")
    _check_tensors(x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least one channel and one pixel")
    return Result((x.shape[0], x.shape[1], 1, 1), x.dtype)


def _avg_pool_obstacle(shape: Shape, x: Tensor, kernels: str) -> str | None:
    return _too_large(shape, x, 0)


def _plan_avg_pool(out: Tensor, x: Tensor, kernels: str) -> tuple[Launch, ...]:
    block_c = min(next_power_of_2(x.shape[1]), 64)
    block_p = min(next_power_of_2(x.shape[2] * x.shape[3]), 64)
    launch = global_avg_pool_launch(out=out, x=_channels_last(x), block_p=block_p, block_c=block_c, num_warps=4)
    return (launch,)


def _torch_avg_pool(x: Tensor, kernels: str) -> Tensor:
    return _channels_last(reference.global_avg_pool(x))


register(
    Operator("global_avg_pool", _avg_pool_result, _avg_pool_obstacle, _plan_avg_pool, _torch_avg_pool),
    "(Tensor x, str kernels) -> Tensor",
)


# --- linear ----------------------------------------------------------------------------------------------------------


def _linear_result(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str) -> Result:
    _check_rank("weight", weight, 2, "(out_features, in_features)")
    _check_tensors(x, weight=weight, bias=bias)
    k, c = weight.shape
    if x.dim() < 1 or x.shape[-1] != c:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {c}) for weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({k},) for weight {tuple(weight.shape)}")
    return Result((*x.shape[:-1], k), x.dtype, torch.contiguous_format)


def _linear_obstacle(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str) -> str | None:
    _check_same_dtype(x, weight=weight, bias=bias)
    rows = prod(shape[:-1])
    if rows >= 2**31 - 2**10:
        return f"{rows} rows exceed int32"
    return "no input features" if weight.shape[1] == 0 else None


def _plan_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str) -> tuple[Launch, ...]:
    k, c = weight.shape
    rows = x.reshape(-1, c).contiguous()
    precision = matmul_precision(x.dtype)
    tile = config.linear_heuristic(rows.shape[0], k, x.element_size(), precision)
    launch = linear_launch(
        out=out.view(-1, k), x=rows, weight=weight.contiguous(), bias=_contiguous(bias),
        precision=precision, block_m=tile.block_m, block_k=tile.block_k, block_c=tile.block_c,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: str) -> Tensor:
    return reference.linear(x, weight, bias)


register(
    Operator("linear", _linear_result, _linear_obstacle, _plan_linear, _torch_linear),
    "(Tensor x, Tensor weight, Tensor? bias, str kernels) -> Tensor",
    autocast=True,
)
