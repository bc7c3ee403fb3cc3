"""Global average pooling over channels-last memory: fp32 sums in a fixed order, divided once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv


@triton.jit(do_not_specialize=["PIXELS"])
def global_avg_pool_kernel(x_ptr, y_ptr, PIXELS, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = (pid // TILES_C).to(tl.int64)
    offs_c = (pid % TILES_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    image = x_ptr + n * PIXELS * C
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, PIXELS, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        offs_x = offs_p.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask_x = (offs_p < PIXELS)[:, None] & mask_c[None, :]
        acc += tl.load(image + offs_x, mask=mask_x, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    # The gather moves nothing. It spreads the sums, of which each thread has several, before they are divided.
    total = tl.gather(tl.sum(acc, 0), tl.arange(0, BLOCK_C), 0)
    mean = tl.div_rn(total, PIXELS.to(tl.float32))
    tl.store(y_ptr + n * C + offs_c, mean.to(y_ptr.dtype.element_ty), mask=mask_c)


def global_avg_pool(*, out: Tensor, x: Tensor, block_p: int, block_c: int, num_warps: int) -> Launch:
    """The launch that writes `out` (N, C, 1, 1) from `x` (N, C, H, W), dense in channels_last memory."""
    n, c, h, w = x.shape
    arguments = {"x_ptr": x, "y_ptr": out, "PIXELS": h * w, "C": c, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return Launch(global_avg_pool_kernel, (n * cdiv(c, block_c),), arguments, num_warps)
