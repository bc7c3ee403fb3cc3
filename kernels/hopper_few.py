"""Convolution for few images on Hopper (compute capability 9.0), in Gluon. It is made for short latency.

A program computes a box of output rows x 8 columns of one image by 64 filters, over all taps of its part of the slabs
of 64 channels, most often one slab. (8 pixels are one pattern of swizzled shared memory.) Under a 1x1 filter it may be
a run of pixels instead. All that it reads fits shared memory. So there is no loop, no slot is used twice, and every
load is issued as early as possible:

* before it waits for the previous kernel: filters, batch norm, the descriptors of what that kernel writes;
* after the wait: the whole input and the residual. A product is issued as soon as its bytes arrive, and none is waited
  for before the next.

Filters are the rows of the products, so a product can have as few as 16 pixels. Programs that share a tile sum their
parts as in `tiles.sum_partials`. The numbers of channels, filters and programs are no compile-time constants, so half a
dozen compilations serve all convolutions of a network.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper import (
    activate,
    async_load,
    descriptor_of,
    filter_descriptor,
    scale_and_shift,
    store_partial,
)
from .launch import Launch, cdiv, with_base
from .values import MAX_SPLIT_K_OF_FEW, NO_BATCH_NORM, Activation, ConvConfig, Convolution, Geometry, Shortcut, Size

MAX_SPLIT_K = gl.constexpr(MAX_SPLIT_K_OF_FEW)


def in_a_row(size: Size, box: tuple[int, int, int]) -> Size:
    """Images (N, C, H, W) as they are; for a box of images alone, of one pixel each, as one row: (1, C, 1, N)."""
    return (1, size[1], 1, size[0]) if box[:2] == (1, 1) else size


def pixel_descriptor(
    size: Size, dtype: torch.dtype, stride: int, box: tuple[int, int, int], *, halo: bool
) -> TensorDescriptor:
    """A descriptor of images (N, C, H, W) that loads a box of pixels of 64 channels.

    The view is (N, H, W, C). At stride 2 with a halo, rows and columns are split by parity, and odd columns count as
    further channels: (N, H/2, 2, W/2, 2C). Without a halo the view has even rows and columns alone: (N, H/2, W/2, C).
    """
    n, c, h, w = in_a_row(size, box)
    rows, width = box[0], box[1] * box[2]
    if stride == 2 and halo:
        shape, strides = (n, h // 2, 2, w // 2, 2 * c), (h * w * c, 2 * w * c, w * c, 2 * c, 1)
        return descriptor_of(dtype, shape, strides, (1, rows, 1, width, 64))
    shape = (n, cdiv(h, stride), cdiv(w, stride), c)
    return descriptor_of(dtype, shape, (h * w * c, stride * w * c, stride * c, 1), (1, rows, width, 64))


@gluon.jit
def load_pixels(desc, full, part, n, p, q, r: gl.constexpr, s: gl.constexpr, c, C, PARITY: gl.constexpr):
    """Ask for the input box under output box (p, q) of image n, shifted by r rows and s columns, each -1, 0 or 1."""
    if PARITY:  # row 2p + r is number p + floor(r / 2) among those of its parity, columns alike
        async_load(desc, [n, p + (r + 2) // 2 - 1, (r + 2) % 2, q + (s + 2) // 2 - 1, c + (s + 2) % 2 * C], full, part)
    else:
        async_load(desc, [n, p + r, q + s, c], full, part)


@gluon.jit(do_not_specialize=["P", "Q", "C", "TILES_K", "SPLIT_K"])
def hopper_few_kernel(
    x_desc, w_desc, y_ptr, res_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    short_x_desc, short_w_desc, short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps,
    partials_ptr, semaphores_ptr, P, Q, C, TILES_K, SPLIT_K,
    R: gl.constexpr, STRIDE: gl.constexpr, SLABS: gl.constexpr, ACTIVATION: gl.constexpr,
    BOX_H: gl.constexpr, BOX_W: gl.constexpr,
):  # fmt: skip
    TAPS: gl.constexpr = R * R
    STEPS: gl.constexpr = SLABS * TAPS
    PIXELS: gl.constexpr = BOX_H * BOX_W
    BYTES: gl.constexpr = (64 + PIXELS) * 64 * 2  # of a step
    PARITY: gl.constexpr = STRIDE == 2 and R == 3
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIXELS, 16])
    spread: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # of [pixels, filters]: 16 bytes a thread
    split = gl.program_id(0) % SPLIT_K
    tile = gl.program_id(0) // SPLIT_K
    k = tile % TILES_K * 64
    rest = tile // TILES_K
    tiles_q = (Q + BOX_W - 1) // BOX_W
    tiles_p = (P + BOX_H - 1) // BOX_H
    q = rest % tiles_q * BOX_W
    p = rest // tiles_q % tiles_p * BOX_H
    n = rest // (tiles_q * tiles_p)

    # Each piece by itself: of one array, Triton has all warps wait for each other before the next piece is loaded.
    full = ()
    filters = ()
    pixels = ()
    for i in gl.static_range(STEPS + 2):
        full += (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(full[i], count=1)
    for _ in gl.static_range(STEPS):
        filters += (gl.allocate_shared_memory(w_desc.dtype, w_desc.block_shape, w_desc.layout),)
        pixels += (gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout),)
    fence_async_shared()

    # No kernel of a graph writes parameters; and what is no dependent launch begins when all before it is done.
    for i in gl.static_range(STEPS):
        mbarrier.expect(full[i], BYTES)
    for i in gl.static_range(STEPS):
        async_load(w_desc, [i % TAPS, k, (split * SLABS + i // TAPS) * 64], full[i], filters[i])
    if short_x_desc is not None:  # a part behind the last of the shortcut's channels gets zeros
        short_filters = gl.allocate_shared_memory(w_desc.dtype, w_desc.block_shape, w_desc.layout)
        short_pixels = gl.allocate_shared_memory(x_desc.dtype, short_x_desc.block_shape, short_x_desc.layout)
        mbarrier.expect(full[STEPS], BYTES)
        async_load(short_w_desc, [0, k, split * 64], full[STEPS], short_filters)
    # A box above the image reads nothing of it, but brings the descriptor near.
    near = full[STEPS + 1]
    mbarrier.expect(near, PIXELS * 64 * (2 if short_x_desc is None else 4))
    load_pixels(x_desc, near, pixels[0], 0, -BOX_H, 0, 0, 0, 0, C, PARITY)
    if short_x_desc is not None:
        load_pixels(short_x_desc, near, short_pixels, 0, -BOX_H, 0, 0, 0, 0, C, False)
    offs_k = k + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    everywhere = offs_k >= 0
    scale, shift = scale_and_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, everywhere)
    if short_x_desc is not None:
        short_scale, short_shift = scale_and_shift(
            short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps, offs_k, everywhere
        )
        shift += short_shift
    shift = gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(0, spread)), 0)
    mbarrier.wait(near, 0)

    cuda.gdc_wait()
    for i in gl.static_range(STEPS):
        c = (split * SLABS + i // TAPS) * 64
        load_pixels(x_desc, full[i], pixels[i], n, p, q, i % TAPS // R - R // 2, i % R - R // 2, c, C, PARITY)
    if short_x_desc is not None:
        load_pixels(short_x_desc, full[STEPS], short_pixels, n, p, q, 0, 0, split * 64, C, False)
    # Not before the wait: so the next kernel begins when the one before this is done. And its filters come after these.
    cuda.gdc_launch_dependents()
    mbarrier.wait(near, 0)  # again, which takes no time: without it ptxas has the last loads wait for what follows
    pixel = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, spread))
    offs_p = p + pixel // BOX_W
    offs_q = q + pixel % BOX_W
    offs_m = (n.to(gl.int64) * P + offs_p) * Q + offs_q
    column = k + gl.arange(0, 64, layout=gl.SliceLayout(0, spread))
    offs_y = gl.expand_dims(offs_m * (TILES_K * 64), 1) + gl.expand_dims(column, 0)
    inside = gl.expand_dims((offs_p < P) & (offs_q < Q), 1) & gl.expand_dims(column >= 0, 0)
    if res_ptr is not None:
        residual = gl.load(res_ptr + offs_y, mask=inside, other=0.0)

    acc = gl.zeros((64, PIXELS), gl.float32, mma)  # not read
    short = acc
    for i in gl.static_range(STEPS):
        mbarrier.wait(full[i], 0)
        a = filters[i].reshape((64, 64))
        b = pixels[i].reshape((PIXELS, 64)).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, use_acc=i > 0, is_async=True)
    if short_x_desc is not None:
        mbarrier.wait(full[STEPS], 0)
        a = short_filters.reshape((64, 64))
        b = short_pixels.reshape((PIXELS, 64)).permute((1, 0))
        short = warpgroup_mma(a, b, short, use_acc=False, is_async=True)
        acc, short = warpgroup_mma_wait(0, deps=(acc, short))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    acc *= gl.expand_dims(scale, 1)
    if short_x_desc is not None:
        acc += short * gl.expand_dims(short_scale, 1)
    y = gl.convert_layout(gl.permute(acc, (1, 0)), spread)

    last = True
    if partials_ptr is not None:
        partials, last = store_partial(y, partials_ptr, semaphores_ptr, tile, split, SPLIT_K)
        if last:
            y = gl.load(partials, cache_modifier=".cg")
            for i in gl.static_range(1, MAX_SPLIT_K):
                y += gl.load(partials + i * (PIXELS * 64), mask=inside & (i < SPLIT_K), other=0.0, cache_modifier=".cg")
    if last:
        y += shift
        if res_ptr is not None:
            y += residual.to(gl.float32)
        gl.store(y_ptr + offs_y, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


def hopper_few(call: Convolution) -> Launch:
    """The launch of a program for each part of each tile.

    It asks for fp16 or bf16, channels and filters in multiples of 64, filters 1x1 or 3x3, padding R // 2, stride 1 or 2
    (at 2, under 3x3, even rows and columns) and 16-byte aligned pointers. A shortcut has at most 64 channels a part.
    """
    x, weight, out, config = call.x, call.weight, call.out, call.config
    constants, (x_desc, w_desc), programs = _constants(
        x.shape, weight.shape, out.shape, x.dtype, call.geometry, call.activation, config
    )
    arguments = {
        "x_desc": with_base(x_desc, x), "w_desc": with_base(w_desc, weight), "y_ptr": out, "res_ptr": call.residual,
        **call.batch_norm.arguments(), **_shortcut_arguments(call.shortcut, config),
        "partials_ptr": call.partials, "semaphores_ptr": call.semaphores, **constants,
    }  # fmt: skip
    return Launch(hopper_few_kernel, (programs,), arguments, num_warps=4)


@functools.lru_cache(maxsize=4096)
def _constants(
    x: Size, weight: Size, out: Size, dtype: torch.dtype, geometry: Geometry, activation: Activation, config: ConvConfig
) -> tuple[dict[str, object], list[TensorDescriptor], int]:
    """What of a launch depends on sizes alone: numbers, descriptors of x and weight, programs."""
    (_, c, r, _), (stride, _), box = weight, geometry.stride, config.box
    if box is None:
        raise ValueError(f"{config} has no box, expected one")
    n, k, p, q = in_a_row(out, box)
    box_h, box_w = box[0], box[1] * box[2]
    programs = n * cdiv(p, box_h) * cdiv(q, box_w) * (k // 64) * config.split_k
    constants: dict[str, object] = {
        "P": p, "Q": q, "C": c, "TILES_K": k // 64, "SPLIT_K": config.split_k,
        "R": r, "STRIDE": stride, "SLABS": c // 64 // config.split_k, "ACTIVATION": activation,
        "BOX_H": box_h, "BOX_W": box_w,
    }  # fmt: skip
    views = [pixel_descriptor(x, dtype, stride, box, halo=r > 1), filter_descriptor(weight, dtype, 64, 64)]
    return constants, views, programs


def _shortcut_arguments(shortcut: Shortcut | None, config: ConvConfig) -> dict[str, object]:
    if shortcut is None or config.box is None:
        return _NO_SHORTCUT
    x, weight, batch_norm, (stride, _) = shortcut
    return {
        "short_x_desc": with_base(pixel_descriptor(x.shape, x.dtype, stride, config.box, halo=False), x),
        "short_w_desc": with_base(filter_descriptor(weight.shape, weight.dtype, 64, 64), weight),
        **batch_norm.arguments("short_"),
    }


_NO_SHORTCUT = {"short_x_desc": None, "short_w_desc": None, **NO_BATCH_NORM.arguments("short_")}
