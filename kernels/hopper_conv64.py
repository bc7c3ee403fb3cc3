"""3x3 convolution of 64 channels for Hopper (compute capability 9.0): warp-specialised and persistent, in Gluon.

A tile is two output pixels, one above the other, of BOX_N images and all 64 filters, which stay in shared memory: 4 x 3
input pixels feed 18 products. One warp loads (TMA) the input pixels in turn, each into a slot. Two groups of four warps
take tiles in turn (ping-pong, as in `hopper_conv.py`): one multiplies, into an accumulator for each pixel, while the
other stores its results. Filters are the rows of a product and pixels its columns, so a product reads 64 rows and BOX_N
columns from shared memory: at 128 images three quarters of what pixels as rows would read.

A residual is loaded into the buffers from which the result is stored. A group has one buffer a pixel: filters, buffers
and five slots of 128 images take 216 of 227 KiB.
"""

from __future__ import annotations

import functools

import torch
import triton.language.extra.cuda as cuda
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

from .hopper import SWIZZLED, async_load, async_store, group_barrier, put, reinterpret, scale_and_shift
from .hopper_conv import filter_descriptor, pixel_descriptor
from .launch import Launch, cdiv, with_base
from .values import Activation, ConvConfig, Convolution, Size

SLOTS = gl.constexpr(12)
"""Input pixels of a tile: four rows of three."""
RESIDUAL_AT = gl.constexpr(9)
"""The input pixel behind which a tile's residual is loaded: by then its group has stored the tile before, or nearly."""


@gluon.jit
def work_item(item, tiles_p, Q, BOX_N: gl.constexpr):
    """A tile's first output row, its column and its first image."""
    return item // Q % tiles_p * 2, item % Q, item // (Q * tiles_p) * BOX_N


@gluon.jit
def loader(
    x_desc, w_desc, res_desc, ring, filters, out, full, empty, ready, added, free, items, tiles_p, Q,
    BOX_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads the filters once, keeps the ring filled, and loads a tile's residual in between."""
    BYTES: gl.constexpr = BOX_N * 64 * 2
    mbarrier.expect(ready.index(0), 9 * 64 * 64 * 2)
    for tap in range(9):
        async_load(w_desc, [tap, 0, 0], ready.index(0), filters.index(tap))
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()  # not before: so the next kernel begins when the one before this is done
    i = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        p, q, n = work_item(item, tiles_p, Q, BOX_N)
        for j in range(SLOTS):
            slot = i % STAGES
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES)
            async_load(x_desc, [p + j // 3 - 1, q + j % 3 - 1, n, 0], full.index(slot), ring.index(slot))
            if res_desc is not None:
                if j == RESIDUAL_AT:
                    group = turn % 2
                    mbarrier.wait(free.index(group), (turn // 2 & 1) ^ 1)
                    mbarrier.expect(added.index(group), 2 * BYTES)
                    for row in range(2):
                        async_load(res_desc, [p + row, q, n, 0], added.index(group), out.index(2 * group + row))
            i += 1
        turn += 1


@gluon.jit
def multiply_pixel(pixels, filters, full, empty, i, lo, hi, ROW: gl.constexpr, s, FIRST: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Begin the products of slot i: with filter row ROW for the upper output pixel, with ROW - 1 for the lower.

    Then the slot before is given back. What an accumulator's FIRST product overwrites is not read.
    """
    LO: gl.constexpr = ROW < 3
    HI: gl.constexpr = ROW > 0
    slot = i % STAGES
    mbarrier.wait(full.index(slot), i // STAGES & 1)
    b = pixels.index(slot).permute((1, 0))
    if LO:
        lo = warpgroup_mma(filters.index(ROW * 3 + s), b, lo, use_acc=not FIRST or ROW > 0, is_async=True)
    if HI:
        hi = warpgroup_mma(filters.index(ROW * 3 + s - 3), b, hi, use_acc=not FIRST or ROW > 1, is_async=True)
    lo, hi = warpgroup_mma_wait(LO + HI, deps=(lo, hi))
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=ROW + s > 0)
    return lo, hi, i + 1


@gluon.jit
def multiply_row(pixels, filters, full, empty, i, lo, hi, ROW: gl.constexpr, STAGES: gl.constexpr):
    """The products of a row of three input pixels."""
    lo, hi, i = multiply_pixel(pixels, filters, full, empty, i, lo, hi, ROW, 0, True, STAGES)
    for s in range(1, 3):
        lo, hi, i = multiply_pixel(pixels, filters, full, empty, i, lo, hi, ROW, s, False, STAGES)
    return lo, hi, i


@gluon.jit
def multiplier(
    group: gl.constexpr, y_desc, pixels, filters, out, full, empty, ready, turns, added, free,
    mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, items, tiles_p, Q,
    RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, BOX_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BOX_N, 16])
    offs_k = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    scale, shift = scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, offs_k < 64)
    scale, shift = gl.expand_dims(scale, 1), gl.expand_dims(shift, 1)
    results = reinterpret(out, y_desc.dtype, [4, BOX_N, 64], SWIZZLED)
    cuda.gdc_wait()
    mbarrier.wait(ready.index(0), 0)
    turn = 0  # of this group
    for item in range(gl.program_id(0) + group * gl.num_programs(0), items, 2 * gl.num_programs(0)):
        p, q, n = work_item(item, tiles_p, Q, BOX_N)
        i = (2 * turn + group) * SLOTS
        lo = gl.zeros((64, BOX_N), gl.float32, mma)  # not read
        hi = lo
        mbarrier.wait(turns.index(group), (turn & 1) ^ (1 - group))
        for row in gl.static_range(4):
            lo, hi, i = multiply_row(pixels, filters, full, empty, i, lo, hi, row, STAGES)
        mbarrier.arrive(turns.index(1 - group), count=1)
        lo, hi = warpgroup_mma_wait(0, deps=(lo, hi))
        mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
        if RESIDUAL:
            mbarrier.wait(added.index(group), turn & 1)
        put(lo * scale + shift, results.index(2 * group).permute((1, 0)), RESIDUAL, ACTIVATION)
        put(hi * scale + shift, results.index(2 * group + 1).permute((1, 0)), RESIDUAL, ACTIVATION)
        async_store(y_desc, [p + 1, q, n, 0], out.index(2 * group + 1))  # last put, first out: one barrier
        async_store(y_desc, [p, q, n, 0], out.index(2 * group))
        tma.store_wait(0)  # while the other group multiplies
        group_barrier()
        if RESIDUAL:
            mbarrier.arrive(free.index(group), count=1)
        turn += 1


@gluon.jit(do_not_specialize=["items", "P", "Q"])
def hopper_conv64_kernel(
    x_desc, w_desc, y_desc, res_desc, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, items, P, Q,
    ACTIVATION: gl.constexpr, BOX_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    RESIDUAL: gl.constexpr = res_desc is not None
    tiles_p = (P + 1) // 2
    ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, x_desc.layout)
    filters = gl.allocate_shared_memory(w_desc.dtype, [9] + w_desc.block_shape, w_desc.layout)
    out = gl.allocate_shared_memory(y_desc.dtype, [4] + y_desc.block_shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
        mbarrier.init(added.index(group), count=1)
        mbarrier.init(free.index(group), count=1)
    fence_async_shared()
    pixels = reinterpret(ring, x_desc.dtype, [STAGES, BOX_N, 64], SWIZZLED)
    weights = reinterpret(filters, x_desc.dtype, [9, 64, 64], SWIZZLED)
    gl.warp_specialize([
        (multiplier, (
            group, y_desc, pixels, weights, out, full, empty, ready, turns, added, free,
            mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
            items, tiles_p, Q, RESIDUAL, ACTIVATION, BOX_N, STAGES,
        )) if group < 2 else (loader, (
            x_desc, w_desc, res_desc, ring, filters, out, full, empty, ready, added, free, items, tiles_p, Q,
            BOX_N, STAGES,
        ))
        for group in (0, 1, 2)
    ], worker_num_warps=[4, 1], worker_num_regs=[232, 40])  # as in `hopper_conv_kernel`  # fmt: skip


def hopper_conv64(call: Convolution) -> Launch:
    """The launch of at most `programs` programs.

    It asks for fp16 or bf16, 64 channels and 64 filters of 3x3, stride 1, padding 1, no shortcut (None), 16-byte
    aligned pointers, and a `config` with a box of two rows of one pixel of 32, 64 or 128 images, which does not split
    the reduction: `partials` and `semaphores` are None.
    """
    x, weight, out, residual = call.x, call.weight, call.out, call.residual
    constants, (x_desc, w_desc, y_desc), items = _constants(
        x.shape, weight.shape, out.shape, x.dtype, call.activation, call.config
    )
    arguments = {
        "x_desc": with_base(x_desc, x), "w_desc": with_base(w_desc, weight), "y_desc": with_base(y_desc, out),
        "res_desc": None if residual is None else with_base(y_desc, residual),
        **call.batch_norm.arguments(), **constants,
    }  # fmt: skip
    return Launch(hopper_conv64_kernel, (min(call.programs, items),), arguments, num_warps=4)


@functools.lru_cache(maxsize=4096)
def _constants(
    x: Size, weight: Size, out: Size, dtype: torch.dtype, activation: Activation, config: ConvConfig
) -> tuple[dict[str, object], list[TensorDescriptor], int]:
    """What of a launch depends on sizes alone: constants, descriptors of x, weight and out, tiles."""
    n, _, p, q = out
    if config.box is None:
        raise ValueError(f"{config} has no box, expected one")
    box_n = config.box[2]
    x_desc = pixel_descriptor(x, dtype, 1, (1, 1, box_n), 64)
    y_desc = pixel_descriptor(out, dtype, 1, (1, 1, box_n), 64)
    items = cdiv(p, 2) * q * cdiv(n, box_n)
    constants: dict[str, object] = {
        "items": items, "P": p, "Q": q, "ACTIVATION": activation, "BOX_N": box_n, "STAGES": config.num_stages,
    }  # fmt: skip
    return constants, [x_desc, filter_descriptor(weight, dtype, 64, 64), y_desc], items
