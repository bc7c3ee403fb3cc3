"""Where bytes lie: tensors in global memory, boxes of tensor maps, operands of wgmma in shared memory."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from .arithmetic import Array, from_bf16
from .ptx import Unknown

SHARED = 1024
"""Shared address of a program's own memory: the first 1024 bytes are the system's on sm_90."""
REGION_BITS = 40
"""Each tensor's storage has 2^40 global addresses to itself, so what runs out of one is in no other."""


class Region:
    """The storage of one or more of a launch's tensors, as bytes; where none of them has an element, it has a gap."""

    def __init__(self, storage: torch.UntypedStorage, index: int) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.base = (index + 1) << REGION_BITS
        self.covered = np.zeros(len(self.bytes), bool)
        self.names: list[str] = []
        self.unit = 8
        """Bytes of the narrowest element: what races are judged by."""

    def cover(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.names.append(name)
        self.unit = min(self.unit, size)
        elements = torch.zeros(len(self.bytes) // size, dtype=torch.bool)
        elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.covered[: len(elements) * size] |= elements.numpy().repeat(size)

    @property
    def name(self) -> str:
        return " = ".join(self.names)


class Global:
    """The tensors of a launch by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._of: dict[int, int] = {}

    def address(self, name: str, tensor: torch.Tensor) -> int:
        """Of a tensor's first element; its region is made if it is the first in its storage."""
        storage = tensor.untyped_storage()
        index = self._of.setdefault(storage.data_ptr(), len(self.regions))
        if index == len(self.regions):
            self.regions.append(Region(storage, index))
        self.regions[index].cover(name, tensor)
        return self.regions[index].base + tensor.storage_offset() * tensor.element_size()

    def region(self, addresses: Array) -> tuple[Region, Array] | None:
        """The one region of some addresses, and their places in it (which may be outside); None if there is none."""
        index = int(addresses[0] >> np.uint64(REGION_BITS)) - 1
        if not 0 <= index < len(self.regions):
            return None
        region = self.regions[index]
        return region, addresses.astype(np.int64) - region.base


class TensorMap:
    """A TMA descriptor as Triton's launcher makes it of a TensorDescriptor: the box's rows are no wider than a swizzle."""

    def __init__(self, region: Region, start: int, descriptor: Any) -> None:
        self.region, self.start = region, start
        self.size = descriptor.base.element_size()
        self.shape, self.strides = list(descriptor.shape), list(descriptor.strides)
        block = list(descriptor.block_shape)
        layout = getattr(descriptor, "layout", None)
        row = block[-1] * self.size
        if layout is not None:
            self.swizzle = layout.swizzle_byte_width
        else:  # as Triton lays out a block that nothing else decides on
            fits = [width for width in (128, 64, 32) if row % width == 0 and int(np.prod(block[:-1])) >= 8]
            self.swizzle = fits[0] if fits else 0
        self.box = [*block[:-1], min(block[-1], (self.swizzle or 128) // self.size)]
        if getattr(descriptor, "padding", "zero") != "zero":
            raise Unknown(f"a tensor map with padding {descriptor.padding}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.size

    def place(self, coordinates: tuple[int, ...]) -> tuple[Array, Array]:
        """The first byte in the region of each element of the box, flat, and whether the tensor has it."""
        where, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for at, extent, size, stride in zip(coordinates, self.box, self.shape, self.strides, strict=True):
            index = np.arange(at, at + extent)
            where = (where[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & ((index >= 0) & (index < size))).reshape(-1)
        return self.start + where * self.size, inside

    @functools.cached_property
    def chunks(self) -> Array:
        """Of each 16 bytes of the box (or less, if its rows are shorter) their place in shared memory, unswizzled."""
        return np.arange(0, self.bytes, min(16, self.box[-1] * self.size))


def swizzled(addresses: Array, width: int) -> Array:
    """Shared addresses as a swizzle of 128, 64 or 32 bytes (0: none) permutes them."""
    mask = {128: 7, 64: 3, 32: 1, 0: 0}[width]
    return addresses ^ (addresses >> 7 & mask) << 4


SWIZZLES = (0, 128, 64, 32)
"""By the upper two bits of a wgmma descriptor."""


@functools.lru_cache(maxsize=4096)
def operand(descriptor: int, rows: int, size: int, mn_major: bool) -> Array:
    """Shared addresses of a wgmma operand's elements, [rows of M or N, 32 bytes of K], by its descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (
        descriptor >> 49 & 7
        or descriptor >> 52 & 0x3FF
        or descriptor >> 14 & 3
        or descriptor >> 30 & 3
        or descriptor >> 46 & 7
    ):
        raise Unknown(f"wgmma descriptor {descriptor:#x} has a base offset or bits that mean nothing")
    width = SWIZZLES[descriptor >> 62]
    m, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    if not mn_major and width:
        at = m // 8 * stride + m % 8 * width + k * size
    elif not mn_major:
        at = m // 8 * stride + m % 8 * 16 + k * size // 16 * leading + k * size % 16
    elif size != 2:
        raise Unknown(f"an operand of {size}-byte elements that is not K-major")
    elif width:
        at = m // (width // 2) * leading + m % (width // 2) * 2 + k // 8 * stride + k % 8 * width
    else:
        at = m // 8 * stride + m % 8 * 2 + k // 8 * leading + k % 8 * 16
    return swizzled(start + at, width)


def numbers(raw: Array, kind: str) -> Array:
    """Values in fp32 of bytes [..., size]."""
    if kind == "f16":
        return raw.view(np.float16)[..., 0].astype(np.float32)
    if kind == "bf16":
        return from_bf16(raw.view(np.uint16)[..., 0])
    if kind == "tf32":
        return (raw.view(np.uint32)[..., 0] & np.uint32(0xFFFFE000)).view(np.float32)
    raise Unknown(f"products of {kind}")
