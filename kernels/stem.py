"""A ResNet's stem: 7x7/2 convolution + batch norm + ReLU + 3x3/2 max pool, for images of up to four channels.

Two kernels. The first packs images of any layout (or raw bytes, which it normalises) into blocks of 2 x 2 pixels x 4
channels, zero-padded. In blocks, the convolution has stride 1 and 4 x 4 taps, and four neighbouring blocks of a row are
64 consecutive elements: an overlapping view, whose columns step by 16 elements, makes it 4 taps of 64 channels, which
tensor descriptors and tensor cores take as they are. That is 1.74 times the arithmetic of 7 x 7 x 3, but needs no
gather.

The second walks down a strip of pooled rows. For each it computes two rows of the convolution from five shared loads,
and takes the vertical maximum with the row above in registers, then the horizontal maximum across the tile. The large
tensor between convolution and pool (four times the stem's result) never exists.

A block window covers 8 x 8 pixels, so one row and one column of it have no weight. Zero times infinity is NaN, so a NaN
or an infinity there must not be multiplied. The first kernel marks rows that have one, and for a marked image the
second kernel zeroes what lies outside the 7x7 windows, which is slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, cdiv
from .tiles import batch_norm_scale_shift, maximum, relu
from .values import BatchNorm, normalization_arguments

BLOCK_ELEMENTS = 16  # 2 rows x 2 columns x 4 channels
WINDOW = 4 * BLOCK_ELEMENTS
HALO = 3  # blocks of a window beyond its first


@triton.jit(do_not_specialize=["stride_n", "stride_c", "stride_h", "stride_w", "H", "W", "ROWS", "COLUMNS"])
def pack_kernel(
    x_ptr, y_ptr, marks_ptr, stride_n, stride_c, stride_h, stride_w, H, W, ROWS, COLUMNS,
    mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3,
    C: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // ROWS).to(tl.int64)
    row = tl.program_id(0) % ROWS
    offs_e = tl.arange(0, 16)
    c = offs_e % 4
    h = row * 2 + offs_e // 8 - 4
    inside_h = (c < C) & (h >= 0) & (h < H)
    x_row = x_ptr + n * stride_n + c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h
    if NORMALIZE:
        mean = tl.where(c == 0, mean_0, tl.where(c == 1, mean_1, tl.where(c == 2, mean_2, mean_3)))[:, None]
        std = tl.where(c == 0, std_0, tl.where(c == 1, std_1, tl.where(c == 2, std_2, std_3)))[:, None]
    y_row = y_ptr + (n * ROWS + row) * COLUMNS * 16
    mark = tl.zeros((), tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        offs_b = start + tl.arange(0, BLOCK)
        w = offs_b[None, :] * 2 + (offs_e // 4 % 2)[:, None] - 4
        inside = inside_h[:, None] & (w >= 0) & (w < W)
        v = tl.load(x_row[:, None] + w.to(tl.int64) * stride_w, mask=inside, other=0).to(tl.float32)  # [16, BLOCK]
        if NORMALIZE:  # the padding is zero after normalising
            v = tl.where(inside, tl.div_rn(tl.div_rn(v, 255.0) - mean, std), 0.0)
        v = v.to(y_ptr.dtype.element_ty)
        finite = tl.abs(v.to(tl.float32)) < float("inf")  # False for NaN
        mark = tl.maximum(mark, tl.max(tl.where(finite, 0, 1)))
        offs_y = offs_b[:, None] * 16 + offs_e[None, :]
        tl.store(y_row + offs_y, tl.trans(v), mask=(offs_b < COLUMNS)[:, None])
    tl.store(marks_ptr + n * ROWS + row, mark)


@triton.jit
def _filter(w_ptr, offs_k, mask_k, ROW: tl.constexpr, C: tl.constexpr):
    """The weights of one row of blocks as [64, BLOCK_K]; zero where a block window sticks out of the 7x7 filter."""
    offs_e = tl.arange(0, 64)
    c = offs_e % 4
    s = offs_e // 16 * 2 + offs_e // 4 % 2 - 1
    r = ROW * 2 + offs_e // 8 % 2 - 1
    mask = ((r >= 0) & (s >= 0) & (c < C))[:, None] & mask_k[None, :]
    offs = ((r * 7 + s) * C + c)[:, None] + (offs_k * (49 * C))[None, :]
    return tl.load(w_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _window(x_desc, row, n, q0, BLOCK_Q: tl.constexpr):
    return x_desc.load([row, n, q0, 0]).reshape(BLOCK_Q, 64)


@triton.jit
def _inside(a, ROW: tl.constexpr):
    """`a` with zeros where a block window sticks out of the 7x7 filter, against 0 x infinity."""
    offs_e = tl.arange(0, 64)
    outside = (offs_e // 16 == 0) & (offs_e // 4 % 2 == 0)
    if ROW == 0:
        outside = outside | (offs_e // 8 % 2 == 0)
    return tl.where(outside[None, :], 0.0, a)


@triton.jit
def _row(x_desc, filters, p, n, q0, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GUARD: tl.constexpr):
    """BLOCK_Q columns of row p of the convolution, fp32 [BLOCK_Q, BLOCK_K]."""
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for ROW in tl.static_range(4):
        a = _window(x_desc, p + ROW, n, q0, BLOCK_Q)
        if GUARD:
            a = _inside(a, ROW)
        acc = tl.dot(a, filters[ROW], acc)
    return acc


@triton.jit
def _two_rows(x_desc, filters, p, n, q0, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows p and p + 1, which share three of their five loads."""
    windows = ()
    for i in tl.static_range(5):
        windows = windows + (_window(x_desc, p + i, n, q0, BLOCK_Q),)  # [BLOCK_Q, 64]
    even = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for i in tl.static_range(4):
        even = tl.dot(windows[i], filters[i], even)
    odd = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for i in tl.static_range(4):
        odd = tl.dot(windows[i + 1], filters[i], odd)
    return even, odd


@triton.jit
def _norm(acc, scale, shift, row, P, inside_q):
    return tl.where(inside_q & (row >= 0) & (row < P), acc * scale[None, :] + shift[None, :], float("-inf"))


@triton.jit
def _strip(
    x_desc, y_ptr, filters, scale, shift, n, j0, first_row, last_row, offs_k, mask_k, P, Q, POOL_P, POOL_Q,
    K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Pooled rows [first_row, last_row) of a column of the image: BLOCK_Q columns of the convolution, from 2 j0 - 1."""
    HALF: tl.constexpr = BLOCK_Q // 2
    q0 = j0 * 2 - 1
    offs_q = q0 + tl.arange(0, BLOCK_Q)
    inside_q = ((offs_q >= 0) & (offs_q < Q))[:, None]
    offs_j = tl.arange(0, HALF)
    following = tl.broadcast_to(tl.minimum(offs_j + 1, HALF - 1)[:, None], (HALF, BLOCK_K))
    mask_y = ((offs_j < HALF - 1) & (j0 + offs_j < POOL_Q))[:, None] & mask_k[None, :]
    offs_y = (j0 + offs_j)[:, None] * K + offs_k[None, :]

    p = first_row * 2 - 1
    above = _row(x_desc, filters, p, n, q0, BLOCK_Q, BLOCK_K, GUARD)
    above = _norm(above, scale, shift, p, P, inside_q)
    STAGES: tl.constexpr = 1 if GUARD else None
    for i in tl.range(first_row, last_row, num_stages=STAGES):
        p = i * 2
        if GUARD:
            even = _row(x_desc, filters, p, n, q0, BLOCK_Q, BLOCK_K, True)
            odd = _row(x_desc, filters, p + 1, n, q0, BLOCK_Q, BLOCK_K, True)
        else:
            even, odd = _two_rows(x_desc, filters, p, n, q0, BLOCK_Q, BLOCK_K)
        even = _norm(even, scale, shift, p, P, inside_q)
        odd = _norm(odd, scale, shift, p + 1, P, inside_q)
        column = relu(maximum(maximum(above, even), odd)).to(y_ptr.dtype.element_ty)
        above = odd
        # Tile columns 2j and 2j + 1 are the first two of pooled column j's three; the next pair begins with the third.
        left, middle = column.reshape(HALF, 2, BLOCK_K).permute(0, 2, 1).split()
        pooled = maximum(maximum(left, middle), tl.gather(left, following, 0))  # [HALF, BLOCK_K]
        row = y_ptr + (n.to(tl.int64) * POOL_P + i) * POOL_Q * K
        tl.store(row + offs_y, pooled, mask=mask_y)


@triton.jit(do_not_specialize=["P", "Q", "POOL_P", "POOL_Q", "ROWS", "STRIP"])
def stem_kernel(
    x_desc, marks_ptr, w_ptr, y_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    P, Q, POOL_P, POOL_Q, ROWS, STRIP,
    C: tl.constexpr, K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(POOL_Q, BLOCK_Q // 2 - 1)
    strips = tl.cdiv(POOL_P, STRIP)
    offs_k = (pid % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    j0 = pid // TILES_K % tiles_q * (BLOCK_Q // 2 - 1)
    first_row = pid // (TILES_K * tiles_q) % strips * STRIP
    last_row = min(first_row + STRIP, POOL_P)
    n = pid // (TILES_K * tiles_q * strips)
    filters = ()
    for ROW in tl.static_range(4):
        filters = filters + (_filter(w_ptr, offs_k, mask_k, ROW, C),)
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k, BLOCK_K)
    marked = tl.zeros((), tl.int32)
    for start in range(0, ROWS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        marks = tl.load(marks_ptr + n.to(tl.int64) * ROWS + rows, mask=rows < ROWS, other=0)
        marked = tl.maximum(marked, tl.max(marks))
    if marked == 0:
        _strip(
            x_desc, y_ptr, filters, scale, shift, n, j0, first_row, last_row, offs_k, mask_k, P, Q, POOL_P,
            POOL_Q, K, BLOCK_Q, BLOCK_K, False,
        )  # fmt: skip
    else:
        _strip(
            x_desc, y_ptr, filters, scale, shift, n, j0, first_row, last_row, offs_k, mask_k, P, Q, POOL_P,
            POOL_Q, K, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip


def packed_shape(n: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Shape of the packed images: (N, rows of blocks, blocks in a row, elements of a block)."""
    return n, (h - 1) // 2 + 1 + HALO, (w - 1) // 2 + 1 + HALO, BLOCK_ELEMENTS


def pack(
    *, out: Tensor, marks: Tensor, x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None,
    block: int, num_warps: int,
) -> Launch:  # fmt: skip
    """The launch that writes `out` (`packed_shape`, fp16 or bf16) and `marks` (N, rows; int32) from images `x`.

    `x` (N, C, H, W), C at most 4, of any strides and any dtype: floating point is rounded; with `mean` and `std`, one
    for each channel, `x` holds bytes and becomes `(x / 255 - mean) / std`, computed in fp32. A mark is 1 where a row
    of blocks holds a NaN or an infinity.
    """
    n, c, h, w = x.shape
    _, rows, columns, _ = out.shape
    arguments = {
        "x_ptr": x, "y_ptr": out, "marks_ptr": marks, **normalization_arguments(mean, std),
        "stride_n": x.stride(0), "stride_c": x.stride(1), "stride_h": x.stride(2), "stride_w": x.stride(3),
        "H": h, "W": w, "ROWS": rows, "COLUMNS": columns, "C": c, "BLOCK": block,
    }  # fmt: skip
    return Launch(pack_kernel, (n * rows,), arguments, num_warps)


def stem(
    *, out: Tensor, packed: Tensor, marks: Tensor, weight: Tensor, batch_norm: BatchNorm,
    block_q: int, block_k: int, strip: int, num_warps: int, num_stages: int,
) -> Launch:  # fmt: skip
    """The launch that writes `out` (N, K, P', Q'), dense in channels_last memory, from what `pack` wrote.

    `weight` (K, C, 7, 7), dense in channels_last memory, of the packed images' dtype. A program computes `strip` pooled
    rows of `block_q // 2 - 1` columns.
    """
    n, rows, columns, _ = packed.shape
    k, c, _, _ = weight.shape
    _, _, pool_p, pool_q = out.shape
    p, q = rows - HALO, columns - HALO
    row, image = columns * BLOCK_ELEMENTS, rows * columns * BLOCK_ELEMENTS
    windows = TensorDescriptor(packed, [rows, n, q, WINDOW], [row, image, BLOCK_ELEMENTS, 1], [1, 1, block_q, WINDOW])
    arguments = {
        "x_desc": windows, "marks_ptr": marks, "w_ptr": weight, "y_ptr": out,
        **batch_norm.arguments(),
        "P": p, "Q": q, "POOL_P": pool_p, "POOL_Q": pool_q, "ROWS": rows, "STRIP": strip, "C": c, "K": k,
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_ROWS": 128,
    }  # fmt: skip
    tiles = cdiv(k, block_k) * cdiv(pool_q, block_q // 2 - 1) * cdiv(pool_p, strip)
    return Launch(stem_kernel, (n * tiles,), arguments, num_warps, num_stages)
