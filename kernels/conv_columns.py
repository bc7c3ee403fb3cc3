"""3x3 convolution, two or three adjacent output columns a program: for few channels, where loads are the limit.

With 64 channels in and out, a tile of one column loads nine input tiles and nine filter tiles for nine products, and
reading L2 caps it (43 FLOP a byte). Adjacent columns share: two need four input and three filter tiles a filter row for
six products (71 FLOP a byte), three need five and three for nine (90). Tiles are one pixel of BLOCK_M images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_box import box_offsets, load_filters, load_pixels, store_pixels
from .tiles import batch_norm_scale_shift, begin, relu


@triton.jit
def _load(ptr, p, q, n0, P, Q, N, offs_k, mask_k, K: tl.constexpr, BLOCK_M: tl.constexpr):
    offs, mask = box_offsets(p, q, n0, P, Q, N, offs_k, mask_k, K, 1, 1, BLOCK_M)
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def _finish(
    acc, scale, shift, residual, res_desc, y_desc, p, q, n0, k0,
    RELU: tl.constexpr, VIEW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    acc = acc * scale[None, :] + shift[None, :]
    if residual is not None:
        acc += residual.to(tl.float32)
    if res_desc is not None:
        acc += load_pixels(res_desc, p, q, n0, 0, 0, k0, 1, VIEW, BLOCK_M).to(tl.float32)
    if RELU:
        acc = relu(acc)
    store_pixels(y_desc, acc, p, q, n0, k0, VIEW, 1, 1, BLOCK_M)


@triton.jit(do_not_specialize=["N", "P", "Q"])
def conv_columns_kernel(
    x_desc, w_desc, y_desc, res_desc, res_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, N, P, Q,
    C: tl.constexpr, K: tl.constexpr, VIEW: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    begin()
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    k0 = (pid % TILES_K) * BLOCK_K
    tile = pid // TILES_K
    tiles_q = tl.cdiv(Q, COLUMNS)
    q = (tile % tiles_q) * COLUMNS
    p = tile // tiles_q % P
    n0 = tile // (tiles_q * P) * BLOCK_M
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_k, mask_k, BLOCK_K)
    res0 = None
    res1 = None
    res2 = None
    if res_ptr is not None:
        res0 = _load(res_ptr, p, q, n0, P, Q, N, offs_k, mask_k, K, BLOCK_M)
        res1 = _load(res_ptr, p, q + 1, n0, P, Q, N, offs_k, mask_k, K, BLOCK_M)
        if COLUMNS == 3:
            res2 = _load(res_ptr, p, q + 2, n0, P, Q, N, offs_k, mask_k, K, BLOCK_M)

    first = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    third = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in range(3 * ((C + BLOCK_C - 1) // BLOCK_C)):
        r = i % 3
        c0 = i // 3 * BLOCK_C
        w0 = load_filters(w_desc, k0, r * 3, c0).T
        w1 = load_filters(w_desc, k0, r * 3 + 1, c0).T
        w2 = load_filters(w_desc, k0, r * 3 + 2, c0).T
        a0 = load_pixels(x_desc, p, q, n0, r - 1, -1, c0, 1, VIEW, BLOCK_M)  # [BLOCK_M, BLOCK_C]
        a1 = load_pixels(x_desc, p, q, n0, r - 1, 0, c0, 1, VIEW, BLOCK_M)
        a2 = load_pixels(x_desc, p, q, n0, r - 1, 1, c0, 1, VIEW, BLOCK_M)
        a3 = load_pixels(x_desc, p, q, n0, r - 1, 2, c0, 1, VIEW, BLOCK_M)
        first = tl.dot(a0, w0, first, input_precision=PRECISION)
        first = tl.dot(a1, w1, first, input_precision=PRECISION)
        first = tl.dot(a2, w2, first, input_precision=PRECISION)
        second = tl.dot(a1, w0, second, input_precision=PRECISION)
        second = tl.dot(a2, w1, second, input_precision=PRECISION)
        second = tl.dot(a3, w2, second, input_precision=PRECISION)
        if COLUMNS == 3:
            a4 = load_pixels(x_desc, p, q, n0, r - 1, 3, c0, 1, VIEW, BLOCK_M)
            third = tl.dot(a2, w0, third, input_precision=PRECISION)
            third = tl.dot(a3, w1, third, input_precision=PRECISION)
            third = tl.dot(a4, w2, third, input_precision=PRECISION)
    # A column beyond the last is computed from zeros, and its store is dropped by the descriptor.
    _finish(first, scale, shift, res0, res_desc, y_desc, p, q, n0, k0, RELU, VIEW, BLOCK_M)
    _finish(second, scale, shift, res1, res_desc, y_desc, p, q + 1, n0, k0, RELU, VIEW, BLOCK_M)
    if COLUMNS == 3:
        _finish(third, scale, shift, res2, res_desc, y_desc, p, q + 2, n0, k0, RELU, VIEW, BLOCK_M)
