"""A ResNet's stem: 7x7/2 convolution + batch norm + ReLU + 3x3/2 max pool, from images of floats or of bytes."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import config
from ..config import device
from . import reference
from .checks import channels_last, check_rank, too_large
from .conv import NO_SHORTCUT, ConvCall, batch_norm, conv_result, plan_conv
from .dispatch import HAS_TRITON
from .pool import plan_max_pool
from .registry import Operator, Result, Shape, register

if HAS_TRITON:
    from ..kernels.launch import Launch
    from ..kernels.stem import pack, packed_shape
    from ..kernels.stem import stem as stem_launch

CONV = ([2, 2], [3, 3], [1, 1])
"""Stride, padding and dilation of the stem's convolution."""
POOL = ([3, 3], [2, 2], [1, 1])
"""Window, stride and padding of its pool."""


class StemCall(NamedTuple):
    """The arguments of `resnet_triton::stem`, in the order of its schema."""

    x: Tensor
    weight: Tensor
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    pixel_mean: list[float] | None
    pixel_std: list[float] | None
    batch_invariant: bool
    kernels: str

    def convolution(self, x: Tensor) -> ConvCall:
        """The convolution alone, of images in the filters' dtype."""
        arguments: tuple[Any, ...] = (x, *self[1:7], *CONV, 1, None, *NO_SHORTCUT, True, *self[-2:])
        return ConvCall(*arguments)


def _stem_result(*args: Any) -> Result:
    call = StemCall(*args)
    x, weight = call.x, call.weight
    check_rank("x", x, 4, "(N, C, H, W)")
    given = (call.pixel_mean is not None, call.pixel_std is not None)
    if given != (x.dtype == torch.uint8,) * 2:
        raise TypeError(
            f"x has dtype {x.dtype}, expected torch.uint8 with pixel_mean and pixel_std, else floating point"
        )
    for name, t in (("pixel_mean", call.pixel_mean), ("pixel_std", call.pixel_std)):
        if t is not None and len(t) != x.shape[1]:
            raise ValueError(f"{name} has {len(t)} values, expected {x.shape[1]} like x's channels")
    if weight.dim() == 4 and tuple(weight.shape[2:]) != (7, 7):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (K, C, 7, 7)")
    images = x.new_empty((), dtype=weight.dtype).expand(x.shape) if x.dtype == torch.uint8 else x  # for its shape only
    n, k, p, q = conv_result(*call.convolution(images)).shape
    return Result((n, k, (p - 1) // 2 + 1, (q - 1) // 2 + 1), weight.dtype)


def _stem_obstacle(shape: Shape, *args: Any) -> str | None:
    call = StemCall(*args)
    p, q = ((edge - 1) // 2 + 1 for edge in call.x.shape[2:])
    return too_large((shape[0], shape[1], p, q), call.x, CONV[1][1])


def _plan_stem(out: Tensor, *args: Any) -> tuple[Launch, ...]:
    call = StemCall(*args)
    x, weight = call.x, channels_last(call.weight)
    n, c, h, w = x.shape
    tile = _tile(call, out.shape)
    if tile is None or c > 4 or weight.dtype not in (torch.float16, torch.bfloat16) or not _windows_work(x.device):
        return _plan_two_layers(out, call)
    packed, marks = _scratch(n, h, w, weight.dtype, x.device)
    return (
        pack(out=packed, marks=marks, x=x, mean=call.pixel_mean, std=call.pixel_std, block=128, num_warps=4),
        stem_launch(
            out=out, packed=packed, marks=marks, weight=weight,
            batch_norm=batch_norm(call.mean, call.var, call.gamma, call.beta, call.eps),
            block_q=tile.block_q, block_k=tile.block_k, strip=tile.strip,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip


def _tile(call: StemCall, shape: Shape) -> config.StemConfig | None:
    facts = device.facts(call.x.device)
    if call.batch_invariant:
        return config.invariant_stem(*shape[1:], facts)
    return config.stem_heuristic(*shape, facts)


def _scratch(n: int, h: int, w: int, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
    """What `pack` fills: blocks of pixels, and a mark for each row of them."""
    packed = torch.empty(packed_shape(n, h, w), dtype=dtype, device=where)
    return packed, torch.empty(packed.shape[:2], dtype=torch.int32, device=where)


_windows: dict[torch.device, bool] = {}


def _windows_work(where: torch.device) -> bool:
    """Whether the driver takes a tensor map whose windows overlap. Its documentation does not promise that it does."""
    if where.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _windows.get(where, True)
    if where not in _windows:
        try:
            _try_windows(where)
            _windows[where] = True
        except RuntimeError as error:
            _windows[where] = False
            warnings.warn(f"the stem takes two launches, the fused one failed: {error}", RuntimeWarning, stacklevel=2)
    return _windows[where]


def _try_windows(where: torch.device) -> None:
    """Launch the fused stem on eight pixels of zeros; RuntimeError from the driver if it refuses."""
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float16, device=where)
    weight = channels_last(torch.zeros(64, 3, 7, 7, dtype=torch.float16, device=where))
    out = channels_last(torch.empty(1, 64, 2, 2, dtype=torch.float16, device=where))
    ones = torch.ones(64, device=where)
    packed, marks = _scratch(1, 8, 8, x.dtype, where)
    with torch.cuda.device(where):
        pack(out=packed, marks=marks, x=x, mean=None, std=None, block=128, num_warps=4).run()
        stem_launch(
            out=out, packed=packed, marks=marks, weight=weight, batch_norm=batch_norm(ones, ones, None, None, 0.0),
            block_q=64, block_k=64, strip=2, num_warps=4, num_stages=2,
        ).run()  # fmt: skip


def _plan_two_layers(out: Tensor, call: StemCall) -> tuple[Launch, ...]:
    """Convolution, then pool: fp32, five channels and more, GPUs or drivers that the fused kernel does not suit."""
    convolution = call.convolution(_images(call))
    shape, dtype, memory = conv_result(*convolution)
    between = torch.empty(shape, dtype=dtype, device=out.device, memory_format=memory)
    return *plan_conv(between, *convolution), *plan_max_pool(out, between, *POOL, call.kernels)


def _images(call: StemCall) -> Tensor:
    if call.pixel_mean is None or call.pixel_std is None:
        return call.x.to(call.weight.dtype)
    return reference.normalize(call.x, call.pixel_mean, call.pixel_std).to(call.weight.dtype)


def _torch_stem(*args: Any) -> Tensor:
    call = StemCall(*args)
    return channels_last(reference.stem(_images(call), *call[1:7]))


register(
    Operator("stem", _stem_result, _stem_obstacle, _plan_stem, _torch_stem, batched=(0,)),
    "(Tensor x, Tensor weight, Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, "
    "float[]? pixel_mean, float[]? pixel_std, bool batch_invariant, str kernels) -> Tensor",
    autocast=True,
)
