"""Residual add + ReLU, elementwise over dense memory, for where no convolution's epilogue can do the add."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, cdiv
from .tiles import relu


@triton.jit(do_not_specialize=["NUMEL"])
def add_relu_kernel(x_ptr, other_ptr, y_ptr, NUMEL, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numel = NUMEL // VECTOR * VECTOR  # the same, but seen to be a multiple: so VECTOR elements have one mask
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    other = tl.load(other_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, relu(x + other).to(y_ptr.dtype.element_ty), mask=mask)


def add_relu(*, out: Tensor, x: Tensor, other: Tensor, block: int, num_warps: int) -> Launch:
    """The launch that writes `out = relu(x + other)`; the three share shape, dtype and dense memory order."""
    numel = x.numel()
    vector = 8 if numel % 8 == 0 else 1
    arguments = {"x_ptr": x, "other_ptr": other, "y_ptr": out, "NUMEL": numel, "BLOCK": block, "VECTOR": vector}
    return Launch(add_relu_kernel, (cdiv(numel, block),), arguments, num_warps)
