"""What the operators share: checks with one-line errors, and tensors as the kernels want them."""

from __future__ import annotations

from math import isfinite
from operator import index

import torch
from torch import Tensor

from ..kernels.values import BatchNorm, Geometry, Size
from .operation import Shape

IntOrPair = int | tuple[int, int]
_INTS = [int, int]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def in_channels_last(x: Tensor) -> Tensor:
    """A result of PyTorch's in channels_last memory, except within vmap, where a tensor has no memory format."""
    return x if torch._C._functorch.peek_interpreter_stack() is not None else channels_last(x)


def at_aligned(x: Tensor) -> Tensor:
    """`x`, copied if its address is not a multiple of 16 bytes: by that Triton chooses loads, and from them layouts."""
    return x if aligned(x) else x.clone()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def aligned(*tensors: Tensor | None) -> bool:
    beside = [t.data_ptr() % 16 for t in tensors if t is not None]
    return not any(beside)


def check_rank(name: str, size: Size, rank: int, meaning: str) -> None:
    if len(size) != rank:
        raise ValueError(f"{name} has shape {tuple(size)}, expected {rank} dimensions {meaning}")


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """That x and the others are of floating dtypes and on one device."""
    device = x.device
    for name, t in {"x": x, **others}.items():
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"x is on {device}, {name} on {t.device}; expected one device")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point dtype")


def check_vectors(x: Tensor, weight: Tensor, batch_norm: BatchNorm, prefix: str = "") -> None:
    """That batch norm goes with the filters of `weight` (K, ...); names in errors start with `prefix`."""
    device, shape = x.device, weight.shape[:1]
    mean, var, bn_weight, bn_bias, eps = batch_norm
    if eps < 0:
        raise ValueError(f"{prefix}eps={eps}, expected at least 0")
    for t in (mean, var, bn_weight, bn_bias):
        if t is None or t.device != device or t.shape != shape or not t.dtype.is_floating_point:
            break
    else:
        return
    for name, t in zip(BatchNorm._fields, (mean, var, bn_weight, bn_bias), strict=False):
        if t is not None:
            check_tensors(x, **{prefix + name: t})
            if t.shape != shape:
                expected = f"{tuple(shape)} for weight {tuple(weight.shape)}"
                raise ValueError(f"{prefix}{name} has shape {tuple(t.shape)}, expected {expected}")
        elif name.startswith("running"):  # which a schema's Tensor may be in Python
            raise TypeError(
                f"{prefix}{name} is None, expected {tuple(shape)}: inference normalises with running statistics"
            )


def check_pixels(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """That bytes of so many channels can be normalised with these: ValueError."""
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, expected {channels}, one for each channel")
    if not all(map(isfinite, (*mean, *std))) or min(std, default=1.0) <= 0:
        raise ValueError(f"pixel_mean={mean}, pixel_std={std}, expected finite numbers and standard deviations above 0")


def check_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"x has dtype {x.dtype}, {name} {t.dtype}; expected one dtype")


def window(name: str, x: Size, size: tuple[int, int], geometry: Geometry, ceil_mode: bool = False) -> tuple[int, int]:
    """Output rows and columns of a sliding window; ValueError where it does not fit.

    With `ceil_mode` a last one may reach over the end, if it starts before it: not in the padding behind.
    """
    (r, s), ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _) = size, geometry
    positive = r > 0 and s > 0 and stride_h > 0 and stride_w > 0 and dilation_h > 0 and dilation_w > 0
    if not positive or pad_h < 0 or pad_w < 0:
        raise ValueError(
            f"kernel_size is {size}, stride {geometry.stride}, padding {geometry.padding}, dilation "
            f"{geometry.dilation}; expected positive numbers (padding may be 0)"
        )
    _, c, h, w = x
    rows, columns = dilation_h * (r - 1) + 1, dilation_w * (s - 1) + 1
    spare_h, spare_w = h + 2 * pad_h - rows, w + 2 * pad_w - columns
    over_h, over_w = (stride_h - 1, stride_w - 1) if ceil_mode else (0, 0)
    p, q = (spare_h + over_h) // stride_h + 1, (spare_w + over_w) // stride_w + 1
    if ceil_mode and (p - 1) * stride_h >= h + pad_h:
        p -= 1
    if ceil_mode and (q - 1) * stride_w >= w + pad_w:
        q -= 1
    if p < 1 or q < 1 or c == 0 or h == 0 or w == 0:
        least = rows - over_h, columns - over_w
        raise ValueError(f"{name} has shape {tuple(x)}, expected at least {least} pixels with padding")
    return p, q


def too_large(shape: Shape, x: Tensor, padding: int, taps: int = 0) -> str | None:
    """Kernels count pixels, elements within one image row, and the `taps` of filters, in int32; all else in int64."""
    n, k, p, q = shape
    _, c, h, w = x.shape
    pixels, row = max(n * p * q, h * w), max((w + 2 * padding) * c, q * k)
    if max(pixels, row, taps) < 2**31 - 2**10:
        return None
    return f"{pixels} pixels, {row} elements a row or {taps} taps exceed int32"


def pair(value: IntOrPair, name: str = "value") -> tuple[int, int]:
    """An int twice, or a pair as it is. TypeError or ValueError for anything else, naming it `name`."""
    if isinstance(value, tuple) and list(map(type, value)) == _INTS:
        return value  # quickly, for so nn.Conv2d has it
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}={value!r}, expected an int or a pair of ints")
    if len(value) != 2:
        raise ValueError(f"{name}={value!r}, expected an int or a pair of ints")
    try:
        return index(value[0]), index(value[1])
    except TypeError:
        raise TypeError(f"{name}={value!r}, expected an int or a pair of ints") from None
