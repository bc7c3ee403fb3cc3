"""How `hopper_stem` packs images: from rows of an image to windows of four pairs of pixels in a ring of slots.

A word is two values that are loaded or stored at once: two channels of a pixel or, in planes, one channel of a pair of
pixels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper import group_barrier, reinterpret

STAGES = gl.constexpr(6)
"""Slots of a ring. Two rings and what is on its way out fill an SM's shared memory."""

# A packer's threads over [32 = 8 (r % 4) + m, 4 pairs of a window]. Lanes: the pairs, bit 0 of m, r % 4. So
# stores of 16 bytes by eight lanes hit every bank of shared memory once, and a warp reads few pieces of an image row.
WINDOWS = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0]], warp_bases=[[2, 0], [4, 0]], block_bases=[],
    shape=[32, 4],
))  # fmt: skip


@gluon.jit
def work_item(item, TILES, STRIPS, STRIP):
    """An item's tile of 56 pooled columns, first pooled row and image."""
    return item % TILES, item // TILES % STRIPS * STRIP, item // (TILES * STRIPS)


@gluon.jit
def recompute_from(x):
    """Volatile: or else the compiler keeps all that depends on `x` alone, in registers that it does not have."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def word_pointer(x_ptr):
    """A pointer to words of two values."""
    BITS: gl.constexpr = 2 * x_ptr.dtype.element_ty.primitive_bitwidth
    if BITS == 16:
        pointer = x_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    elif BITS == 32:
        pointer = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    else:
        pointer = x_ptr.to(gl.pointer_type(gl.int64), bitcast=True)
    return pointer


@gluon.jit
def word_half(word, i: gl.constexpr, dtype: gl.constexpr):
    """One of a word's two values; bytes as int32."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    if BITS == 8:
        v = (word.to(gl.int32) >> 8 * i) & 0xFF
    elif BITS == 16:
        v = (word >> 16 * i).to(gl.int16).to(dtype, bitcast=True)
    else:
        v = (word >> 32 * i).to(gl.int32).to(dtype, bitcast=True)
    return v


@gluon.jit
def load_row(x, stride_c, p, first_pair, last_pair, row_inside, W,
             C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr, ODD_Q: gl.constexpr,
             dtype: gl.constexpr):  # fmt: skip
    """What a thread needs of an image row, four pairs of pixels: 4 x 2 x C values, and whether each pixel is inside.

    They are pairs p, p + 4, p + 8 and p + 12, where `x` points to p, but none before `first_pair` and none behind
    `last_pair`.
    """
    values = ()
    inside = ()
    for i in gl.static_range(4):
        ahead = 4 * i
        if i == 0:
            ahead = gl.maximum(first_pair - p, 0)
        if ODD_Q:
            ahead = gl.minimum(last_pair - p, ahead)
        first = row_inside & (p + ahead >= 0) & ((p + ahead) * 2 < W)
        second = first & ((p + ahead) * 2 + 1 < W)
        if PAIRED:
            second = first
            words = ()
            for c in gl.static_range(C):
                at = x + ahead + c * stride_c if PLANES else x + ahead * C + c
                words = words + (gl.load(at, mask=first, other=0),)
            for j in gl.static_range(2 * C):
                word, half = (words[j % C], j // C) if PLANES else (words[j // 2], j % 2)
                values = values + (word_half(word, half, dtype),)
        else:
            for j in gl.static_range(2 * C):
                at = x + ahead * 2 + (j % C * stride_c + j // C) if PLANES else x + ahead * (2 * C) + j
                values = values + (gl.load(at, mask=first if j < C else second, other=0),)
        inside = inside + (first, second)
    return values, inside


@gluon.jit
def quotient(x, y, inverse):
    """x / y correctly rounded, if `normalises_exactly`; inverse = 1 / y. A division would take thrice as long."""
    q = x * inverse
    return gl.fma(gl.fma(-q, y, x), inverse, q)


@gluon.jit
def pack_pair(low, high, dtype: gl.constexpr):
    """A word of two values, rounded to `dtype`, fp16 or bf16."""
    if low.dtype == dtype:
        low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        word = low | high.to(gl.int16, bitcast=True).to(gl.int32) << 16
    else:
        NAME: gl.constexpr = "f16x2" if dtype == gl.float16 else "bf16x2"
        both = [low.to(gl.float32), high.to(gl.float32)]
        word = gl.inline_asm_elementwise(
            "cvt.rn." + NAME + ".f32 $0, $2, $1;", "=r,f,f", both, dtype=gl.int32, is_pure=True, pack=1
        )
    return word


@gluon.jit
def pack_pixel(values, i: gl.constexpr, keep, normalization, C: gl.constexpr, dtype: gl.constexpr):
    """Pixel i of `load_row` as two words, four channels; zero if not `keep`."""
    v = ()
    for c in gl.static_range(4):
        if c < C:
            value = values[i * C + c]
            if len(normalization) > 0:
                value = quotient(value.to(gl.float32), 255.0, 1.0 / 255.0) - normalization[c]
                value = quotient(value, normalization[4 + c], normalization[8 + c])
        else:
            value = gl.zeros((32, 4), v[0].dtype, WINDOWS)
        v = v + (value,)
    return gl.where(keep, pack_pair(v[0], v[1], dtype), 0), gl.where(keep, pack_pair(v[2], v[3], dtype), 0)


@gluon.jit
def pack_windows(values, inside, has_weight, normalization, C: gl.constexpr, dtype: gl.constexpr):
    """An image row's windows, [128, 16 words]."""
    parts = ()
    for i in gl.static_range(4):
        first = has_weight
        second = has_weight | True
        if len(normalization) > 0:  # what is outside is zero after normalising
            first = has_weight & inside[2 * i]
            second = inside[2 * i + 1]
        a, b = pack_pixel(values, 2 * i, first, normalization, C, dtype)
        c, d = pack_pixel(values, 2 * i + 1, second, normalization, C, dtype)
        parts = parts + (gl.join(gl.join(a, c), gl.join(b, d)).reshape((32, 16)),)
    row = gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))  # [32, 16, r // 4 % 2, r // 8]
    return row.permute((3, 2, 0, 1)).reshape((128, 16))


@gluon.jit
def packer(
    group: gl.constexpr, x_ptr, stride_n, stride_c, stride_h, normalization, ring, full, empty,
    items, TILES, STRIPS, STRIP, Q, H, W,
    C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr, ODD_Q: gl.constexpr,
):  # fmt: skip
    """The group that fills the ring of one of the two that multiply.

    `normalization` is four means and four standard deviations of pixels, or nothing.

    It loads nothing ahead of its fence, which would wait for it. A slot is needed once in two rows' time of the tensor
    cores, some 1800 cycles, so there is time to wait for memory.
    """
    x_dtype: gl.constexpr = x_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
    words = reinterpret(ring, gl.int32, [STAGES, 256, 16], layout)
    x = word_pointer(x_ptr) if PAIRED else x_ptr
    SIDE: gl.constexpr = (1 if PAIRED else 2) * (1 if PLANES else C)  # from a pair to the next
    nth = gl.expand_dims(recompute_from(gl.arange(0, 32, layout=gl.SliceLayout(1, WINDOWS))), 1)
    pair = gl.expand_dims(recompute_from(gl.arange(0, 4, layout=gl.SliceLayout(0, WINDOWS))), 0)
    has_weight = (pair > 0) & (nth >= 0)
    for i in gl.static_range(len(normalization) // 2):  # and the deviations' inverses
        normalization = normalization + (gl.div_rn(1.0, normalization[4 + i]),)
    # A column outside the image gets its neighbour's windows: the maximum of both is the neighbour's.
    first_pair = pair - 2
    last_pair = pair + (Q - 3)
    slot = 0
    for item in range(gl.program_id(0) + group * gl.num_programs(0), items, 2 * gl.num_programs(0)):
        tile, i0, n = work_item(item, TILES, STRIPS, STRIP)
        y = 4 * i0 - 5  # where windows of row 2 i0 - 1 begin
        p = tile * 112 + nth % 8 * 14 + nth // 8 + (pair - 3)
        row = x + n.to(gl.int64) * stride_n + y * stride_h + p * SIDE
        for _ in range(2 * STRIP + 4):
            q = recompute_from(p)
            next_row = row + stride_h
            row_inside = (y >= 0) & (y < H)
            next_row_inside = (y >= -1) & (y < H - 1)
            values, inside = load_row(
                row, stride_c, q, first_pair, last_pair, row_inside, W, C, PLANES, PAIRED, ODD_Q, x_dtype
            )
            if PAIRED:  # else there are too few registers for two rows at once
                next_values, next_inside = load_row(
                    next_row, stride_c, q, first_pair, last_pair, next_row_inside, W, C, PLANES, PAIRED, ODD_Q, x_dtype
                )
            slot_words = words.index(slot % STAGES)
            mbarrier.wait(empty.index(slot % STAGES), (slot // STAGES & 1) ^ 1)
            slot_words.slice(0, 128, 0).store(pack_windows(values, inside, has_weight, normalization, C, ring.dtype))
            if not PAIRED:
                next_values, next_inside = load_row(
                    next_row, stride_c, q, first_pair, last_pair, next_row_inside, W, C, PLANES, PAIRED, ODD_Q, x_dtype
                )
            slot_words.slice(128, 128, 0).store(
                pack_windows(next_values, next_inside, has_weight, normalization, C, ring.dtype)
            )
            fence_async_shared()
            group_barrier()
            mbarrier.arrive(full.index(slot % STAGES), count=1)
            row = next_row + stride_h
            y += 2
            slot += 1


def is_paired(x: Tensor) -> bool:
    """Whether all pairs of pixels of `x` lie where words of two values can be read."""
    n, c, h, w = x.stride()
    channels_apart = w == 1 and x.shape[1] > 1
    sizes = (x.shape[3], n, h, c if channels_apart else 0)
    return not any(size % 2 for size in sizes) and x.data_ptr() % (2 * x.itemsize) == 0


@functools.lru_cache(maxsize=64)
def normalises_exactly(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    """Whether `quotient` rounds as a division does: for each byte and channel, so that there is nothing to prove."""
    x = torch.arange(256, dtype=torch.float32, device="cpu")  # whatever the default device
    centred = x / 255 - x.new_tensor(mean)[:, None]
    deviations = x.new_tensor(std)[:, None]
    return _quotients_are_exact(x, x.new_tensor(255.0)) and _quotients_are_exact(centred, deviations)


def _quotients_are_exact(x: Tensor, y: Tensor) -> bool:
    inverse = 1 / y
    q = x * inverse
    left = (x.double() - q.double() * y.double()).float()  # exact in fp64, as in the first fused multiply-add
    corrected = q.double() + left.double() * inverse.double()  # not in the second: a tie in fp32 may be none
    rounded = corrected.float()
    mirrored = 2 * corrected - rounded.double()
    tie = (corrected != rounded) & (mirrored.float() == mirrored)
    return bool(((rounded == x / y) & ~tie).all())
