"""What the warp-specialised kernels share (compute capability 9.0), and all that differs between versions of Gluon.

Such a kernel is persistent: each program computes one tile after another. One warp issues TMA loads and keeps a ring of
slots filled; groups of four warps multiply what has arrived. Each slot has two barriers: `full` when its bytes have
arrived, `empty` when every group that reads it has finished with it. Where groups take tiles in turn, each has one in
`turns`, too: a group that came too early would wait for a slot's bytes two fillings ahead, which a barrier of one bit
cannot tell from those before.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import tiles
from .launch import round_to_tf32
from .values import Size, filter_view

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.9.0 renames them
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret  # 3.9.0 makes it public
group_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # 3.7.0 renames it
"""Waits for the threads of the group that calls it."""

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
"""Rows of at least 64 elements of 16 bits, as TMA stores them and wgmma reads them."""


@functools.lru_cache(maxsize=4096)
def descriptor_of(
    dtype: torch.dtype, shape: Size, strides: Size, block: Size, round_tf32: bool = False
) -> TensorDescriptor:
    """A descriptor without its memory. Rows of a block are swizzled as wgmma reads them."""
    row = min(block[-1] * dtype.itemsize, 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=row, element_bitwidth=8 * dtype.itemsize, rank=len(block))
    base = torch.empty(0, dtype=dtype, device="meta")
    desc = TensorDescriptor(base, list(shape), list(strides), list(block), layout)
    if round_tf32:
        round_to_tf32(desc)
    return desc


def filter_descriptor(size: Size, dtype: torch.dtype, block_k: int, block_c: int) -> TensorDescriptor:
    return descriptor_of(dtype, *filter_view(size, block_k, block_c), round_tf32=True)


@gluon.jit
def compute_here(x):
    """Volatile, as waits are: or else the compiler computes `x` after the next wait, while nobody multiplies."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


relu, activate, scale_and_shift, maximum = (
    gluon.jit(function.fn) for function in (tiles.relu, tiles.activate, tiles.scale_and_shift, tiles.maximum)
)


@gluon.jit
def store_partial(acc, partials_ptr, semaphores_ptr, tile, split, splits):
    """Store a program's partial sum of a tile, fp32, say so, and find out whether it is the last of `splits` to do so.

    Returns pointers to the elements of the tile's first part, behind which the others lie, and True for the last, which
    leaves the semaphore at zero. For the group that calls it: a tile is what one group computes.
    """
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    offs_m = gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    offs = gl.expand_dims(offs_m, 1) * N + gl.expand_dims(offs_n, 0)
    partials = partials_ptr + tile.to(gl.int64) * (splits * M * N)
    gl.store(partials + split * (M * N) + offs, acc)
    group_barrier()
    last = gl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        gl.store(semaphores_ptr + tile, 0)
    return partials + offs, last


@gluon.jit
def sum_partials(acc, partials_ptr, semaphores_ptr, tile, split, SPLIT_K: gl.constexpr):
    """As in `tiles.py`, for the group that calls it."""
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    partials, last = store_partial(acc, partials_ptr, semaphores_ptr, tile, split, SPLIT_K)
    if last:
        acc = gl.load(partials, cache_modifier=".cg")
        for i in range(1, SPLIT_K):
            acc += gl.load(partials + i * SIZE, cache_modifier=".cg")
    return acc, last


@gluon.jit
def put(y, result, RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr):
    """Put a result into the shared memory that it is stored from, where its residual, if any, lies."""
    if RESIDUAL:
        y += result.load(y.type.layout).to(gl.float32)
    result.store(activate(y, ACTIVATION).to(result.dtype))
    fence_async_shared()
