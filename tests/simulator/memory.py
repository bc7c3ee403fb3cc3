"""Where bytes lie: boxes of tensor maps in memory, swizzles, and the operands of wgmma in shared memory."""

import functools
import math
from typing import Any

import numpy as np

from .arithmetic import Array, from_bf16, to_tf32
from .judge import Memory
from .ptx import Unknown

SHARED = 1024
"""Shared address of a program's own memory: the first 1024 bytes are the system's on sm_90."""
SHARED_BYTES = 232448
"""The most that a program may use."""
REGION_BITS = 36
"""Each tensor's storage has 2^36 global addresses to itself, so what runs out of one is in no other."""


class TensorMap:
    """A TMA descriptor as Triton's launcher makes it of a TensorDescriptor: a box is no wider than its swizzle."""

    def __init__(self, memory: Memory, start: int, descriptor: Any) -> None:
        self.memory, self.start, self.size = memory, start, descriptor.base.element_size()
        self.shape, self.strides, block = descriptor.shape, descriptor.strides, list(descriptor.block_shape)
        if hasattr(descriptor, "layout"):
            self.swizzle = descriptor.layout.swizzle_byte_width
        else:  # as Triton lays out a block on which nothing else decides
            wide = [width for width in (128, 64, 32) if block[-1] * self.size % width == 0]
            self.swizzle = wide[0] if wide and math.prod(block[:-1]) >= 8 else 0
        self.box = [*block[:-1], min(block[-1], (self.swizzle or 128) // self.size)]
        self.bytes = math.prod(self.box) * self.size
        self.chunk = min(16, self.box[-1] * self.size)
        self.rounds = getattr(descriptor, "round_f32_to_tf32", False)
        if getattr(descriptor, "padding", "zero") != "zero":
            raise Unknown("a tensor map that pads with NaN")

    def place(self, coordinates: list[int]) -> tuple[Array, Array]:
        """The first byte in memory of each element of the box, and whether the tensor has it."""
        where, inside = np.zeros(1, np.int64), np.ones(1, bool)
        for at, extent, size, stride in zip(coordinates, self.box, self.shape, self.strides, strict=True):
            index = np.arange(at, at + extent)
            where = (where[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & (index >= 0) & (index < size)).reshape(-1)
        return self.start + where * self.size, inside

    def load(self, shared: Array, start: int, places: Array, inside: Array) -> None:
        """Copy a box into shared memory, zeros for what the tensor does not have."""
        data = np.zeros((len(places), self.size), np.uint8)
        data[inside] = self.memory.bytes[places[inside, None] + np.arange(self.size)]
        if self.rounds:
            data = to_tf32(data.view(np.uint32)).view(np.uint8)
        shared[self._chunks(start)] = data.reshape(-1, self.chunk)

    def store(self, shared: Array, start: int, places: Array, inside: Array) -> None:
        if self.rounds:
            raise Unknown("a store by a tensor map that rounds to TF32")
        data = shared[self._chunks(start)].reshape(-1, self.size)
        self.memory.bytes[places[inside, None] + np.arange(self.size)] = data[inside]

    def _chunks(self, start: int) -> Array:
        """Shared addresses of the box's bytes, in its order."""
        return swizzled(start + np.arange(0, self.bytes, self.chunk), self.swizzle)[:, None] + np.arange(self.chunk)


def swizzled(addresses: Array, width: int) -> Array:
    """Shared addresses as a swizzle of 128, 64 or 32 bytes (0: none) permutes them."""
    return addresses ^ (addresses >> 7 & {128: 7, 64: 3, 32: 1, 0: 0}[width]) << 4


@functools.lru_cache(maxsize=4096)
def operand(descriptor: int, rows: int, size: int, mn_major: bool) -> Array:
    """Shared addresses of a wgmma operand's elements, [rows of M or N, 32 bytes of K], by its descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = (0, 128, 64, 32)[descriptor >> 62]
    if descriptor & ~(3 << 62 | 0x3FFF3FFF3FFF) or not width or (mn_major and size != 2):
        raise Unknown(f"wgmma descriptor {descriptor:#x} of {size}-byte elements: a base offset, or no swizzle")
    m, k = np.arange(rows)[:, None], np.arange(32 // size)
    if mn_major:
        at = m // (width // 2) * leading + m % (width // 2) * 2 + k // 8 * stride + k % 8 * width
    else:
        at = m // 8 * stride + m % 8 * width + k * size
    return swizzled(start + at, width)


def numbers(words: Array, kind: str) -> Array:
    """fp32 values of words that hold one each."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return from_bf16(words) if kind == "bf16" else words.view(np.float16).astype(np.float32)


def words_of(kind: str) -> tuple[int, Any]:
    """Size and dtype of the words that hold values of a kind."""
    return (4, np.uint32) if kind == "tf32" else (2, np.uint16)
