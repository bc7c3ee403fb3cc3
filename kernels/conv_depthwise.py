"""Depthwise convolution + batch norm [+ residual] [+ activation]: each channel has a filter of its own.

There is nothing to multiply matrices of, so memory and the number of instructions are the limit. A program computes
ROWS output rows x BOX_W columns by BLOCK_C channels. For each column of taps it loads the input rows under these once,
into registers, and multiplies each by all taps that read it. Columns that are shared are read again, from L1.

A program is best a single warp. Filters lie R * S elements apart, so a load of one tap of many channels touches as many
lines of L1. One warp loads each once and hands it round; several would each load all that their own threads need.

Every result adds its taps in the same order, column after column, whatever the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .tiles import activate, batch_norm_scale_shift
from .values import Activation, BatchNorm, Geometry


@triton.jit(do_not_specialize=["H", "W", "P", "Q"])
def conv_depthwise_kernel(
    x_ptr, w_ptr, y_ptr, res_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, H, W, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    READ: tl.constexpr = (ROWS - 1) * STRIDE_H + (R - 1) * DILATION_H + 1  # input rows from the first to the last
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tiles_q = (Q + BOX_W - 1) // BOX_W
    tiles_p = (P + ROWS - 1) // ROWS
    offs_q = pid // TILES_C % tiles_q * BOX_W + tl.arange(0, BOX_W)
    strip = pid // TILES_C // tiles_q
    p = strip % tiles_p * ROWS
    n = (strip // tiles_p).to(tl.int64)
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_c, mask_c, BLOCK_C)

    h = p * STRIDE_H - PAD_H
    w0 = offs_q * STRIDE_W - PAD_W
    row = W.to(tl.int64) * C  # elements from one input row to the next
    x_pixel = x_ptr + (n * H + h) * row + w0.to(tl.int64) * C
    w_filter = w_ptr + offs_c.to(tl.int64) * (R * S)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BOX_W, BLOCK_C), tl.float32),)
    for s in range(S):
        w = w0 + s * DILATION_W
        inside_w = (w >= 0) & (w < W)
        rows = ()
        for i in tl.static_range(READ):  # the compiler drops those that no tap reads
            # Not `&` of a number and a vector, which Triton 3.9's interpreter makes an integer.
            inside = tl.where((h + i >= 0) & (h + i < H), inside_w, False)
            x = tl.load(
                (x_pixel + (i * row + s * DILATION_W * C))[:, None] + offs_c[None, :],
                mask=inside[:, None] & mask_c[None, :],
                other=0.0,
            )  # [BOX_W, BLOCK_C]
            rows = rows + (x,)
        for r in tl.static_range(R):
            f = tl.load(w_filter + (r * S + s), mask=mask_c, other=0.0).to(tl.float32)
            more = ()
            for i in tl.static_range(ROWS):
                more = more + (sums[i] + rows[i * STRIDE_H + r * DILATION_H].to(tl.float32) * f[None, :],)
            sums = more

    mask_y = (offs_q < Q)[:, None] & mask_c[None, :]
    for i in tl.static_range(ROWS):
        y = sums[i] * scale[None, :] + shift[None, :]
        offs_y = ((n * P + p + i) * Q + offs_q)[:, None] * C + offs_c[None, :]
        mask = tl.where(p + i < P, mask_y, False)
        if res_ptr is not None:
            y += tl.load(res_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs_y, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


def conv_depthwise(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    batch_norm: BatchNorm,
    geometry: Geometry,
    residual: Tensor | None,
    activation: Activation,
    rows: int,
    box_w: int,
    block_c: int,
    num_warps: int,
) -> Launch:
    """The launch that writes `out` (N, C, P, Q) from `x` (N, C, H, W), dense in channels_last memory as `residual` is.

    `weight` (C, 1, R, S) is contiguous: it lies alike in both memory formats.
    """
    (n, c, p, q), (_, _, h, w), (_, _, r, s) = out.shape, x.shape, weight.shape
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _ = geometry
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": out, "res_ptr": residual, **batch_norm.arguments(),
        "H": h, "W": w, "P": p, "Q": q, "C": c, "R": r, "S": s,
        "STRIDE_H": stride_h, "STRIDE_W": stride_w, "PAD_H": pad_h, "PAD_W": pad_w,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w, "ACTIVATION": activation,
        "ROWS": rows, "BOX_W": box_w, "BLOCK_C": block_c,
    }  # fmt: skip
    programs = n * cdiv(p, rows) * cdiv(q, box_w) * cdiv(c, block_c)
    return Launch(conv_depthwise_kernel, (programs,), arguments, num_warps)
