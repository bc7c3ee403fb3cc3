"""Global average pooling and the linear layer behind it in one launch: a classifier's head, for few images.

One program computes BLOCK_K classes of one image. It averages the whole image itself, which for few images costs less
than the launch that it saves. The rest is a matrix-vector product, bound by reading the weights, so no tensor core is
used. For many images the two kernels `global_avg_pool` and `linear` read less.

As a dependent launch it loads weights and bias while the kernel before still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv


@triton.jit(do_not_specialize=["PIXELS"])
def avg_pool_linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, PIXELS,
    C: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = (tl.program_id(0) // TILES_K).to(tl.int64)
    offs_k = (tl.program_id(0) % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    w_row = w_ptr + offs_k.to(tl.int64) * C
    image = x_ptr + n * PIXELS * C
    offs_c = tl.arange(0, BLOCK_C)
    w = tl.load(w_row[:, None] + offs_c[None, :], mask=mask_k[:, None] & (offs_c < C)[None, :], other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # not before: so the next kernel begins when the one before this is done
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        if start > 0:
            w = tl.load(w_row[:, None] + offs_c[None, :], mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, PIXELS, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            offs_x = offs_p.to(tl.int64)[:, None] * C + offs_c[None, :]
            mask_x = (offs_p < PIXELS)[:, None] & mask_c[None, :]
            total += tl.sum(tl.load(image + offs_x, mask=mask_x, other=0.0).to(tl.float32), 0)  # [BLOCK_C]
        # Rounded to the tensors' dtype, as the pooled tensor between the two layers would be.
        mean = tl.div_rn(total, PIXELS.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
        acc += tl.sum(w.to(tl.float32) * mean[None, :], 1)
    if bias_ptr is not None:
        acc += bias
    tl.store(y_ptr + n * K + offs_k, acc.to(y_ptr.dtype.element_ty), mask=mask_k)


def avg_pool_linear(
    *, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, block_p: int, block_k: int, block_c: int,
    num_warps: int, dependent: bool = False,
) -> Launch:  # fmt: skip
    """The launch that writes `out` (N, K) from `x` (N, C, H, W), `weight` (K, C) and `bias` (K,).

    `x` is dense in channels_last memory, `weight` row-major, `out` row-major. `dependent`: see `Launch`.
    """
    n, c, h, w = x.shape
    k = weight.shape[0]
    arguments = {
        "x_ptr": x, "w_ptr": weight, "bias_ptr": bias, "y_ptr": out, "PIXELS": h * w, "C": c, "K": k,
        "BLOCK_P": block_p, "BLOCK_K": block_k, "BLOCK_C": block_c,
        "DEPENDENT": dependent,
    }  # fmt: skip
    return Launch(avg_pool_linear_kernel, (n * cdiv(k, block_k),), arguments, num_warps, dependent=dependent)
