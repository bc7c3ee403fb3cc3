"""A ResNet's stem for Hopper (compute capability 9.0), warp-specialised and persistent, in Gluon: 7x7/2 convolution +
batch norm + ReLU + 3x3/2 max pool in one launch, from images as they are. Nothing in between reaches global memory.

**The product.** A row of the convolution is W X, where W (64 x 224) is the filters and column n of X the window of one
column of the convolution: 7 image rows x 8 pixels x 4 channels. Windows are 7 pixels wide and begin at an odd pixel;
with the pixel before they are four pairs, 64 bytes an image row. That pixel, which has no weight, and channels that
the image does not have are zeros in X, too: zero times infinity would be NaN. W stays in registers for good.

**The order of columns.** Pooled column j is the maximum of columns 2j - 1, 2j and 2j + 1 of the convolution. In the
accumulator of a product (wgmma) a thread has two neighbours of every eight columns, so in their natural order the three
would mostly be in different threads. Therefore column n = 8 r + m of X is column 14 m - 1 + r of the convolution:

             m = 0     1     2    ...    7
    r =  0      -1    13    27          97
    r =  1       0    14    28          98
      ...
    r = 14      13    27    41         111
    r = 15       -     -     -           -

A thread has two columns of this table from top to bottom, and in column m is all that pooled columns 7 m to 7 m + 6
ask for: no value leaves its thread. Of 128 columns, seven are computed twice and eight for nothing.

**The work.** An item is a strip of pooled rows, 56 columns wide, of one image. A group of four warps walks down its
strip; for each pooled row it computes two rows of the convolution and keeps the last one's horizontal maxima for the
row below. Two such groups take turns: while one has the tensor cores, the other normalises, takes maxima and stores.

**The images.** Beside each of the two, four more warps pack: they read two image rows, make windows of them and put
them into a slot of a ring. A row of the convolution reads four slots, and the next row begins one slot later.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import PropagateNan

from .hopper import (
    async_store,
    batch_norm_scale_shift,
    descriptor_fields,
    group_barrier,
    on,
    reinterpret,
    relu,
)
from .launch import Launch, cdiv
from .values import BatchNorm

STAGES = 6
"""Slots of a ring. Two rings and what is on its way out fill an SM's shared memory."""

PLANES, PIXELS, SINGLE = 0, 1, 2
"""How a pair of pixels is read, by words of two values, or value by value:

* PLANES, a word for each channel: each channel has its pixels side by side (NCHW);
* PIXELS, as many words as channels: each pixel has its channels side by side (NHWC);
* SINGLE, values of any strides: images of odd width, odd addresses, anything else.
"""

ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
# A packer's threads over [32 = 8 (r % 4) + m, 4 pairs of a window]. Lanes: the pairs, bit 0 of m, r % 4. So eight lanes'
# stores of 16 bytes hit every bank of shared memory once, and a warp reads few short pieces of an image row.
WINDOWS = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[], lane_bases=[[0, 1], [0, 2], [1, 0], [8, 0], [16, 0]], warp_bases=[[2, 0], [4, 0]], block_bases=[],
    shape=[32, 4],
))  # fmt: skip
NAN_WINS = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def sizes(H, W, STRIP):
    """Rows and columns of the convolution and of the pool; tiles in a pooled row, strips in a pooled column."""
    P = (H - 1) // 2 + 1
    Q = (W - 1) // 2 + 1
    POOL_P = (P - 1) // 2 + 1
    POOL_Q = (Q - 1) // 2 + 1
    return P, Q, POOL_P, POOL_Q, (POOL_Q + 55) // 56, (POOL_P + STRIP - 1) // STRIP


@gluon.jit
def place(item, tiles, strips, STRIP):
    """An item's tile of 56 pooled columns, first pooled row and image."""
    return item % tiles, item // tiles % strips * STRIP, item // (tiles * strips)


@gluon.jit
def filter_row(w_ptr, ROW: gl.constexpr, C: gl.constexpr):
    """Row ROW of the filters (64, 7, 7, C) as [64, 32]: element 4 s + c has channel c of pixel s - 1; none for s = 0."""
    layout: gl.constexpr = gl.DotOperandLayout(0, ACCUMULATOR, 2)
    k = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    e = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, layout)), 0)
    s = e // 4 - 1
    c = e % 4
    mask = (k >= 0) & (s >= 0) & (c < C)
    return gl.load(w_ptr + (k * (49 * C) + (ROW * 7 + s) * C + c), mask=mask, other=0.0)


@gluon.jit
def maximum(a, b):
    return gl.maximum(a, b, propagate_nan=NAN_WINS)


@gluon.jit
def halves(y):
    """[64, R, 8] -> its even and its odd rows r, [64, R / 2, 8] each."""
    return y.reshape((64, y.shape[1] // 2, 2, 8)).permute((0, 1, 3, 2)).split()


@gluon.jit
def interleaved(even, odd):
    odd = gl.convert_layout(odd, even.type.layout)
    return gl.join(even, odd).permute((0, 1, 3, 2)).reshape((64, even.shape[1] * 2, 8))


@gluon.jit
def following(y):
    """[64, 8, 8] with row r + 1 in the place of row r; the last is garbage. This only renames registers."""
    even, odd = halves(y)  # 0 2 4 6, 1 3 5 7
    first, second = halves(even)  # 0 4, 2 6
    _, four = halves(first)
    shifted = interleaved(odd, interleaved(second, interleaved(four, four)))  # 1 3 5 7, (2 6, 4 *): 1 2 3 4 5 6 7 *
    return gl.convert_layout(shifted, y.type.layout)


@gluon.jit
def pooled_columns(y, tile, Q, ODD_Q: gl.constexpr):
    """Horizontal maxima of one row of the convolution [64, 128]: [64, 8, 8], where (k, x, m) is pooled column 7 m + x."""
    left, middle = halves(y.reshape((64, 16, 8)))
    layout: gl.constexpr = left.type.layout
    middle = gl.convert_layout(middle, layout)
    x = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    x = gl.expand_dims(gl.expand_dims(x, 0), 2)
    m = gl.expand_dims(gl.expand_dims(m, 0), 1)
    # Two columns outside the image are asked for: the one before its first, and, if it has an odd number, the one after.
    left = gl.where((x == 0) & (m + tile == 0), float("-inf"), left)
    if ODD_Q:
        left = gl.where(tile * 112 + m * 14 + x * 2 == Q + 1, float("-inf"), left)
    return maximum(maximum(left, middle), following(left))


@gluon.jit
def convolution_row(
    group: gl.constexpr, filters, scale, shift, ring, full, empty, turns, slot, turn, tile, Q,
    ODD_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The next row of the convolution, normalised, as `pooled_columns`. `slot` counts slots, `turn` rows."""
    f0, f1, f2, f3, f4, f5, f6 = filters
    mbarrier.wait(full.index((slot + 3) % STAGES), (slot + 3) // STAGES & 1)
    w0 = ring.index(slot % STAGES)
    w1 = ring.index((slot + 1) % STAGES)
    w2 = ring.index((slot + 2) % STAGES)
    w3 = ring.index((slot + 3) % STAGES)
    mbarrier.wait(turns.index(group), turn & 1 ^ 1 - group)
    acc = gl.zeros((64, 128), gl.float32, ACCUMULATOR)  # not read
    acc = warpgroup_mma(f0, w0.slice(0, 128, 0).permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma(f1, w0.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f2, w1.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f3, w1.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f4, w2.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma(f5, w2.slice(128, 128, 0).permute((1, 0)), acc, is_async=True)
    mbarrier.arrive(turns.index(1 - group), count=1)  # the other's turn: its products come behind this row's last
    acc = warpgroup_mma(f6, w3.slice(0, 128, 0).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(slot % STAGES), count=1)
    row = pooled_columns(acc * gl.expand_dims(scale, 1) + gl.expand_dims(shift, 1), tile, Q, ODD_Q)
    # Volatile, as waits are: or else the compiler does all of the above after the next wait, while nobody multiplies.
    return gl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [row], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def multiplier(
    group: gl.constexpr, y_ptr, y_desc, w_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ring, out, full, empty,
    turns, items, H, W, STRIP, C: gl.constexpr, ODD_P: gl.constexpr, ODD_Q: gl.constexpr, REST: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply."""
    filters = (
        filter_row(w_ptr, 0, C), filter_row(w_ptr, 1, C), filter_row(w_ptr, 2, C), filter_row(w_ptr, 3, C),
        filter_row(w_ptr, 4, C), filter_row(w_ptr, 5, C), filter_row(w_ptr, 6, C),
    )  # fmt: skip
    k = gl.arange(0, 64, layout=gl.SliceLayout(1, ACCUMULATOR))
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, k, k < 64)
    P, Q, POOL_P, POOL_Q, tiles, strips = sizes(H, W, STRIP)
    slot = 0
    turn = 0
    for first in range(gl.program_id(0) * 2, items, gl.num_programs(0) * 2):
        item = first + group  # where their number is odd, the last of group 1 is none: a rehearsal of the last item
        tile, i0, n = place(gl.minimum(item, items - 1), tiles, strips, STRIP)
        for ahead in gl.static_range(3):
            mbarrier.wait(full.index((slot + ahead) % STAGES), (slot + ahead) // STAGES & 1)
        above = convolution_row(
            group, filters, scale, shift, ring, full, empty, turns, slot, turn, tile, Q, ODD_Q, STAGES
        )
        above = gl.where(i0 > 0, above, float("-inf"))
        slot += 1
        turn += 1
        for i in range(i0, i0 + STRIP):
            even = convolution_row(
                group, filters, scale, shift, ring, full, empty, turns, slot, turn, tile, Q, ODD_Q, STAGES
            )
            pooled = maximum(above, even)
            above = convolution_row(
                group, filters, scale, shift, ring, full, empty, turns, slot + 1, turn + 1, tile, Q, ODD_Q, STAGES
            )
            if ODD_P:
                above = gl.where(2 * i + 1 >= P, float("-inf"), above)
            pooled = relu(maximum(pooled, above)).to(y_desc.dtype)
            slot += 2
            turn += 2
            if item < items:
                tma.store_wait(0)  # the row before has left its buffer
                out.reshape((8, 8, 64)).permute((2, 0, 1)).store(pooled)
                fence_async_shared()
                async_store(y_desc, [n, i, 0, tile * 8, 0], out)
                if REST:
                    if (i < POOL_P) & (tile == tiles - 1):
                        store_rest(pooled, y_ptr + (n.to(gl.int64) * POOL_P + i) * POOL_Q * 64, tile, POOL_Q)
        for ahead in gl.static_range(3):
            mbarrier.arrive(empty.index((slot + ahead) % STAGES), count=1)
        slot += 3
    tma.store_wait(0)


@gluon.jit
def store_rest(pooled, y_row, tile, POOL_Q):
    """The columns behind the last seven, which the descriptor leaves out."""
    layout: gl.constexpr = pooled.type.layout
    k = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    x = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    k = gl.expand_dims(gl.expand_dims(k, 1), 2)
    x = gl.expand_dims(gl.expand_dims(x, 0), 2)
    m = gl.expand_dims(gl.expand_dims(m, 0), 1) + tile * 8
    rest = (m == POOL_Q // 7) & (x < POOL_Q % 7) & (k >= 0)
    gl.store(y_row + (m * 7 + x) * 64 + k, pooled, mask=rest)


@gluon.jit
def fetch(x, stride_c, column, here, W, C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr):
    """What a thread needs for its four pairs of an image row: 4 x C words, or twice as many values.

    The pairs begin at `column`, where `x` points to, `column` + 8, ...; outside the image all is zero.
    """
    words = ()
    for r in gl.static_range(4):
        first = column + 8 * r
        inside = here & (first >= 0) & (first < W)
        for c in gl.static_range(C):
            if PAIRED:
                at = x + c * stride_c + 4 * r if PLANES else x + (4 * r * C + c)
                words = words + (gl.load(at, mask=inside, other=0),)
            else:
                at = x + c * stride_c + 8 * r if PLANES else x + (8 * r * C + c)
                second = here & (first >= -1) & (first < W - 1)
                words = words + (gl.load(at, mask=inside, other=0),)
                words = words + (gl.load(at + (1 if PLANES else C), mask=second, other=0),)
    return words


@gluon.jit
def part(word, i: gl.constexpr, dtype: gl.constexpr):
    """One of the two values in a word."""
    BITS: gl.constexpr = dtype.primitive_bitwidth
    if BITS == 8:
        v = (word.to(gl.int32) >> 8 * i) & 0xFF
    elif BITS == 16:
        v = (word >> 16 * i).to(gl.int16).to(dtype, bitcast=True)
    else:
        v = (word >> 32 * i).to(gl.int32).to(dtype, bitcast=True)
    return v


@gluon.jit
def value(words, r: gl.constexpr, pixel: gl.constexpr, c: gl.constexpr, C: gl.constexpr, PLANES: gl.constexpr,
          PAIRED: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """Channel c of a pair's first or second pixel, as the image has it."""
    if not PAIRED:
        v = words[(r * C + c) * 2 + pixel]
    elif PLANES:
        v = part(words[r * C + c], pixel, dtype)
    else:
        v = part(words[r * C + (pixel * C + c) // 2], (pixel * C + c) % 2, dtype)
    return v


@gluon.jit
def quotient(x, y, inverse):
    """x / y correctly rounded, if `normalises_exactly`; inverse = 1 / y. A division would take thrice as long."""
    q = x * inverse
    return gl.fma(gl.fma(-q, y, x), inverse, q)


@gluon.jit
def joined(low, high, dtype: gl.constexpr):
    """A word of two values, rounded to `dtype`, fp16 or bf16."""
    if low.dtype == dtype:
        low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        word = low | high.to(gl.int16, bitcast=True).to(gl.int32) << 16
    else:
        low = low.to(gl.float32)
        high = high.to(gl.float32)
        if dtype == gl.float16:
            word = gl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
            )
        else:
            word = gl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
            )
    return word


@gluon.jit
def pixel_words(words, r: gl.constexpr, pixel: gl.constexpr, normal, keep, C: gl.constexpr, PLANES: gl.constexpr,
                PAIRED: gl.constexpr, x_dtype: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """A pixel's four channels as two words, zero where not `keep`."""
    v = ()
    for c in gl.static_range(4):
        if c < C:
            one = value(words, r, pixel, c, C, PLANES, PAIRED, x_dtype)
            if len(normal) > 0:
                one = quotient(one.to(gl.float32), 255.0, 1.0 / 255.0) - normal[c]
                one = quotient(one, normal[4 + c], normal[8 + c])
        else:
            one = v[0] * 0
        v = v + (one,)
    return gl.where(keep, joined(v[0], v[1], dtype), 0), gl.where(keep, joined(v[2], v[3], dtype), 0)


@gluon.jit
def windows(words, normal, weighted, column, here, W, C: gl.constexpr, PLANES: gl.constexpr,
            PAIRED: gl.constexpr, x_dtype: gl.constexpr,            dtype: gl.constexpr):  # fmt: skip
    """An image row's windows, [128, 16 words]."""
    slices = ()
    for r in gl.static_range(4):
        keep_first = weighted
        keep_second = weighted | True
        if len(normal) > 0:  # the padding is zero after normalising
            first = column + 8 * r
            keep_first = weighted & here & (first >= 0) & (first < W)
            keep_second = here & (first >= -1) & (first < W - 1)
        a, b = pixel_words(words, r, 0, normal, keep_first, C, PLANES, PAIRED, x_dtype, dtype)
        c, d = pixel_words(words, r, 1, normal, keep_second, C, PLANES, PAIRED, x_dtype, dtype)
        slices = slices + (gl.join(gl.join(a, c), gl.join(b, d)).reshape((32, 16)),)
    joined = gl.join(gl.join(slices[0], slices[1]), gl.join(slices[2], slices[3]))  # [32, 16, r // 4 % 2, r // 8]
    return joined.permute((3, 2, 0, 1)).reshape((128, 16))


@gluon.jit
def packer(
    group: gl.constexpr, x, stride_n, stride_c, stride_h, normal, ring, full, empty, items, H, W, STRIP,
    C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr, STAGES: gl.constexpr, x_dtype: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The group that fills the ring of one of the two that multiply.

    It loads nothing ahead of a deposit, whose fence would wait for it. A slot is needed once in two rows' time of the
    tensor cores, some 1800 cycles, so there is time to wait for memory.
    """
    place_of = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(1, WINDOWS)), 1)
    pair = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, WINDOWS)), 0)
    first = (place_of % 8 * 14 - 1 + place_of // 8 + pair) * 2 - 4
    weighted = (pair > 0) & (place_of >= 0)
    _, _, _, _, tiles, strips = sizes(H, W, STRIP)
    step: gl.constexpr = 1 if PLANES else C
    slot = 0
    for first_item in range(gl.program_id(0) * 2, items, gl.num_programs(0) * 2):
        tile, i0, n = place(gl.minimum(first_item + group, items - 1), tiles, strips, STRIP)
        y = 4 * i0 - 5  # the window of row 2 i0 - 1 begins here
        column = first + tile * 224
        x_row = x + n.to(gl.int64) * stride_n + y * stride_h + (column // 2 * step if PAIRED else column * step)
        for _ in range(2 * STRIP + 4):
            here = (y >= 0) & (y < H)
            next_here = (y >= -1) & (y < H - 1)
            words = fetch(x_row, stride_c, column, here, W, C, PLANES, PAIRED)
            if PAIRED:  # else there are too few registers for two rows at once
                next_words = fetch(x_row + stride_h, stride_c, column, next_here, W, C, PLANES, PAIRED)
            windows_of = ring.index(slot % STAGES)
            mbarrier.wait(empty.index(slot % STAGES), (slot // STAGES & 1) ^ 1)
            windows_of.slice(0, 128, 0).store(
                windows(words, normal, weighted, column, here, W, C, PLANES, PAIRED, x_dtype, dtype)
            )
            if not PAIRED:
                next_words = fetch(x_row + stride_h, stride_c, column, next_here, W, C, PLANES, PAIRED)
            windows_of.slice(128, 128, 0).store(
                windows(next_words, normal, weighted, column, next_here, W, C, PLANES, PAIRED, x_dtype, dtype)
            )
            fence_async_shared()
            group_barrier()
            mbarrier.arrive(full.index(slot % STAGES), count=1)
            x_row += 2 * stride_h
            y += 2
            slot += 1


@gluon.jit(do_not_specialize=["stride_n", "stride_c", "stride_h", "items", "H", "W", "STRIP"])
def hopper_stem_kernel(
    x_ptr, w_ptr, y_ptr, y_desc, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    stride_n, stride_c, stride_h, items, H, W, STRIP,
    mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3,
    C: gl.constexpr, PLANES: gl.constexpr, PAIRED: gl.constexpr, NORMALIZE: gl.constexpr, ODD_P: gl.constexpr, ODD_Q: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PACKER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = y_desc.dtype
    x_dtype: gl.constexpr = x_ptr.dtype.element_ty
    halfwords: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    words: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
    ring_0 = gl.allocate_shared_memory(dtype, [STAGES, 256, 32], halfwords)
    ring_1 = gl.allocate_shared_memory(dtype, [STAGES, 256, 32], halfwords)
    out = gl.allocate_shared_memory(dtype, [2] + y_desc.block_shape, y_desc.layout)
    full_0 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_1 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_0 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_1 = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full_0.index(i), count=1)
        mbarrier.init(full_1.index(i), count=1)
        mbarrier.init(empty_0.index(i), count=1)
        mbarrier.init(empty_1.index(i), count=1)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    words_0 = reinterpret(ring_0, gl.int32, [STAGES, 256, 16], words)
    words_1 = reinterpret(ring_1, gl.int32, [STAGES, 256, 16], words)
    normal = ()
    if NORMALIZE:
        normal = (
            mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3,
            gl.div_rn(1.0, std_0), gl.div_rn(1.0, std_1), gl.div_rn(1.0, std_2), gl.div_rn(1.0, std_3),
        )  # fmt: skip
    if not PAIRED:
        x = x_ptr
    elif x_dtype.primitive_bitwidth == 8:
        x = x_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    elif x_dtype.primitive_bitwidth == 16:
        x = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    else:
        x = x_ptr.to(gl.pointer_type(gl.int64), bitcast=True)
    gl.warp_specialize([
        (multiplier, (
            0, y_ptr, y_desc, w_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ring_0, out.index(0), full_0,
            empty_0, turns, items, H, W, STRIP, C, ODD_P, ODD_Q, REST, STAGES,
        )),
        (multiplier, (
            1, y_ptr, y_desc, w_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, ring_1, out.index(1), full_1,
            empty_1, turns, items, H, W, STRIP, C, ODD_P, ODD_Q, REST, STAGES,
        )),
        (packer, (
            0, x, stride_n, stride_c, stride_h, normal, words_0, full_0, empty_0, items, H, W, STRIP,
            C, PLANES, PAIRED, STAGES, x_dtype, dtype,
        )),
        (packer, (
            1, x, stride_n, stride_c, stride_h, normal, words_1, full_1, empty_1, items, H, W, STRIP,
            C, PLANES, PAIRED, STAGES, x_dtype, dtype,
        )),
    ], [4, 4, 4], [REGISTERS, PACKER_REGISTERS, PACKER_REGISTERS])  # fmt: skip


def hopper_stem(
    *, out: Tensor, x: Tensor, weight: Tensor, batch_norm: BatchNorm, mean: Sequence[float] | None,
    std: Sequence[float] | None, strip: int, programs: int,
) -> Launch:  # fmt: skip
    """The launch of at most `programs` programs that writes `out` (N, 64, P', Q'), dense in channels_last memory.

    `x` (N, C, H, W), `weight` (64, C, 7, 7), dense in channels_last memory, both as `supports` asks. Floating point is
    rounded to the weight's dtype; with `mean` and `std`, one for each channel, `x` holds bytes and becomes
    `(x / 255 - mean) / std`, computed in fp32, first. A group of warps computes `strip` pooled rows at a time.
    """
    n, c, h, w = x.shape
    _, k, pool_p, pool_q = out.shape
    columns = [min(pool_q, 7), max(pool_q // 7, 1)]  # a row of the pool by sevens; see `store_rest`
    row, image = pool_q * k, pool_p * pool_q * k
    fields = descriptor_fields(out.dtype, (n, pool_p, *columns, k), (image, row, k, 7 * k, 1), (1, 1, 8, 8, k))
    means, stds = ([*(values or ()), *[1.0] * 4][:4] for values in (mean, std))
    step = 2 if is_paired(x) else 1
    items = n * cdiv(pool_p, strip) * cdiv(pool_q, 56)
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": out, "y_desc": on(out, fields), **batch_norm.arguments(),
        "stride_n": x.stride(0) // step, "stride_c": x.stride(1) // step, "stride_h": x.stride(2) // step,
        "items": items, "H": h, "W": w, "STRIP": strip,
        **{f"mean_{i}": value for i, value in enumerate(means)},
        **{f"std_{i}": value for i, value in enumerate(stds)},
        "C": c, "PLANES": x.stride(3) == 1, "PAIRED": is_paired(x), "NORMALIZE": mean is not None,
        "ODD_P": (h + 1) // 2 % 2 == 1, "ODD_Q": (w + 1) // 2 % 2 == 1, "REST": pool_q > 7 and pool_q % 7 > 0, "STAGES": STAGES,
        "REGISTERS": 192, "PACKER_REGISTERS": 64,
    }  # fmt: skip
    return Launch(hopper_stem_kernel, (min(programs, cdiv(items, 2)),), arguments, num_warps=4)


def is_paired(x: Tensor) -> bool:
    """Whether all pairs of pixels of `x` lie where words of two values can be read."""
    n, c, h, w = x.stride()
    planes = w == 1 and (x.shape[1] == 1 or c % 2 == 0)
    return (planes or w > 1) and x.shape[3] % 2 == n % 2 == h % 2 == 0 and x.data_ptr() % (2 * x.itemsize) == 0
