"""Depthwise convolution + batch norm [+ residual] [+ activation]: each channel has a filter of its own.

There is nothing to multiply matrices of, so memory is the limit. A program computes a box of output rows x columns by
BLOCK_C channels, one filter tap after another. Neighbouring pixels share most of what they read, and find it in L1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .tiles import activate, scale_and_shift
from .values import Activation, BatchNorm, Geometry


@triton.jit(do_not_specialize=["H", "W", "P", "Q"])
def conv_depthwise_kernel(
    x_ptr, w_ptr, y_ptr, res_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, H, W, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rest = pid // TILES_C
    tiles_q = (Q + BOX_W - 1) // BOX_W
    tiles_p = (P + BOX_H - 1) // BOX_H
    pixel = tl.arange(0, BOX_H * BOX_W)
    q = rest % tiles_q * BOX_W + pixel % BOX_W
    p = rest // tiles_q % tiles_p * BOX_H + pixel // BOX_W
    n = (rest // (tiles_q * tiles_p)).to(tl.int64)
    mask_m = (p < P) & (q < Q)
    scale, shift = scale_and_shift(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask_c)

    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    row = W.to(tl.int64) * C  # elements from one input row to the next
    x_pixel = x_ptr + (n * H + h0) * row + w0.to(tl.int64) * C
    w_filter = w_ptr + offs_c.to(tl.int64) * (R * S)
    acc = tl.zeros((BOX_H * BOX_W, BLOCK_C), tl.float32)
    for r in range(R):
        h = h0 + r * DILATION_H
        inside_h = (h >= 0) & (h < H)
        for s in range(S):
            w = w0 + s * DILATION_W
            inside = inside_h & (w >= 0) & (w < W)
            x = tl.load(
                (x_pixel + (r * DILATION_H * row + s * DILATION_W * C))[:, None] + offs_c[None, :],
                mask=inside[:, None] & mask_c[None, :],
                other=0.0,
            )  # [pixels, BLOCK_C]
            f = tl.load(w_filter + (r * S + s), mask=mask_c, other=0.0)
            acc += x.to(tl.float32) * f.to(tl.float32)[None, :]
    acc = acc * scale[None, :] + shift[None, :]

    offs_y = ((n * P + p) * Q + q)[:, None] * C + offs_c[None, :]
    mask_y = mask_m[:, None] & mask_c[None, :]
    if res_ptr is not None:
        acc += tl.load(res_ptr + offs_y, mask=mask_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_y, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask_y)


def conv_depthwise(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    batch_norm: BatchNorm,
    geometry: Geometry,
    residual: Tensor | None,
    activation: Activation,
    box: tuple[int, int],
    block_c: int,
    num_warps: int,
) -> Launch:
    """The launch that writes `out` (N, C, P, Q) from `x` (N, C, H, W), dense in channels_last memory as `residual` is.

    `weight` (C, 1, R, S) is contiguous, `box` the rows and columns of a tile.
    """
    (n, c, p, q), (_, _, h, w), (_, _, r, s) = out.shape, x.shape, weight.shape
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _ = geometry
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": out, "res_ptr": residual, **batch_norm.arguments(),
        "H": h, "W": w, "P": p, "Q": q, "C": c, "R": r, "S": s,
        "STRIDE_H": stride_h, "STRIDE_W": stride_w, "PAD_H": pad_h, "PAD_W": pad_w,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w, "ACTIVATION": activation,
        "BOX_H": box[0], "BOX_W": box[1], "BLOCK_C": block_c,
    }  # fmt: skip
    programs = n * cdiv(p, box[0]) * cdiv(q, box[1]) * cdiv(c, block_c)
    return Launch(conv_depthwise_kernel, (programs,), arguments, num_warps)
