"""Convolution + batch norm [+ residual | + 1x1 shortcut convolution and its batch norm] [+ ReLU], in one kernel.

Implicit GEMM over channels-last memory: M = N*P*Q output pixels, K output channels, reduction over R*S*C. Batch norm is
applied to the fp32 accumulator from the running statistics as they are at the launch; no folded weights exist. Two
kernels differ only in how they load:

* `conv_box.py` (sm_90 and newer): tensor descriptors; the M tile is a box of output rows x columns x images;
* `conv_pointer.py` (everywhere): masked pointers over consecutive output pixels, for any geometry.

Few output pixels leave most of a GPU idle. Then SPLIT_K programs share a tile: each reduces over an equal part of the
(channel slab, tap) steps and applies the scale, the first adds the shift and the last the shortcut, and whoever
finishes last sums up. Equal parts, because a loop of unknown length makes ptxas serialise wgmma (C7513, sm_90).

None skips a filter tap that falls into the padding: a NaN or Inf weight there must give NaN, as in PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .conv_box import conv_box_kernel, filters, pixels
from .conv_pointer import conv_pointer_kernel
from .launch import Launch, cdiv


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
    swap: bool,
    early_residual: bool,
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
    an even input width and one box row (one image of even height: any). With `swap`, which a box with several sides
    longer than 1 has to have, filters are the rows of the product and pixels its columns. `early_residual`
    loads the residual before the main loop, through pointers. The caller has checked all this.

    With `split_k` > 1 that many programs share a tile (not if `flat`): `workspace` is fp32 with `split_k * block_m *
    block_k` elements a tile, `arrivals` int32 with one zero a tile, which the launch leaves at zero.
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    _, _, p, q = out.shape
    arguments: dict[str, object] = {
        "mean_ptr": batch_norm.mean, "var_ptr": batch_norm.var,
        "gamma_ptr": batch_norm.weight, "beta_ptr": batch_norm.bias, "eps": batch_norm.eps,
        **_shortcut_arguments(shortcut),
        "N": n, "P": p, "Q": q, "C": c, "K": k, "R": r, "S": s, "RELU": relu, "PRECISION": precision,
        "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": block_c,
        "SPLIT_K": split_k, "workspace_ptr": workspace, "arrivals_ptr": arrivals,
    }  # fmt: skip
    if box is None:
        kernel = conv_pointer_kernel
        tiles = cdiv(n * p * q, block_m)
        arguments |= {
            "x_ptr": x, "w_ptr": weight, "y_ptr": out, "res_ptr": residual, "M": n * p * q, "H": h, "W": w,
            "STRIDE_H": stride[0], "STRIDE_W": stride[1], "PAD_H": padding[0], "PAD_W": padding[1],
            "DILATION_H": dilation[0], "DILATION_W": dilation[1], "FLAT": flat,
        }  # fmt: skip
    else:
        kernel = conv_box_kernel
        box_h, box_w, box_n = box
        tiles = cdiv(p, box_h) * cdiv(q, box_w) * cdiv(n, box_n)
        x_desc, view = pixels(x, stride[0], box, block_c)
        y_desc, y_view = pixels(out, 1, box, block_k)
        late = None if residual is None or early_residual else pixels(residual, 1, box, block_k)[0]
        short_x_desc, short_view = pixels(shortcut.x, shortcut.stride[0], box, block_c) if shortcut else (None, 0)
        arguments |= {
            "x_desc": x_desc, "w_desc": filters(weight, block_k, block_c), "y_desc": y_desc, "res_desc": late,
            "res_ptr": residual if early_residual else None,
            "short_x_desc": short_x_desc, "short_w_desc": shortcut and filters(shortcut.weight, block_k, block_c),
            "STRIDE": stride[0], "VIEW": view, "Y_VIEW": y_view,
            "SHORT_STRIDE": shortcut.stride[0] if shortcut else 1, "SHORT_VIEW": short_view,
            "SWAP": swap, "BOX_H": box_h, "BOX_W": box_w, "BOX_N": box_n,
        }  # fmt: skip
    grid = (tiles * cdiv(k, block_k), split_k)
    return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names}, num_warps, num_stages)


def _shortcut_arguments(shortcut: Shortcut | None) -> dict[str, object]:
    if shortcut is None:
        names = ("x_ptr", "w_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr")
        sizes = {"SHORT_H": 0, "SHORT_W": 0, "SHORT_C": 0, "SHORT_STRIDE_H": 1, "SHORT_STRIDE_W": 1}
        return {**{f"short_{name}": None for name in names}, "short_eps": 0.0, **sizes}
    bn = shortcut.batch_norm
    _, c, h, w = shortcut.x.shape
    return {
        "short_x_ptr": shortcut.x, "short_w_ptr": shortcut.weight,
        "short_mean_ptr": bn.mean, "short_var_ptr": bn.var,
        "short_gamma_ptr": bn.weight, "short_beta_ptr": bn.bias, "short_eps": bn.eps,
        "SHORT_H": h, "SHORT_W": w, "SHORT_C": c,
        "SHORT_STRIDE_H": shortcut.stride[0], "SHORT_STRIDE_W": shortcut.stride[1],
    }  # fmt: skip
