"""3x3 convolution of 64 channels that walks down a pixel column: each input tile is loaded once for three output rows.

A program owns one column of BLOCK_M images and a strip of output rows. The nine filter tiles stay in shared memory.
Each input row brings three tiles (left, middle, right), which feed three accumulators at once, one for each output row
that the input row belongs to: three loads for an output pixel instead of nine, 192 FLOP for a byte from L2.

In plain Triton, ptxas serialises wgmma as soon as accumulators roll from one turn to the next (C7514). Gluon says when
to wait: nine products, one wait. There is no interpreter for Gluon: this kernel has been compiled, read, and run on a
stand-in (`tests/gluon.py`), never on a GPU. No heuristic chooses it, and the tuner, which may, checks its answers bit
by bit first.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Their names since Triton 3.8, which 3.6 and 3.7 do not know yet; 3.9 has none of the older ones.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

STAGES = 2


@gluon.jit
def _load_row(x_desc, ring, full, turn, h, q, n0, last, BLOCK_M: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr):
    """Start loading the three tiles of input row h into the ring, unless h is beyond the last row needed."""
    slot = turn % STAGES
    wanted = h <= last
    mbarrier.expect(full.index(slot), 3 * BLOCK_M * C * 2, pred=wanted)
    for s in gl.static_range(3):
        tile = ring.index(slot * 3 + s)
        async_load(x_desc, [h, q + s - 1, n0, 0], full.index(slot), tile, pred=wanted)


@gluon.jit
def _batch_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_k):
    scale = gl.div_rn(1.0, gl.sqrt_rn(gl.load(var_ptr + offs_k).to(gl.float32) + eps))
    if gamma_ptr is not None:
        scale *= gl.load(gamma_ptr + offs_k).to(gl.float32)
    mean = gl.load(mean_ptr + offs_k).to(gl.float32)
    shift = 0.0 - mean * scale
    if beta_ptr is not None:
        shift = gl.load(beta_ptr + offs_k).to(gl.float32) - mean * scale
    return scale, shift


@gluon.jit(do_not_specialize=["N", "P", "Q", "STRIP"])
def conv_halo_kernel(
    x_desc, w_desc, y_desc, res_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, N, P, Q, STRIP,
    C: gl.constexpr, K: gl.constexpr, RELU: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    strips = (P + STRIP - 1) // STRIP
    q = pid % Q
    first = pid // Q % strips * STRIP
    last = gl.minimum(first + STRIP, P) - 1
    n0 = pid // (Q * strips) * BLOCK_M

    filters = gl.allocate_shared_memory(w_desc.dtype, [9, K, C], w_desc.layout)
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 3, 1, 1, BLOCK_M, C], x_desc.layout)
    result = gl.allocate_shared_memory(y_desc.dtype, [1, 1, BLOCK_M, K], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.expect(ready, 9 * K * C * 2)
    for tap in gl.static_range(9):
        async_load(w_desc, [0, tap * C], ready, filters.index(tap))
    for i in gl.static_range(STAGES - 1):
        _load_row(x_desc, ring, full, i, first - 1 + i, q, n0, last + 1, BLOCK_M, C, STAGES)

    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NUM_WARPS, 1], instr_shape=[16, K, 16])
    offs_k = gl.arange(0, K, layout=gl.SliceLayout(0, mma))
    offs_n = n0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, mma))
    scale, shift = _batch_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_k)
    mbarrier.wait(ready, 0)
    zero = gl.zeros((BLOCK_M, K), gl.float32, mma)
    upper = zero  # of output row h - 1, which input row h completes
    middle = zero
    for h in range(first - 1, last + 2):
        turn = h - (first - 1)
        slot = turn % STAGES
        lower = zero
        mbarrier.wait(full.index(slot), (turn // STAGES) & 1)
        for s in gl.static_range(3):
            a = ring.index(slot * 3 + s).reshape((BLOCK_M, C))
            lower = warpgroup_mma(a, filters.index(s).permute((1, 0)), lower, is_async=True)
            middle = warpgroup_mma(a, filters.index(3 + s).permute((1, 0)), middle, is_async=True)
            upper = warpgroup_mma(a, filters.index(6 + s).permute((1, 0)), upper, is_async=True)
        # The slot that the turn before has emptied: its products are done, as every turn ends with a wait.
        ahead = turn + STAGES - 1
        _load_row(x_desc, ring, full, ahead, first - 1 + ahead, q, n0, last + 1, BLOCK_M, C, STAGES)
        lower, middle, upper = warpgroup_mma_wait(0, deps=(lower, middle, upper))
        if h > first:
            y = upper * gl.expand_dims(scale, 0) + gl.expand_dims(shift, 0)
            if res_ptr is not None:
                pixel = (offs_n.to(gl.int64) * P + (h - 1)) * Q + q
                offs = gl.expand_dims(pixel, 1) * K + gl.expand_dims(offs_k, 0)
                y += gl.load(res_ptr + offs, mask=gl.expand_dims(offs_n < N, 1), other=0.0).to(gl.float32)
            if RELU:
                y = gl.where(y < 0, 0.0, y)
            tma.store_wait(0)
            result.reshape((BLOCK_M, K)).store(y.to(y_desc.dtype))
            fence_async_shared()
            async_store(y_desc, [h - 1, q, n0, 0], result)
        upper = middle
        middle = lower
    tma.store_wait(0)


def walked_pixels(x: Tensor, block_m: int) -> TensorDescriptor:
    """NHWC memory as (H, W, N, C), loaded as one pixel of `block_m` images."""
    n, c, h, w = x.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, [h, w, n, c], [w * c, c, h * w * c, 1], [1, 1, block_m, c], layout)


def tap_filters(weight: Tensor) -> TensorDescriptor:
    """KRSC memory as (K, R*S*C), loaded as one tap of every filter."""
    k, c, r, s = weight.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(weight, [k, r * s * c], [r * s * c, 1], [k, c], layout)
