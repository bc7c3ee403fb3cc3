"""Convolution through masked pointers: consecutive output pixels, any geometry, any groups of channels, any GPU.

A program's filters belong to BLOCK_G groups, and it reads only their channels. Where that is more than one, for groups
too narrow for a product, the filters become a block-diagonal matrix while they are loaded.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .launch import Launch, cdiv
from .tiles import activate, batch_norm_scale_shift, scale_and_shift, spread, sum_partials
from .values import (
    NO_BATCH_NORM,
    Activation,
    ConvConfig,
    Convolution,
    Geometry,
    Shortcut,
    Size,
    groups_at_once,
    is_flat,
)


@triton.jit
def is_inside(h, w, H, W):
    """Whether pixels lie in the image: as unsigned numbers, negative ones are larger than any side."""
    return (h.to(tl.uint32) < H.to(tl.uint32)) & (w.to(tl.uint32) < W.to(tl.uint32))


@triton.jit
def load_filters(
    w_filter, offs_c, mask_c, mask_k, ours_k, GROUP_C: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Filters `ours_k` of BLOCK_G groups, which begin at `w_filter`, at channels or (tap, channel) pairs of all groups.

    [BLOCK_C, BLOCK_K], zero where a filter does not read a channel.
    """
    offs_w = offs_c
    if BLOCK_G > 1:
        offs_w = offs_c // (BLOCK_G * GROUP_C) * GROUP_C + offs_c % GROUP_C
    pointers = w_filter[None, :] + offs_w[:, None]
    mask = mask_c[:, None] & mask_k[None, :]
    if BLOCK_G > 1:
        mask &= (offs_c // GROUP_C % BLOCK_G)[:, None] == (ours_k // GROUP_K)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def sum_alone(
    x_pixel, w_filter, row, h0, w0, H, W, mask_m, mask_k, ours_k, channels,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUP_C: tl.constexpr, GROUP_K: tl.constexpr, READ_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The kernel's sums of products, each of the channels of its own group alone; slowly."""
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in range(R * S * READ_C):
        tap = i // READ_C
        c = i % READ_C
        r = tap // S * DILATION_H
        s = tap % S * DILATION_W
        inside = is_inside(h0 + r, w0 + s, H, W) & mask_m
        mine = (ours_k // GROUP_K == c // GROUP_C) & mask_k
        a = tl.load(x_pixel + (r * row + s * C + c), mask=tl.where(c < channels, inside, False), other=0.0)
        b = tl.load(w_filter + (tap * GROUP_C + c % GROUP_C), mask=mine, other=0.0)
        acc += tl.where(mine[None, :], a.to(tl.float32)[:, None] * b.to(tl.float32)[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "SHORT_H", "SHORT_W"])
def conv_pointer_kernel(
    x_ptr, w_ptr, y_ptr, res_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps,
    short_x_ptr, short_w_ptr, short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps,
    partials_ptr, semaphores_ptr, M, H, W, P, Q, SHORT_H, SHORT_W,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SHORT_C: tl.constexpr, SHORT_STRIDE_H: tl.constexpr, SHORT_STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    GROUP_C: tl.constexpr = C // GROUPS
    READ_C: tl.constexpr = BLOCK_G * GROUP_C  # channels that a program reads
    GROUP_K: tl.constexpr = K // GROUPS
    BLOCKS_K: tl.constexpr = (BLOCK_G * GROUP_K + BLOCK_K - 1) // BLOCK_K  # of the same groups
    TILES_K: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G * BLOCKS_K
    pid = tl.program_id(0)
    split = tl.program_id(1)
    if GROUPS == 1:
        ours_k = (pid % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_k = ours_k
        mask_k = offs_k < K
    else:
        group = pid % TILES_K // BLOCKS_K * BLOCK_G  # the first of the program's
        ours_k = pid % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
        offs_k = group * GROUP_K + ours_k
        mask_k = (ours_k < BLOCK_G * GROUP_K) & (offs_k < K)
        first = group * GROUP_C
        x_ptr += first
    offs_m = (pid // TILES_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    q = offs_m % Q
    p = (offs_m // Q) % P
    n = (offs_m // (P * Q)).to(tl.int64)

    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    row = W.to(tl.int64) * C  # elements from one input row to the next
    x_pixel = x_ptr + (n * H + h0) * row + w0.to(tl.int64) * C
    w_filter = w_ptr + offs_k.to(tl.int64) * (R * S * GROUP_C)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if FLAT:  # few or unaligned channels: one reduction index over (tap, channel) wastes least
        for start in range(0, R * S * READ_C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < R * S * READ_C
            r = offs_c // (S * READ_C) * DILATION_H
            s = offs_c // READ_C % S * DILATION_W
            if GROUPS % BLOCK_G != 0:
                mask_c &= group + offs_c // GROUP_C % BLOCK_G < GROUPS
            inside = is_inside(h0[:, None] + r[None, :], w0[:, None] + s[None, :], H, W)
            inside &= mask_m[:, None] & mask_c[None, :]
            offs_x = r * row + s * C + offs_c % READ_C
            a = tl.load(x_pixel[:, None] + offs_x[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_C]
            b = load_filters(w_filter, offs_c, mask_c, mask_k, ours_k, GROUP_C, GROUP_K, BLOCK_G)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:  # channel slabs outside, taps inside: the nine shifted reads of a slab stay close in time
        h0 = tl.where(mask_m, h0, -(2**31))  # beyond the last pixel no tap is inside
        STEPS: tl.constexpr = R * S * ((READ_C + BLOCK_C - 1) // BLOCK_C)
        for j in range(STEPS // SPLIT_K):
            i = split * (STEPS // SPLIT_K) + j
            tap = i % (R * S)
            offs_c = i // (R * S) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < READ_C
            if GROUPS % BLOCK_G != 0:
                mask_c &= group + offs_c // GROUP_C < GROUPS
            r = i // S % R * DILATION_H  # not of `tap`, whose own division comes first
            s = i % S * DILATION_W
            inside = is_inside(h0 + r, w0 + s, H, W)[:, None]
            if READ_C % BLOCK_C != 0 or GROUPS % BLOCK_G != 0:
                inside &= mask_c[None, :]
            pointers = (x_pixel + (r * row + s * C))[:, None] + offs_c[None, :]
            a = tl.load(pointers, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_C]
            b = load_filters(w_filter + tap * GROUP_C, offs_c, mask_c, mask_k, ours_k, GROUP_C, GROUP_K, BLOCK_G)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if BLOCK_G > 1:  # zero times another group's infinity or NaN is NaN
        total = tl.sum(acc)
        if total != total:
            own = sum_alone(
                x_pixel, w_filter, row, h0, w0, H, W, mask_m, mask_k, ours_k, C - first, C, R, S,
                DILATION_H, DILATION_W, GROUP_C, GROUP_K, READ_C, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            acc = tl.where(acc != acc, own, acc)
    # Not before the loop, through which every thread would keep its part (sm_80: 155 registers against 128).
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, eps, offs_k, mask_k, BLOCK_K)
    if SPLIT_K > 1:
        shift = tl.where(split == 0, shift, 0.0)
    acc = acc * scale[None, :] + shift[None, :]

    if short_x_ptr is not None and (SPLIT_K == 1 or split == SPLIT_K - 1):
        # Computed here and spread behind the loop: all here, or all there, spills 8 bytes (sm_80, 56 or 128 registers).
        short_scale, short_shift = scale_and_shift(
            short_mean_ptr, short_var_ptr, short_bn_weight_ptr, short_bn_bias_ptr, short_eps, offs_k, mask_k
        )
        x_pixel = short_x_ptr + ((n * SHORT_H + p * SHORT_STRIDE_H) * SHORT_W + q * SHORT_STRIDE_W) * SHORT_C
        w_filter = short_w_ptr + offs_k.to(tl.int64) * SHORT_C
        short = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, SHORT_C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < SHORT_C
            a = tl.load(x_pixel[:, None] + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            b = tl.load(w_filter[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_k[None, :], other=0.0)
            short = tl.dot(a, b, short, input_precision=PRECISION)
        short_scale, short_shift = spread(short_scale, BLOCK_K), spread(short_shift, BLOCK_K)
        acc += short * short_scale[None, :] + short_shift[None, :]

    offs_y = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask_y = mask_m[:, None] & mask_k[None, :]
    if SPLIT_K > 1:
        acc, last = sum_partials(acc, partials_ptr, semaphores_ptr, pid, split, SPLIT_K, BLOCK_M, BLOCK_K)
        mask_y = tl.where(last, mask_y, False)  # not `&`, which Triton 3.9's interpreter makes an integer
    if res_ptr is not None:
        acc += tl.load(res_ptr + offs_y, mask=mask_y, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def conv_pointer(call: Convolution) -> Launch:
    """The launch for any geometry."""
    x, weight, out, config = call.x, call.weight, call.out, call.config
    constants, grid = _constants(
        x.shape, weight.shape, out.shape, call.geometry, call.activation, call.precision, config
    )
    arguments = {
        "x_ptr": x, "w_ptr": weight, "y_ptr": out, "res_ptr": call.residual, **call.batch_norm.arguments(),
        **_shortcut_arguments(call.shortcut),
        "partials_ptr": call.partials, "semaphores_ptr": call.semaphores, **constants,
    }  # fmt: skip
    return Launch(conv_pointer_kernel, grid, arguments, config.num_warps, config.num_stages)


@functools.lru_cache(maxsize=4096)
def _constants(
    x: Size, weight: Size, out: Size, geometry: Geometry, activation: Activation, precision: str, config: ConvConfig
) -> tuple[dict[str, object], tuple[int, int]]:
    """What of a launch depends on sizes alone, and the grid."""
    (n, k, p, q), (_, c, h, w), (_, _, r, s) = out, x, weight
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), groups = geometry
    together = groups_at_once(c, k, groups, config.block_k)
    constants: dict[str, object] = {
        "M": n * p * q, "H": h, "W": w, "P": p, "Q": q, "C": c, "K": k, "R": r, "S": s, "GROUPS": groups,
        "STRIDE_H": stride_h, "STRIDE_W": stride_w, "PAD_H": pad_h, "PAD_W": pad_w,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w,
        "ACTIVATION": activation, "PRECISION": precision, "SPLIT_K": config.split_k,
        "FLAT": is_flat(together * c // groups),
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_C": config.block_c, "BLOCK_G": together,
    }  # fmt: skip
    tiles_k = cdiv(groups, together) * cdiv(together * k // groups, config.block_k)
    return constants, (cdiv(n * p * q, config.block_m) * tiles_k, config.split_k)


def _shortcut_arguments(shortcut: Shortcut | None) -> dict[str, object]:
    if shortcut is None:
        return _NO_SHORTCUT
    x, weight, batch_norm, (stride_h, stride_w) = shortcut
    _, c, h, w = x.shape
    return {
        "short_x_ptr": x, "short_w_ptr": weight, **batch_norm.arguments("short_"),
        "SHORT_H": h, "SHORT_W": w, "SHORT_C": c, "SHORT_STRIDE_H": stride_h, "SHORT_STRIDE_W": stride_w,
    }  # fmt: skip


_NO_SHORTCUT: dict[str, object] = {
    "short_x_ptr": None, "short_w_ptr": None, **NO_BATCH_NORM.arguments("short_"),
    "SHORT_H": 0, "SHORT_W": 0, "SHORT_C": 0, "SHORT_STRIDE_H": 1, "SHORT_STRIDE_W": 1,
}  # fmt: skip
