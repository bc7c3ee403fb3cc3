"""Convolution through tensor descriptors (sm_90 and newer): the M tile is a box of output rows x columns x images.

One descriptor load fetches the input box shifted by the filter tap; coordinates in the padding read as zero. The order
of dimensions (`values.pixel_view`) and the order of operands (SWAP, `values.has_several_sides`) are such that tensor
cores read pixels straight from shared memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, cdiv, round_to_tf32, with_base
from .tiles import activate, batch_norm_scale_shift, sum_partials
from .values import (
    NO_BATCH_NORM,
    Activation,
    ConvConfig,
    Convolution,
    Geometry,
    Shortcut,
    Size,
    filter_view,
    pixel_view,
)


@functools.lru_cache(maxsize=4096)
def pixel_descriptor(
    size: Size, dtype: torch.dtype, stride: int, box: tuple[int, int, int], block_c: int, round_tf32: bool = False
) -> tuple[TensorDescriptor, str]:
    """A descriptor of images (N, C, H, W) that loads `box` at `stride`, `block_c` channels at a time, and its view."""
    view, shape, strides, block = pixel_view(size, stride, box, block_c)
    return _descriptor(dtype, shape, strides, block, round_tf32), view


@functools.lru_cache(maxsize=4096)
def filter_descriptor(size: Size, dtype: torch.dtype, block_k: int, block_c: int, round_tf32: bool) -> TensorDescriptor:
    return _descriptor(dtype, *filter_view(size, block_k, block_c), round_tf32)


def _descriptor(dtype: torch.dtype, shape: Size, strides: Size, block: Size, round_tf32: bool) -> TensorDescriptor:
    """A descriptor without its memory."""
    base = torch.empty(0, dtype=dtype, device="meta")
    desc = TensorDescriptor(base, list(shape), list(strides), list(block))
    if round_tf32:
        round_to_tf32(desc)
    return desc


@triton.jit
def load_pixels(desc, p, q, n, r, s, c, STRIDE: tl.constexpr, VIEW: tl.constexpr, BLOCK_M: tl.constexpr):
    """The input box under output box (p, q, n), shifted by r rows and s columns, as [BLOCK_M, channels]."""
    if STRIDE == 1:
        if VIEW == "images":
            a = desc.load([p + r, q + s, n, c])
        else:
            a = desc.load([n, p + r, q + s, c])
    else:  # column 2q + s is number q + floor(s / 2) among those of its parity; s is -1, 0 or 1
        column = q + (s + 2) // 2 - 1
        parity = (s + 2) % 2
        if VIEW == "images":
            a = desc.load([p * 2 + r, column, parity, n, c])
        elif VIEW == "rows":
            a = desc.load([n, p * 2 + r, parity, column, c])
        else:
            a = desc.load([(r + 2) % 2, parity, p + (r + 2) // 2 - 1, column, c])
    return a.reshape(BLOCK_M, desc.block_shape[-1])


@triton.jit
def store_pixels(
    desc, y, p, q, n, k, VIEW: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BOX_N: tl.constexpr
):
    y = y.to(desc.dtype)
    if VIEW == "images":
        desc.store([p, q, n, k], y.reshape(BOX_H, BOX_W, BOX_N, desc.block_shape[-1]))
    else:
        desc.store([n, p, q, k], y.reshape(1, BOX_H, BOX_W, desc.block_shape[-1]))


@triton.jit
def load_filters(desc, k, tap, c):
    """Filters k .. at one tap, as [filters, channels]."""
    return desc.load([tap, k, c]).reshape(desc.block_shape[1], desc.block_shape[2])


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """Add the product of pixels [pixels, channels] and filters [filters, channels] to `acc`; SWAP turns `acc` round."""
    if SWAP:
        acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def box_offsets(
    p, q, n, P, Q, N, offs_k, mask_k, K: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BOX_N: tl.constexpr
):
    """Offsets and mask of output box (p, q, n) in NHWC memory, both [BLOCK_M, BLOCK_K].

    Loads through pointers need not be waited for as a descriptor's must: issued before a main loop, they have arrived
    behind it.
    """
    offs_m = tl.arange(0, BOX_H * BOX_W * BOX_N)
    n = n + offs_m % BOX_N
    q = q + offs_m // BOX_N % BOX_W
    p = p + offs_m // (BOX_N * BOX_W)
    inside = (n < N) & (q < Q) & (p < P)
    offs = ((n.to(tl.int64) * P + p) * Q + q)[:, None] * K + offs_k[None, :]
    return offs, inside[:, None] & mask_k[None, :]


@triton.jit(do_not_specialize=["N", "P", "Q"])
def conv_box_kernel(
    x_desc, w_desc, y_desc, res_desc, res_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    short_x_desc, short_w_desc, short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps,
    partials_ptr, semaphores_ptr, N, P, Q,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, VIEW: tl.constexpr, Y_VIEW: tl.constexpr,
    SHORT_C: tl.constexpr, SHORT_STRIDE: tl.constexpr, SHORT_VIEW: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SPLIT_K: tl.constexpr, SWAP: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, BOX_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BOX_H * BOX_W * BOX_N
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    split = tl.program_id(1)
    k0 = (pid % TILES_K) * BLOCK_K
    tile = pid // TILES_K
    tiles_q = tl.cdiv(Q, BOX_W)
    tiles_p = tl.cdiv(P, BOX_H)
    q0 = (tile % tiles_q) * BOX_W
    p0 = (tile // tiles_q % tiles_p) * BOX_H
    n0 = (tile // (tiles_q * tiles_p)) * BOX_N
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k, BLOCK_K)
    if res_ptr is not None:
        offs, mask = box_offsets(p0, q0, n0, P, Q, N, offs_k, mask_k, K, BOX_H, BOX_W, BOX_N)
        residual = tl.load(res_ptr + offs, mask=mask, other=0.0)

    acc = tl.zeros((BLOCK_K, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_K), tl.float32)
    STEPS: tl.constexpr = R * S * ((C + BLOCK_C - 1) // BLOCK_C)
    for j in range(STEPS // SPLIT_K):  # channel slabs outside, taps inside: a slab's shifted reads stay close in time
        i = split * (STEPS // SPLIT_K) + j
        tap = i % (R * S)
        c0 = i // (R * S) * BLOCK_C
        x = load_pixels(x_desc, p0, q0, n0, tap // S - R // 2, tap % S - S // 2, c0, STRIDE, VIEW, BLOCK_M)
        acc = multiply(x, load_filters(w_desc, k0, tap, c0), acc, SWAP, PRECISION)
    if SWAP:
        acc = acc.T
    if SPLIT_K > 1:
        shift = tl.where(split == 0, shift, 0.0)
    acc = acc * scale[None, :] + shift[None, :]

    if short_x_desc is not None and (SPLIT_K == 1 or split == SPLIT_K - 1):
        short = tl.zeros((BLOCK_K, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_K), tl.float32)
        for c0 in range(0, SHORT_C, BLOCK_C):
            x = load_pixels(short_x_desc, p0, q0, n0, 0, 0, c0, SHORT_STRIDE, SHORT_VIEW, BLOCK_M)
            short = multiply(x, load_filters(short_w_desc, k0, 0, c0), short, SWAP, PRECISION)
        if SWAP:
            short = short.T
        # Not before the loop: beside two accumulators, two more vectors would spill (sm_90: 255 registers against 216).
        short_scale, short_shift = batch_norm_scale_shift(
            short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps, offs_k, mask_k, BLOCK_K
        )
        acc += short * short_scale[None, :] + short_shift[None, :]

    if SPLIT_K > 1:
        acc, last = sum_partials(acc, partials_ptr, semaphores_ptr, pid, split, SPLIT_K, BLOCK_M, BLOCK_K)
        if not last:
            return
    if res_ptr is not None:
        acc += residual.to(tl.float32)
    if res_desc is not None:
        acc += load_pixels(res_desc, p0, q0, n0, 0, 0, k0, 1, Y_VIEW, BLOCK_M).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    store_pixels(y_desc, acc, p0, q0, n0, k0, Y_VIEW, BOX_H, BOX_W, BOX_N)


def conv_box(call: Convolution) -> Launch:
    """The launch through descriptors.

    They ask for filters 1x1 or 3x3, padding R // 2, stride 1 or 2, 16-byte aligned pointers and channel rows, and at
    stride 2 for an even input width and one box row (one image of even height: any). A box with several sides longer
    than 1 has to be swapped.
    """
    x, weight, out, residual, config = call.x, call.weight, call.out, call.residual, call.config
    constants, (x_desc, w_desc, y_desc), grid = _constants(
        x.shape, weight.shape, out.shape, x.dtype, call.geometry, call.activation, call.precision, config
    )
    early = residual if config.early_residual else None
    late = None if residual is early else residual
    arguments = {
        "x_desc": with_base(x_desc, x), "w_desc": with_base(w_desc, weight), "y_desc": with_base(y_desc, out),
        "res_desc": None if late is None else with_base(y_desc, late), "res_ptr": early,
        **call.batch_norm.arguments(), **_shortcut_arguments(call.shortcut, call.precision, config),
        "partials_ptr": call.partials, "semaphores_ptr": call.semaphores, **constants,
    }  # fmt: skip
    return Launch(conv_box_kernel, grid, arguments, config.num_warps, config.num_stages)


@functools.lru_cache(maxsize=4096)
def _constants(
    x: Size, weight: Size, out: Size, dtype: torch.dtype, geometry: Geometry, activation: Activation, precision: str,
    config: ConvConfig,
) -> tuple[dict[str, object], list[TensorDescriptor], tuple[int, int]]:  # fmt: skip
    """What of a launch depends on sizes alone: constants, the descriptors of x, weight and out, and the grid."""
    (n, _, p, q), (k, c, r, s) = out, weight
    box, stride, block_k, block_c = config.box, geometry.stride[0], config.block_k, config.block_c
    if box is None:
        raise ValueError(f"{config} has no box, expected one: conv_pointer.py takes the others")
    box_h, box_w, box_n = box
    round_tf32 = precision == "tf32"
    x_desc, view = pixel_descriptor(x, dtype, stride, box, block_c, round_tf32)
    y_desc, y_view = pixel_descriptor(out, dtype, 1, box, block_k)
    constants: dict[str, object] = {
        "N": n, "P": p, "Q": q, "C": c, "K": k, "R": r, "S": s, "STRIDE": stride, "VIEW": view, "Y_VIEW": y_view,
        "ACTIVATION": activation, "PRECISION": precision, "SPLIT_K": config.split_k, "SWAP": config.swap,
        "BOX_H": box_h, "BOX_W": box_w, "BOX_N": box_n, "BLOCK_K": block_k, "BLOCK_C": block_c,
    }  # fmt: skip
    tiles = cdiv(p, box_h) * cdiv(q, box_w) * cdiv(n, box_n) * cdiv(k, block_k)
    w_desc = filter_descriptor(weight, dtype, block_k, block_c, round_tf32)
    return constants, [x_desc, w_desc, y_desc], (tiles, config.split_k)


def _shortcut_arguments(shortcut: Shortcut | None, precision: str, config: ConvConfig) -> dict[str, object]:
    if shortcut is None:
        return _NO_SHORTCUT
    x, weight, batch_norm, (stride, _) = shortcut
    round_tf32 = precision == "tf32"
    x_desc, view = pixel_descriptor(x.shape, x.dtype, stride, config.box, config.block_c, round_tf32)
    w_desc = filter_descriptor(weight.shape, weight.dtype, config.block_k, config.block_c, round_tf32)
    return {
        "short_x_desc": with_base(x_desc, x), "short_w_desc": with_base(w_desc, weight),
        **batch_norm.arguments("short_"),
        "SHORT_C": x.shape[1], "SHORT_STRIDE": stride, "SHORT_VIEW": view,
    }  # fmt: skip


_NO_SHORTCUT: dict[str, object] = {
    "short_x_desc": None,
    "short_w_desc": None,
    **NO_BATCH_NORM.arguments("short_"),
    "SHORT_C": 0,
    "SHORT_STRIDE": 1,
    "SHORT_VIEW": "rows",
}
