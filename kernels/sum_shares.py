"""The other way to end a shared reduction: a second launch sums the shares, in their order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .tiles import begin, relu


@triton.jit(do_not_specialize=["NUMEL"])
def sum_shares_kernel(
    shares_ptr, res_ptr, y_ptr, NUMEL, SPLIT_K: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    begin()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUMEL
    acc = tl.load(shares_ptr + offs, mask=mask, other=0.0)  # [BLOCK]
    for i in tl.static_range(1, SPLIT_K):
        acc += tl.load(shares_ptr + NUMEL.to(tl.int64) * i + offs, mask=mask, other=0.0)
    if res_ptr is not None:
        acc += tl.load(res_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def sum_shares(
    *, out: Tensor, shares: Tensor, residual: Tensor | None, relu: bool, block: int, num_warps: int
) -> Launch:
    """The launch that writes `out = relu(shares.sum(0) + residual)`.

    `shares` is fp32 with as many elements as `out` in each row, in the memory order that `out` and `residual` share.
    """
    arguments = {
        "shares_ptr": shares, "res_ptr": residual, "y_ptr": out, "NUMEL": out.numel(), "SPLIT_K": shares.shape[0],
        "RELU": relu, "BLOCK": block,
    }  # fmt: skip
    return Launch(sum_shares_kernel, (cdiv(out.numel(), block),), arguments, num_warps)
