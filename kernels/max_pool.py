"""Max pooling over channels-last memory. Padding is -inf and NaN wins, as in PyTorch.

Of zeros in a window the positive one wins; in PyTorch the first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .tiles import maximum


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q"])
def max_pool_kernel(
    x_ptr, y_ptr, M, H, W, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_c = (pid % TILES_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_m = (pid // TILES_C) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    n = (offs_m // (P * Q)).to(tl.int64)
    h0 = (offs_m // Q) % P * STRIDE_H - PAD_H
    w0 = offs_m % Q * STRIDE_W - PAD_W
    row = W.to(tl.int64) * C
    x_pixel = x_ptr + (n * H + h0) * row + w0.to(tl.int64) * C
    acc = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32).to(x_ptr.dtype.element_ty)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        r = tap // S
        s = tap % S
        inside = (h0 + r >= 0) & (h0 + r < H) & (w0 + s >= 0) & (w0 + s < W) & mask_m
        v = tl.load(
            (x_pixel + (r * row + s * C))[:, None] + offs_c[None, :],
            mask=inside[:, None] & mask_c[None, :],
            other=float("-inf"),
        )  # [BLOCK_M, BLOCK_C]
        acc = maximum(acc, v).to(v.dtype)
    offs_y = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs_y, acc, mask=mask_m[:, None] & mask_c[None, :])


def max_pool(
    *,
    out: Tensor,
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    block_m: int,
    block_c: int,
    unroll: int,
    num_warps: int,
) -> Launch:
    """The launch that writes `out` (N, C, P, Q) from `x` (N, C, H, W), both dense in channels_last memory."""
    n, c, h, w = x.shape
    _, _, p, q = out.shape
    arguments = {
        "x_ptr": x, "y_ptr": out, "M": n * p * q, "H": h, "W": w, "P": p, "Q": q, "C": c,
        "R": kernel_size[0], "S": kernel_size[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PAD_H": padding[0], "PAD_W": padding[1], "BLOCK_M": block_m, "BLOCK_C": block_c, "UNROLL": unroll,
    }  # fmt: skip
    return Launch(max_pool_kernel, (cdiv(n * p * q, block_m) * cdiv(c, block_c),), arguments, num_warps)
