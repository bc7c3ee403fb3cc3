"""Convolution for Hopper (compute capability 9.0): warp-specialised and persistent, in Gluon.

A tile is a box of output rows x columns x images by BLOCK_K filters. One warp loads (TMA). A step is a slab
of 128 bytes of channels under one filter tap; for each, it loads the input box shifted by the tap, and the filters. Two
groups of four warps multiply, in one of two ways. Both operands are read from shared memory whatever the form of the
box: no product has pixels in registers.

* Ping-pong: groups take tiles in turn, and give each other the turn with a tile's last product. While one
  stores its results, the other multiplies, so the tensor cores never wait but for a program's first bytes and last
  results. For programs of several tiles.
* Cooperative: each group has one half of a box. Both are done at the same time, and while they store their
  results nothing is multiplied; but a tile takes half as long to store, and its accumulators half the registers. So
  programs of one tile take this way, and what has accumulators for two: a shortcut, or tiles of 256 filters.

Under a 3x3 filter at stride 1, a box of two rows that groups share is loaded with the rows above and below it, once for
each column of taps, and each group multiplies one row. Four rows serve three taps, which is two thirds of the bytes of
three boxes.

A residual is loaded into the buffer from which the result is stored, two of which there are for each part of a tile:
the next tile's residual is loaded while this tile's result is stored. A shortcut's convolution is a second reduction
into accumulators of its own, through the same ring. With SPLIT_K programs a tile, each reduces an equal part of the
steps; see `tiles.sum_partials`.
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

from .hopper import (
    async_load,
    async_store,
    compute_here,
    descriptor_of,
    filter_descriptor,
    group_barrier,
    put,
    reinterpret,
    scale_and_shift,
    sum_partials,
)
from .launch import Launch, cdiv, with_base
from .values import (
    NO_BATCH_NORM,
    Activation,
    ConvConfig,
    Convolution,
    Geometry,
    Shortcut,
    Size,
    boxes_in_slot,
    pixel_view,
    taps_at_once,
)


@functools.lru_cache(maxsize=4096)
def pixel_descriptor(
    size: Size, dtype: torch.dtype, stride: int, box: tuple[int, int, int], block_c: int, round_tf32: bool = False
) -> TensorDescriptor:
    """A descriptor of images (N, C, H, W) that loads `box` (at stride 2: one row of it).

    Its dimensions are (N, H, W, C), or (H, W, N, C) where a box has several images; see `values.pixel_view`.
    """
    _, box_w, box_n = box
    _, *layout = pixel_view(size, stride, box if stride == 1 else (1, box_w, box_n), block_c)
    return descriptor_of(dtype, *layout, round_tf32)


def half_of(box: tuple[int, int, int]) -> tuple[int, int, int]:
    """One of two groups' part of a box: half of its first side that is longer than 1."""
    h, w, n = box
    if h > 1:
        return h // 2, w, n
    return (1, w // 2, n) if w > 1 else (1, 1, n // 2)


@gluon.jit
def work_item(item, P, Q, TILES_K: gl.constexpr, SPLIT_K: gl.constexpr,
              BOX_H: gl.constexpr, BOX_W: gl.constexpr, BOX_N: gl.constexpr, BLOCK_K: gl.constexpr):  # fmt: skip
    """An item: which part of a tile's steps, the tile, its first filter, row, column and image."""
    split = item % SPLIT_K
    tile = item // SPLIT_K
    k = tile % TILES_K * BLOCK_K
    rest = tile // TILES_K
    tiles_q = (Q + BOX_W - 1) // BOX_W
    tiles_p = (P + BOX_H - 1) // BOX_H
    q = rest % tiles_q * BOX_W
    p = rest // tiles_q % tiles_p * BOX_H
    n = rest // (tiles_q * tiles_p) * BOX_N
    return split, tile, k, p, q, n


@gluon.jit
def corner(p, q, n, c, BOX_N: gl.constexpr):
    """A box's first row, column, image and channel, in the order of its descriptor's dimensions."""
    if BOX_N > 1:
        first = (p, q, n, c)
    else:
        first = (n, p, q, c)
    return first


@gluon.jit
def load_pixels(desc, full, ring, slot, p, q, n, r, s, c,
                STRIDE: gl.constexpr, BOX_N: gl.constexpr, LOADS: gl.constexpr):  # fmt: skip
    """Ask for the input box under output box (p, q, n), shifted by r rows and s columns, in LOADS parts."""
    if STRIDE == 1:
        async_load(desc, corner(p + r, q + s, n, c, BOX_N), full, ring.index(slot))
    else:  # column 2q + s is number q + floor(s / 2) among those of its parity; s is -1, 0 or 1
        column = q + (s + 2) // 2 - 1
        parity = (s + 2) % 2
        for row in gl.static_range(LOADS):
            part = ring.index(slot * LOADS + row)
            if BOX_N > 1:
                async_load(desc, [(p + row) * 2 + r, column, parity, n, c], full, part)
            else:
                async_load(desc, [n, (p + row) * 2 + r, parity, column, c], full, part)


@gluon.jit
def load_filters(desc, full, ring, slot, step, k, COLUMNS: gl.constexpr, TAPS: gl.constexpr, BLOCK_C: gl.constexpr):
    """Ask for the filters of a step: TAPS taps, one under the other, of a slab of channels."""
    for i in gl.static_range(TAPS):
        tap = step % COLUMNS + i * COLUMNS
        async_load(desc, [tap, k, step // COLUMNS * BLOCK_C], full.index(slot), ring.index(slot * TAPS + i))


@gluon.jit
def loader(
    x_desc, w_desc, res_desc, short_x_desc, short_w_desc, x_ring, short_ring, w_ring, out, full, empty, added, free,
    items, P, Q,
    R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr, SHORT_STEPS: gl.constexpr, SHORT_STRIDE: gl.constexpr,
    SPLIT_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, TAPS: gl.constexpr, BOXES: gl.constexpr,
    PARTS: gl.constexpr, TILES_K: gl.constexpr,
    BOX_H: gl.constexpr, BOX_W: gl.constexpr, BOX_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """The warp that keeps the ring filled, and loads a tile's residual while its products are under way."""
    SIZE: gl.constexpr = x_desc.dtype.primitive_bitwidth // 8
    PIXELS: gl.constexpr = BOX_H * BOX_W * BOX_N
    BYTES: gl.constexpr = (PIXELS * BOXES + BLOCK_K * TAPS) * BLOCK_C * SIZE
    SHORT_BYTES: gl.constexpr = (PIXELS + BLOCK_K) * BLOCK_C * SIZE
    COLUMNS: gl.constexpr = R * S // TAPS
    AHEAD: gl.constexpr = STAGES if STAGES < STEPS else STEPS
    split, _, k, _, _, _ = work_item(gl.program_id(0), P, Q, TILES_K, SPLIT_K, BOX_H, BOX_W, BOX_N, BLOCK_K)
    for j in range(AHEAD):
        mbarrier.expect(full.index(j), BYTES)
        load_filters(w_desc, full, w_ring, j, split * STEPS + j, k, COLUMNS, TAPS, BLOCK_C)
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()  # not before: so the next kernel begins when the one before this is done
    i = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        split, _, k, p, q, n = work_item(item, P, Q, TILES_K, SPLIT_K, BOX_H, BOX_W, BOX_N, BLOCK_K)
        for j in range(STEPS):
            slot = i % STAGES
            step = split * STEPS + j  # channel slabs outside, taps inside: a slab's shifted reads stay close in time
            if i >= AHEAD:
                mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), BYTES)
                load_filters(w_desc, full, w_ring, slot, step, k, COLUMNS, TAPS, BLOCK_C)
            tap = step % COLUMNS
            c = step // COLUMNS * BLOCK_C
            load_pixels(x_desc, full.index(slot), x_ring, slot, p, q, n, tap // S - R // 2, tap % S - S // 2, c,
                        STRIDE, BOX_N, BOX_H)  # fmt: skip
            if res_desc is not None:
                if j == STEPS - 1:  # by now results of the last tile but one have left the buffers, or will soon
                    for part in gl.static_range(PARTS):
                        buffer = turn % 2 * PARTS + part
                        h, w, m = offset_of(part, PARTS, BOX_H, BOX_W, BOX_N)
                        mbarrier.wait(free.index(buffer), (turn // 2 & 1) ^ 1)
                        mbarrier.expect(added.index(buffer), PIXELS * BLOCK_K * SIZE // PARTS)
                        at = corner(p + h, q + w, n + m, k, BOX_N)
                        async_load(res_desc, at, added.index(buffer), out.index(buffer))
            i += 1
        if short_x_desc is not None:
            if split == SPLIT_K - 1:
                for j in range(SHORT_STEPS):
                    slot = i % STAGES
                    mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
                    mbarrier.expect(full.index(slot), SHORT_BYTES)
                    load_pixels(short_x_desc, full.index(slot), short_ring, slot * BOXES, p, q, n, 0, 0, j * BLOCK_C,
                                SHORT_STRIDE, BOX_N, BOX_H)  # fmt: skip
                    async_load(short_w_desc, [0, k, j * BLOCK_C], full.index(slot), w_ring.index(slot * TAPS))
                    i += 1
        turn += 1


@gluon.jit
def offset_of(part: gl.constexpr, PARTS: gl.constexpr,
              BOX_H: gl.constexpr, BOX_W: gl.constexpr, BOX_N: gl.constexpr):  # fmt: skip
    """Where a part of the box begins: row, column, image."""
    if BOX_H > 1:
        offset = (part * (BOX_H // PARTS), 0, 0)
    elif BOX_W > 1:
        offset = (0, part * (BOX_W // PARTS), 0)
    else:
        offset = (0, 0, part * (BOX_N // PARTS))
    return offset


@gluon.jit
def multiply_slot(acc, part: gl.constexpr, pixels, filters, full, i, FIRST: gl.constexpr, STAGES: gl.constexpr,
                  SLOT_TAPS: gl.constexpr, TAPS: gl.constexpr, PIECES: gl.constexpr):  # fmt: skip
    """Begin TAPS products of slot i with a part's pixels, and wait for all before.

    A tile's FIRST product, with TAPS = 1, does not read `acc`.
    """
    slot = i % STAGES
    mbarrier.wait(full.index(slot), i // STAGES & 1)
    for tap in gl.static_range(TAPS):
        a = pixels.index(slot * PIECES + part + tap)
        b = filters.index(slot * SLOT_TAPS + tap).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(TAPS, deps=(acc,))


@gluon.jit
def reduce(group: gl.constexpr, pixels, filters, full, empty, turns, i, STEPS: gl.constexpr, STAGES: gl.constexpr,
           SLOT_TAPS: gl.constexpr, TAPS: gl.constexpr, BOXES: gl.constexpr, PINGPONG: gl.constexpr,
           PIXELS: gl.constexpr, BLOCK_K: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """This group's products of the next STEPS slots, TAPS of each, which has room for SLOT_TAPS.

    A slot is given back when the products of the next one are issued.
    """
    part: gl.constexpr = 0 if PINGPONG else group
    PIECES: gl.constexpr = BOXES if PINGPONG else 2 * BOXES
    acc = gl.zeros((PIXELS, BLOCK_K), gl.float32, mma)
    if PINGPONG:  # the other group has stopped: no time to make zeros
        acc = multiply_slot(acc, part, pixels, filters, full, i, True, STAGES, SLOT_TAPS, TAPS, PIECES)
        i += 1
    for j in range(1 if PINGPONG else 0, STEPS):
        acc = multiply_slot(acc, part, pixels, filters, full, i, False, STAGES, SLOT_TAPS, TAPS, PIECES)
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=j > 0)
        i += 1
    if PINGPONG:
        mbarrier.arrive(turns.index(1 - group), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
    return acc, i


@gluon.jit
def normalised(acc, scale, shift, mma: gl.constexpr):
    """Batch norm of an accumulator; `scale` and `shift` are spread over the threads anew."""
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    scale = gl.expand_dims(gl.convert_layout(scale, columns), 0)
    return acc * scale + gl.expand_dims(gl.convert_layout(shift, columns), 0)


@gluon.jit
def multiplier(
    group: gl.constexpr, y_desc, pixels, filters, out, full, empty, turns, added, free,
    mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps, partials_ptr, semaphores_ptr,
    items, P, Q,
    K: gl.constexpr, RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
    SHORT_STEPS: gl.constexpr, SPLIT_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, TAPS: gl.constexpr,
    BOXES: gl.constexpr, PINGPONG: gl.constexpr, TILES_K: gl.constexpr,
    BOX_H: gl.constexpr, BOX_W: gl.constexpr, BOX_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One of the two groups that multiply."""
    PARTS: gl.constexpr = 1 if PINGPONG else 2
    APART: gl.constexpr = 2 if PINGPONG else 1  # a group's tiles
    PIXELS: gl.constexpr = BOX_H * BOX_W * BOX_N // PARTS
    DEPTH: gl.constexpr = 256 // y_desc.dtype.primitive_bitwidth
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, DEPTH]
    )
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    h, w, m = offset_of(0 if PINGPONG else group, PARTS, BOX_H, BOX_W, BOX_N)
    turn = group if PINGPONG else 0
    i = turn * STEPS
    for item in range(gl.program_id(0) + turn * gl.num_programs(0), items, APART * gl.num_programs(0)):
        split, tile, k, p, q, n = work_item(item, P, Q, TILES_K, SPLIT_K, BOX_H, BOX_W, BOX_N, BLOCK_K)
        offs_k = k + gl.arange(0, BLOCK_K, layout=flat)
        scale, shift = scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, offs_k < K)
        if SPLIT_K > 1:
            shift = gl.where(split == 0, shift, 0.0)
        if SHORT_STEPS == 0:  # else registers are short
            scale, shift = compute_here(scale), compute_here(shift)
            p, q, n = compute_here(p), compute_here(q), compute_here(n)
        cuda.gdc_wait()  # in later turns it returns at once
        if PINGPONG:
            mbarrier.wait(turns.index(group), (turn // 2 & 1) ^ (1 - group))
        acc, i = reduce(group, pixels, filters, full, empty, turns, i, STEPS, STAGES, TAPS, TAPS, BOXES, PINGPONG,
                        PIXELS, BLOCK_K, mma)  # fmt: skip
        if not PINGPONG:
            tma.store_wait(0)  # the tile before has left its buffer
            group_barrier()  # which Triton 3.8 adds only where no residual's barrier is waited for below
        y = normalised(acc, scale, shift, mma)
        if SHORT_STEPS > 0:
            if split == SPLIT_K - 1:
                acc, i = reduce(group, pixels, filters, full, empty, turns, i, SHORT_STEPS, STAGES, TAPS, 1, BOXES,
                                PINGPONG, PIXELS, BLOCK_K, mma)  # fmt: skip
                scale, shift = scale_and_shift(
                    short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps, offs_k, offs_k < K
                )
                y += normalised(acc, scale, shift, mma)
        last = True
        if SPLIT_K > 1:
            y, last = sum_partials(y, partials_ptr, semaphores_ptr, tile * 2 + group, split, SPLIT_K)
        buffer = (turn % 2 * 2 if RESIDUAL and not PINGPONG else 0) + group
        result = out.index(buffer)
        if RESIDUAL:
            if not PINGPONG:
                mbarrier.arrive(free.index((turn + 1) % 2 * 2 + group), count=1, pred=turn > 0)
            mbarrier.wait(added.index(buffer), turn // 2 & 1)
        if last:
            put(y, reinterpret(result, y_desc.dtype, [PIXELS, BLOCK_K], pixels.layout), RESIDUAL, ACTIVATION)
            async_store(y_desc, corner(p + h, q + w, n + m, k, BOX_N), result)
        if PINGPONG:  # the other group multiplies
            tma.store_wait(0)
            group_barrier()
            if RESIDUAL:
                mbarrier.arrive(free.index(buffer), count=1)
            i += STEPS
        turn += APART
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "P", "Q"])
def hopper_conv_kernel(
    x_desc, w_desc, y_desc, res_desc, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    short_x_desc, short_w_desc, short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps,
    partials_ptr, semaphores_ptr, items, P, Q,
    C: gl.constexpr, K: gl.constexpr, R: gl.constexpr, S: gl.constexpr, STRIDE: gl.constexpr,
    SHORT_C: gl.constexpr, SHORT_STRIDE: gl.constexpr, ACTIVATION: gl.constexpr, SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr, TAPS: gl.constexpr, BOXES: gl.constexpr, PINGPONG: gl.constexpr,
    BOX_H: gl.constexpr, BOX_W: gl.constexpr, BOX_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    gl.static_assert(not PINGPONG or (SPLIT_K, TAPS, SHORT_C) == (1, 1, 0), "ping-pong is of plain tiles")
    PARTS: gl.constexpr = 1 if PINGPONG else 2
    RESIDUAL: gl.constexpr = res_desc is not None
    TILES_K: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEPS: gl.constexpr = R * S // TAPS * ((C + BLOCK_C - 1) // BLOCK_C) // SPLIT_K
    SHORT_STEPS: gl.constexpr = (SHORT_C + BLOCK_C - 1) // BLOCK_C
    BUFFERS: gl.constexpr = 4 if RESIDUAL and not PINGPONG else 2
    LOADS: gl.constexpr = 1 if STRIDE == 1 else BOX_H
    PIXELS: gl.constexpr = BOX_H * BOX_W * BOX_N
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * LOADS] + x_desc.block_shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES * TAPS] + w_desc.block_shape, w_desc.layout)
    out = gl.allocate_shared_memory(y_desc.dtype, [BUFFERS] + y_desc.block_shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(4):
        mbarrier.init(added.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    rows: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=x_desc.dtype.primitive_bitwidth, rank=2
    )
    pixels = reinterpret(x_ring, x_desc.dtype, [STAGES * BOXES * PARTS, PIXELS // PARTS, BLOCK_C], rows)
    filters = reinterpret(w_ring, x_desc.dtype, [STAGES * TAPS, BLOCK_K, BLOCK_C], rows)
    short_ring = x_ring
    if short_x_desc is not None:
        SHORT_LOADS: gl.constexpr = 1 if SHORT_STRIDE == 1 else BOX_H
        short_ring = reinterpret(
            x_ring,
            x_desc.dtype,
            [STAGES * BOXES * SHORT_LOADS] + short_x_desc.block_shape,
            short_x_desc.layout,
        )
    # Registers of a thread, most for accumulators: 232 in each group that multiplies, 40 in the loader's, which is
    # four warps, too. Together they are 504 of the 512 that a multiprocessor has for 4 x 32 threads.
    gl.warp_specialize([
        (multiplier, (
            group, y_desc, pixels, filters, out, full, empty, turns, added, free,
            mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
            short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps,
            partials_ptr, semaphores_ptr,
            items, P, Q, K, RESIDUAL, ACTIVATION, SHORT_STEPS, SPLIT_K, STEPS, STAGES, TAPS, BOXES, PINGPONG, TILES_K,
            BOX_H, BOX_W, BOX_N, BLOCK_K,
        )) if group < 2 else (loader, (
            x_desc, w_desc, res_desc, short_x_desc, short_w_desc, x_ring, short_ring, w_ring, out, full, empty,
            added, free, items, P, Q, R, S, STRIDE, SHORT_STEPS, SHORT_STRIDE, SPLIT_K, STEPS, STAGES, TAPS, BOXES,
            PARTS, TILES_K, BOX_H, BOX_W, BOX_N, BLOCK_K, BLOCK_C,
        ))
        for group in (0, 1, 2)
    ], worker_num_warps=[4, 1], worker_num_regs=[232, 40])  # fmt: skip


def hopper_conv(call: Convolution) -> Launch:
    """The launch of at most `programs` programs; ping-pong where `config.kernel` says so.

    It asks for fp16, bf16, or fp32 that may be multiplied as TF32, filters 1x1 or 3x3, padding R // 2, stride 1 or 2
    (at 2 an even input width), 16-byte aligned pointers and channel rows. If `config` splits the reduction, a tile has
    two of `semaphores`. Ping-pong takes 16-bit types, no shortcut, no split, and tiles of at most 128 x 128.
    """
    x, weight, out, residual, config = call.x, call.weight, call.out, call.residual, call.config
    constants, (x_desc, w_desc, y_desc), items = _constants(
        x.shape, weight.shape, out.shape, x.dtype, call.geometry, call.activation, config
    )
    arguments = {
        "x_desc": with_base(x_desc, x), "w_desc": with_base(w_desc, weight), "y_desc": with_base(y_desc, out),
        "res_desc": None if residual is None else with_base(y_desc, residual),
        **call.batch_norm.arguments(), **_shortcut_arguments(call.shortcut, config),
        "partials_ptr": call.partials, "semaphores_ptr": call.semaphores, **constants,
    }  # fmt: skip
    return Launch(hopper_conv_kernel, (min(call.programs, items),), arguments, num_warps=4)


@functools.lru_cache(maxsize=4096)
def _constants(
    x: Size, weight: Size, out: Size, dtype: torch.dtype, geometry: Geometry, activation: Activation, config: ConvConfig
) -> tuple[dict[str, object], list[TensorDescriptor], int]:
    """What of a launch depends on sizes alone: constants, descriptors of x, weight and out, pieces of work."""
    (n, _, p, q), (k, c, r, s) = out, weight
    box, stride, block_k, block_c = config.box, geometry.stride[0], config.block_k, config.block_c
    if box is None:
        raise ValueError(f"{config} has no box, expected one")
    box_h, box_w, box_n = box
    pingpong = config.kernel == "hopper_pingpong"
    taps = 1 if pingpong else taps_at_once(box, r, stride)
    x_desc = pixel_descriptor(x, dtype, stride, (box_h + taps - 1, box_w, box_n), block_c, round_tf32=True)
    y_desc = pixel_descriptor(out, dtype, 1, box if pingpong else half_of(box), block_k)
    items = cdiv(p, box_h) * cdiv(q, box_w) * cdiv(n, box_n) * cdiv(k, block_k) * config.split_k
    constants: dict[str, object] = {
        "items": items, "P": p, "Q": q, "C": c, "K": k, "R": r, "S": s, "STRIDE": stride, "ACTIVATION": activation,
        "SPLIT_K": config.split_k, "STAGES": config.num_stages, "TAPS": taps, "BOXES": boxes_in_slot(taps),
        "PINGPONG": pingpong,
        "BOX_H": box_h, "BOX_W": box_w, "BOX_N": box_n, "BLOCK_K": block_k, "BLOCK_C": block_c,
    }  # fmt: skip
    return constants, [x_desc, filter_descriptor(weight, dtype, block_k, block_c), y_desc], items


def _shortcut_arguments(shortcut: Shortcut | None, config: ConvConfig) -> dict[str, object]:
    if shortcut is None:
        return _NO_SHORTCUT
    x, weight, batch_norm, (stride, _) = shortcut
    x_desc = pixel_descriptor(x.shape, x.dtype, stride, config.box, config.block_c, round_tf32=True)
    w_desc = filter_descriptor(weight.shape, weight.dtype, config.block_k, config.block_c)
    return {
        "short_x_desc": with_base(x_desc, x), "short_w_desc": with_base(w_desc, weight),
        **batch_norm.arguments("short_"), "SHORT_C": x.shape[1], "SHORT_STRIDE": stride,
    }  # fmt: skip


_NO_SHORTCUT: dict[str, object] = {
    "short_x_desc": None, "short_w_desc": None, **NO_BATCH_NORM.arguments("short_"), "SHORT_C": 0, "SHORT_STRIDE": 1,
}  # fmt: skip
