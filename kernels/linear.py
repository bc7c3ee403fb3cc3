"""Fully connected layer: y = x @ weight.T + bias, accumulated in fp32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, M, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    offs_k = (pid % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_m = (pid // TILES_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_row = x_ptr + offs_m.to(tl.int64) * C
    w_row = w_ptr + offs_k.to(tl.int64) * C
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        a = tl.load(x_row[:, None] + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        b = tl.load(w_row[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_C] @ [BLOCK_C, BLOCK_K]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    offs_y = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def linear(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: str,
    block_m: int,
    block_k: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Launch:
    """The launch that writes `out` (M, K) from `x` (M, C), `weight` (K, C) and `bias` (K,), all row-major and dense."""
    m, c = x.shape
    k = weight.shape[0]
    arguments = {
        "x_ptr": x, "w_ptr": weight, "bias_ptr": bias, "y_ptr": out, "M": m, "C": c, "K": k,
        "PRECISION": precision, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": block_c,
    }  # fmt: skip
    return Launch(linear_kernel, (cdiv(m, block_m) * cdiv(k, block_k),), arguments, num_warps, num_stages)
