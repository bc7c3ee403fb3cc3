"""Convolution + batch norm [+ residual | + 1x1 shortcut convolution and its batch norm] [+ ReLU], in one kernel.

Implicit GEMM over channels-last memory: M = N*P*Q output pixels, K output channels, reduction over R*S*C. Batch norm is
applied to the fp32 accumulator from the running statistics as they are at the launch; no folded weights exist. Two
kernels differ only in how they load:

* `conv_box_kernel` (sm_90 and newer): tensor descriptors. Its M tile is a box of output rows x columns x images, and
  one descriptor load fetches the input box shifted by the filter tap; coordinates in the padding read as zero.
* `conv_pointer_kernel` (everywhere): masked pointers over consecutive output pixels, for any geometry.

Few output pixels leave most of a GPU idle. Then SPLIT_K programs share a tile: each reduces over an equal part of the
(channel slab, tap) steps and applies the scale, the first adds the shift and the last the shortcut, and whoever
finishes last sums up. Equal parts, because a loop of unknown length makes ptxas serialise wgmma (C7513, sm_90).

Neither skips a filter tap that falls into the padding: a NaN or Inf weight there must give NaN, as in PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, cdiv
from .tiles import batch_norm_scale_shift, relu, sum_splits


class BatchNorm(NamedTuple):
    """Inference batch norm: (K,) tensors of any floating dtype; `weight` and `bias` may be None."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Shortcut(NamedTuple):
    """A 1x1 convolution without padding and its batch norm, added before the ReLU.

    x (N, C', H', W'), weight (K, C', 1, 1).
    """

    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    stride: tuple[int, int]


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "SHORT_H", "SHORT_W"])
def conv_pointer_kernel(
    x_ptr, w_ptr, y_ptr, res_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    short_x_ptr, short_w_ptr, short_mean_ptr, short_var_ptr, short_gamma_ptr, short_beta_ptr, short_eps,
    workspace_ptr, arrivals_ptr, M, H, W, P, Q, SHORT_H, SHORT_W,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    SHORT_C: tl.constexpr, SHORT_STRIDE_H: tl.constexpr, SHORT_STRIDE_W: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    split = tl.program_id(1)
    offs_k = (pid % TILES_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_m = (pid // TILES_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    q = offs_m % Q
    p = (offs_m // Q) % P
    n = (offs_m // (P * Q)).to(tl.int64)
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_k, mask_k, BLOCK_K)

    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    row = W.to(tl.int64) * C  # elements from one input row to the next
    x_pixel = x_ptr + (n * H + h0) * row + w0.to(tl.int64) * C
    w_filter = w_ptr + offs_k.to(tl.int64) * (R * S * C)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if FLAT:  # few or unaligned channels: one reduction index over (tap, channel) wastes least
        for start in range(0, R * S * C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < R * S * C
            r = offs_c // (S * C) * DILATION_H
            s = offs_c // C % S * DILATION_W
            h = h0[:, None] + r[None, :]
            w = w0[:, None] + s[None, :]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m[:, None] & mask_c[None, :]
            offs_x = r * row + s * C + offs_c % C
            a = tl.load(x_pixel[:, None] + offs_x[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_C]
            b = tl.load(
                w_filter[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_K]
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:  # channel slabs outside, taps inside: the nine shifted reads of a slab stay close in time
        STEPS: tl.constexpr = R * S * ((C + BLOCK_C - 1) // BLOCK_C)
        for j in range(STEPS // SPLIT_K):
            i = split * (STEPS // SPLIT_K) + j
            tap = i % (R * S)
            offs_c = i // (R * S) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            h = h0 + r
            w = w0 + s
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m
            a = tl.load(
                (x_pixel + (r * row + s * C))[:, None] + offs_c[None, :],
                mask=inside[:, None] & mask_c[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_C]
            b = tl.load(
                (w_filter + tap * C)[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_k[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_K]
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SPLIT_K > 1:
        shift = tl.where(split == 0, shift, 0.0)
    acc = acc * scale[None, :] + shift[None, :]

    if short_x_ptr is not None and (SPLIT_K == 1 or split == SPLIT_K - 1):
        x_pixel = short_x_ptr + ((n * SHORT_H + p * SHORT_STRIDE_H) * SHORT_W + q * SHORT_STRIDE_W) * SHORT_C
        w_filter = short_w_ptr + offs_k.to(tl.int64) * SHORT_C
        short = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, SHORT_C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            mask_c = offs_c < SHORT_C
            a = tl.load(x_pixel[:, None] + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            b = tl.load(w_filter[None, :] + offs_c[:, None], mask=mask_c[:, None] & mask_k[None, :], other=0.0)
            short = tl.dot(a, b, short, input_precision=PRECISION)
        # Not before the loop: beside two accumulators, two more vectors would spill (sm_90: 255 registers against 216).
        short_scale, short_shift = batch_norm_scale_shift(
            short_mean_ptr, short_var_ptr, short_gamma_ptr, short_beta_ptr, short_eps, offs_k, mask_k, BLOCK_K
        )
        acc += short * short_scale[None, :] + short_shift[None, :]

    offs_y = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask_y = mask_m[:, None] & mask_k[None, :]
    if SPLIT_K > 1:
        acc, last = sum_splits(acc, workspace_ptr, arrivals_ptr, pid, split, SPLIT_K, BLOCK_M, BLOCK_K)
        mask_y = mask_y & last
    if res_ptr is not None:
        acc += tl.load(res_ptr + offs_y, mask=mask_y, other=0.0).to(tl.float32)
    if RELU:
        acc = relu(acc)
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit(do_not_specialize=["P", "Q"])
def conv_box_kernel(
    x_desc, w_desc, y_desc, res_desc, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    short_x_desc, short_w_desc, short_mean_ptr, short_var_ptr, short_gamma_ptr, short_beta_ptr, short_eps,
    workspace_ptr, arrivals_ptr, P, Q,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr,
    SHORT_C: tl.constexpr, SHORT_STRIDE: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, SPLIT_K: tl.constexpr,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, BOX_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # x_desc, y_desc and res_desc view NHWC memory as (H, W, N, C). With stride 2, columns are split by parity:
    # (H, W/2, 2, N, C), so that every second column is one contiguous box.
    BLOCK_M: tl.constexpr = BOX_H * BOX_W * BOX_N
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PAD_H: tl.constexpr = R // 2
    PAD_W: tl.constexpr = S // 2
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
    scale, shift = batch_norm_scale_shift(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_k, mask_k, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    STEPS: tl.constexpr = R * S * ((C + BLOCK_C - 1) // BLOCK_C)
    for j in range(STEPS // SPLIT_K):
        i = split * (STEPS // SPLIT_K) + j
        tap = i % (R * S)
        c0 = i // (R * S) * BLOCK_C
        h = p0 * STRIDE + tap // S - PAD_H
        w = tap % S - PAD_W
        if STRIDE == 1:
            a = x_desc.load([h, q0 + w, n0, c0])
        else:
            a = x_desc.load([h, q0 + (w + 2) // 2 - 1, (w + 2) % 2, n0, c0])
        a = a.reshape(BLOCK_M, BLOCK_C)
        b = w_desc.load([k0, tap, c0]).reshape(BLOCK_K, BLOCK_C)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if SPLIT_K > 1:
        shift = tl.where(split == 0, shift, 0.0)
    acc = acc * scale[None, :] + shift[None, :]

    if short_x_desc is not None and (SPLIT_K == 1 or split == SPLIT_K - 1):
        # A tile with more than one pixel reaches wgmma through registers; pipelined here as well, Triton 3.6.0 makes
        # ptxas serialise every wgmma of the kernel (C7513).
        STAGES: tl.constexpr = None if BOX_H * BOX_W == 1 else 1
        short = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for c0 in tl.range(0, SHORT_C, BLOCK_C, num_stages=STAGES):
            if SHORT_STRIDE == 1:
                a = short_x_desc.load([p0, q0, n0, c0])
            else:
                a = short_x_desc.load([p0 * 2, q0, 0, n0, c0])
            a = a.reshape(BLOCK_M, BLOCK_C)
            b = short_w_desc.load([k0, 0, c0]).reshape(BLOCK_K, BLOCK_C)
            short = tl.dot(a, b.T, short, input_precision=PRECISION)
        # Not before the loop: beside two accumulators, two more vectors would spill (sm_90: 255 registers against 216).
        short_scale, short_shift = batch_norm_scale_shift(
            short_mean_ptr, short_var_ptr, short_gamma_ptr, short_beta_ptr, short_eps, offs_k, mask_k, BLOCK_K
        )
        acc += short * short_scale[None, :] + short_shift[None, :]

    if SPLIT_K > 1:
        acc, last = sum_splits(acc, workspace_ptr, arrivals_ptr, pid, split, SPLIT_K, BLOCK_M, BLOCK_K)
        if not last:
            return
    if res_desc is not None:
        acc += res_desc.load([p0, q0, n0, k0]).reshape(BLOCK_M, BLOCK_K).to(tl.float32)
    if RELU:
        acc = relu(acc)
    y_desc.store([p0, q0, n0, k0], acc.to(y_desc.dtype).reshape(BOX_H, BOX_W, BOX_N, BLOCK_K))


def conv_bn_relu(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    batch_norm: BatchNorm,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    relu: bool,
    precision: str,
    flat: bool,
    block_m: int,
    block_k: int,
    block_c: int,
    box: tuple[int, int, int] | None,
    split_k: int,
    workspace: Tensor | None,
    arrivals: Tensor | None,
    num_warps: int,
    num_stages: int,
) -> Launch:
    """The launch that writes `out` (N, K, P, Q); allocates nothing and chooses nothing.

    All 4-D tensors are NCHW-shaped, dense in channels_last memory and of one dtype (fp32, fp16 or bf16). `precision`
    is "ieee" or "tf32" and matters for fp32 alone. `flat` reduces over one (tap, channel) index, for few or unaligned
    channels. With `box` (rows, columns, images; product `block_m`) the launch uses tensor descriptors, which ask for
    filters 1x1 or 3x3, padding R // 2, stride 1 or 2, 16-byte aligned pointers and channel rows, and at stride 2 for
    an even input width and one box row. The caller has checked all this.

    With `split_k` > 1 that many programs share a tile (not if `flat`): `workspace` is fp32 with `split_k * block_m *
    block_k` elements a tile, `arrivals` int32 with one zero a tile, which the launch leaves at zero.
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    _, _, p, q = out.shape
    short_c = 0 if shortcut is None else shortcut.x.shape[1]
    common = {
        "mean_ptr": batch_norm.mean, "var_ptr": batch_norm.var,
        "gamma_ptr": batch_norm.weight, "beta_ptr": batch_norm.bias, "eps": batch_norm.eps,
        **_batch_norm_arguments(shortcut),
        "P": p, "Q": q, "C": c, "K": k, "R": r, "S": s, "SHORT_C": short_c,
        "RELU": relu, "PRECISION": precision, "BLOCK_K": block_k, "BLOCK_C": block_c,
        "SPLIT_K": split_k, "workspace_ptr": workspace, "arrivals_ptr": arrivals,
    }  # fmt: skip
    if box is None:
        arguments = {
            "x_ptr": x, "w_ptr": weight, "y_ptr": out, "res_ptr": residual,
            "short_x_ptr": shortcut and shortcut.x, "short_w_ptr": shortcut and shortcut.weight,
            "M": n * p * q, "H": h, "W": w,
            "SHORT_H": shortcut.x.shape[2] if shortcut else 0, "SHORT_W": shortcut.x.shape[3] if shortcut else 0,
            "STRIDE_H": stride[0], "STRIDE_W": stride[1], "PAD_H": padding[0], "PAD_W": padding[1],
            "DILATION_H": dilation[0], "DILATION_W": dilation[1],
            "SHORT_STRIDE_H": shortcut.stride[0] if shortcut else 1,
            "SHORT_STRIDE_W": shortcut.stride[1] if shortcut else 1,
            "FLAT": flat, "BLOCK_M": block_m,
        }  # fmt: skip
        grid = (cdiv(n * p * q, block_m) * cdiv(k, block_k), split_k)
        return Launch(conv_pointer_kernel, grid, arguments | common, num_warps, num_stages)

    box_h, box_w, box_n = box
    arguments = {
        "x_desc": _pixels(x, stride[0], box, block_c),
        "w_desc": _filters(weight, block_k, block_c),
        "y_desc": _pixels(out, 1, box, block_k),
        "res_desc": None if residual is None else _pixels(residual, 1, box, block_k),
        "short_x_desc": shortcut and _pixels(shortcut.x, shortcut.stride[0], box, block_c),
        "short_w_desc": shortcut and _filters(shortcut.weight, block_k, block_c),
        "STRIDE": stride[0], "SHORT_STRIDE": shortcut.stride[0] if shortcut else 1,
        "BOX_H": box_h, "BOX_W": box_w, "BOX_N": box_n,
    }  # fmt: skip
    grid = (cdiv(p, box_h) * cdiv(q, box_w) * cdiv(n, box_n) * cdiv(k, block_k), split_k)
    return Launch(conv_box_kernel, grid, arguments | common, num_warps, num_stages)


def _batch_norm_arguments(shortcut: Shortcut | None) -> dict[str, object]:
    bn = BatchNorm(None, None, None, None, 0.0) if shortcut is None else shortcut.batch_norm
    return {
        "short_mean_ptr": bn.mean, "short_var_ptr": bn.var,
        "short_gamma_ptr": bn.weight, "short_beta_ptr": bn.bias, "short_eps": bn.eps,
    }  # fmt: skip


def _pixels(x: Tensor, stride: int, box: tuple[int, int, int], block_c: int) -> TensorDescriptor:
    """NHWC memory as (H, W, N, C), or (H, W/2, 2, N, C) for stride 2."""
    n, c, h, w = x.shape
    if stride == 1:
        return TensorDescriptor(x, [h, w, n, c], [w * c, c, h * w * c, 1], [*box, block_c])
    box_h, box_w, box_n = box
    return TensorDescriptor(x, [h, w // 2, 2, n, c], [w * c, 2 * c, c, h * w * c, 1], [box_h, box_w, 1, box_n, block_c])


def _filters(weight: Tensor, block_k: int, block_c: int) -> TensorDescriptor:
    """KRSC memory as (K, R*S, C): with taps and channels apart, a channel tail reads zeros, not the next tap."""
    k, c, r, s = weight.shape
    return TensorDescriptor(weight, [k, r * s, c], [r * s * c, c, 1], [block_k, 1, block_c])
