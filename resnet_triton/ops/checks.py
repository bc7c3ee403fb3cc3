"""What the operators share: checks with one-line errors, and tensors as the kernels want them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import Shape


def as_tuple(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def channels_last(x: Any) -> Any:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def at_aligned(x: Any) -> Any:
    """`x`, copied if its address is not a multiple of 16 bytes: by that Triton chooses loads, and from them layouts."""
    return x if aligned(x) else x.clone()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def check_rank(name: str, x: Tensor, rank: int, meaning: str) -> None:
    if x.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {rank} dimensions {meaning}")


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    for name, t in {"x": x, **others}.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, expected {x.device} like x")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point dtype")


def check_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, expected {x.dtype} like x")


def window(
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


def too_large(shape: Shape, x: Tensor, padding: int) -> str | None:
    """Kernels count pixels, and elements within one image row, in int32; everything else in int64."""
    pixels = max(shape[0] * shape[2] * shape[3], x.shape[2] * x.shape[3])
    row = (x.shape[3] + 2 * padding) * x.shape[1]
    return f"{pixels} pixels, {row} elements a row exceed int32" if max(pixels, row) >= 2**31 - 2**10 else None
