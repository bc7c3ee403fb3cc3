"""The values that launchers take. Nothing here needs Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

Size = tuple[int, ...]


class BatchNorm(NamedTuple):
    """Inference batch norm: (K,) tensors of any floating dtype; `bn_weight` and `bn_bias` may be None."""

    running_mean: Tensor
    running_var: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    eps: float

    def arguments(self, prefix: str = "") -> dict[str, Any]:
        """A kernel's arguments for it."""
        mean, var, weight, bias, eps = self
        return {
            f"{prefix}mean_ptr": mean, f"{prefix}var_ptr": var,
            f"{prefix}bn_weight_ptr": weight, f"{prefix}bn_bias_ptr": bias, f"{prefix}eps": eps,
        }  # fmt: skip

    def contiguous(self) -> BatchNorm:
        """A batch norm with tensors as kernels read them."""
        mean, var, weight, bias, eps = self
        return BatchNorm(
            mean.contiguous(),
            var.contiguous(),
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            eps,
        )


NO_BATCH_NORM = BatchNorm(None, None, None, None, 0.0)  # type: ignore[arg-type]
"""What a kernel is given where there is none."""


def normalization_arguments(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    """A kernel's arguments for `(x / 255 - mean) / std` of bytes, up to four channels; `mean` is None for others."""
    means, stds = ([*(values or ()), *[1.0] * 4][:4] for values in (mean, std))
    return {
        **{f"mean_{i}": value for i, value in enumerate(means)},
        **{f"std_{i}": value for i, value in enumerate(stds)},
        "NORMALIZE": mean is not None,
    }


ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "hardswish", "silu", "gelu")


class Activation(NamedTuple):
    """What follows the sum: one of `ACTIVATIONS`, as in `torch.nn.functional`, and the slope of leaky ReLU."""

    activation: str = "relu"
    negative_slope: float = 0.01


NONE, RELU = Activation("none"), Activation("relu")


class Geometry(NamedTuple):
    """How a filter is laid over an image, in rows and columns, as in `torch.nn.Conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Shortcut(NamedTuple):
    """A 1x1 convolution without padding and its batch norm, added before the activation.

    x (N, C', H', W'), weight (K, C', 1, 1).
    """

    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    stride: tuple[int, int]


POINTER, BOX = "conv_pointer", "conv_box"
CONV, PINGPONG, CONV64, FEW = "hopper_conv", "hopper_pingpong", "hopper_conv64", "hopper_few"
"""The kernels of a `ConvConfig`, each in the file of its name; of `hopper_conv.py` there are two."""


@dataclass(frozen=True)
class ConvConfig:
    """Tile sizes and compile options of one convolution launch.

    `block_m` output pixels by `block_k` output channels, reduced `block_c` channels at a time. With `box` (rows,
    columns, images; product `block_m`) the kernel loads through tensor descriptors and the tile is that box; without,
    through pointers. `split_k` programs share a tile, each reducing over a part of the channels and taps. With `swap`
    filters are the rows of the matrix product and pixels its columns, which boxes with several sides need.

    `kernel` is one in Gluon: "hopper_conv", whose groups of `num_warps` share a tile, "hopper_pingpong", the same in
    which they take turns, "hopper_conv64" or "hopper_few". Else it says itself which kernel loads so: "conv_box" or
    "conv_pointer".
    """

    block_m: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int
    box: tuple[int, int, int] | None = None
    split_k: int = 1
    swap: bool = False
    kernel: str = ""

    def __post_init__(self) -> None:
        if self.kernel in ("", BOX, POINTER):
            object.__setattr__(self, "kernel", POINTER if self.box is None else BOX)

    @property
    def is_gluon(self) -> bool:
        """Whether the kernel is in Gluon."""
        return self.kernel not in (BOX, POINTER)

    def on(self, box: tuple[int, int, int]) -> ConvConfig:
        """This tile with another box, whose sides may ask for a swap."""
        swap = not self.is_gluon and (self.swap or has_several_sides(box))
        return replace(self, block_m=prod(box), box=box, swap=swap)

    @property
    def early_residual(self) -> bool:
        """Whether registers have room for the residual beside the accumulators during the main loop (sm_90)."""
        return self.box is not None and self.split_k == 1 and self.block_m * self.block_k <= 2048 * self.num_warps


class Convolution(NamedTuple):
    """A call of a convolution kernel, with nothing left to allocate or to choose.

    `out` (N, K, P, Q) is written. 4-D tensors are NCHW-shaped, dense in channels_last memory and of one dtype (fp32,
    fp16 or bf16); `precision` is "ieee" or "tf32" and matters for fp32 alone. `config` is legal for this call:
    `resnet_triton.config.is_legal` says what each kernel asks for. If it splits the reduction, `partials` is fp32 with
    `split_k * block_m * block_k` elements a tile, and `semaphores` int32 with two zeros a tile, which the launch leaves
    at zero. `programs` run at a time, one a multiprocessor: a warp-specialised launch has no more.
    """

    out: Tensor
    x: Tensor
    weight: Tensor
    batch_norm: BatchNorm
    geometry: Geometry
    residual: Tensor | None
    shortcut: Shortcut | None
    activation: Activation
    precision: str
    config: ConvConfig
    programs: int
    partials: Tensor | None
    semaphores: Tensor | None


def pixel_view(
    size: Size, stride: int, box: tuple[int, int, int], block_c: int
) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """How to look at images (N, C, H, W) in NHWC memory such that `box` (rows, columns, images) of `block_c` channels
    at `stride` is a block: name, shape, strides and block.

    At stride 2 columns are split by parity, so that every second one is again a box; so are rows where several are in
    one box, which only one image of even height can have:

    * "images", boxes of several images: (H, W, N, C), at stride 2 (H, W/2, 2, N, C);
    * "rows", boxes within an image: (N, H, W, C), at stride 2 (N, H, 2, W/2, C);
    * "one image", at stride 2 alone, boxes of several rows: (2, 2, H/2, W/2, C).
    """
    n, c, h, w = size
    box_h, box_w, box_n = box
    row, image = w * c, h * w * c
    if stride == 1 and box_n > 1:
        return "images", (h, w, n, c), (row, c, image, 1), (box_h, box_w, box_n, block_c)
    if stride == 1:
        return "rows", (n, h, w, c), (image, row, c, 1), (1, box_h, box_w, block_c)
    if box_n > 1:
        return "images", (h, w // 2, 2, n, c), (row, 2 * c, c, image, 1), (box_h, box_w, 1, box_n, block_c)
    if box_h > 1:
        return "one image", (2, 2, h // 2, w // 2, c), (row, c, 2 * row, 2 * c, 1), (1, 1, box_h, box_w, block_c)
    return "rows", (n, h, 2, w // 2, c), (image, row, c, 2 * c, 1), (1, 1, 1, box_w, block_c)


def filter_view(size: Size, block_k: int, block_c: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Filters (K, C, R, S) in KRSC memory as (R*S, K, C), and the strides and block of one tap.

    With taps and channels apart, a channel tail reads zeros, not the next tap.
    """
    k, c, r, s = size
    return (r * s, k, c), (c, r * s * c, 1), (1, block_k, block_c)


MAX_SPLIT_K_OF_FEW = 8
"""Programs of `hopper_few` that may share a tile. Their sum is no loop, in which each turn would wait for its load."""


def has_several_sides(box: tuple[int, int, int]) -> bool:
    """Whether more than one side of a box is longer than 1, so that its pixels must not be the rows of a product.

    As rows they would reach wgmma in registers, which Triton 3.6.0 to 3.8.0 overwrite while it reads them
    (triton-lang/triton#9433): wrong answers on an H200, now and then. As columns they are read from shared memory, in
    fewer registers and instructions.
    """
    return sum(side > 1 for side in box) > 1


def taps_at_once(box: tuple[int, int, int], r: int, stride: int) -> int:
    """How many taps of a filter, one under the other, a step of `hopper_conv` loads pixels for, and then multiplies.

    Three of a 3x3 filter at stride 1 where a box has two rows, one for each group of warps; else one.
    """
    return 3 if (box[0], r, stride) == (2, 3, 1) else 1


def boxes_in_slot(taps: int) -> int:
    """How many boxes of pixels so many taps of a step read: for three, the rows above and below come along."""
    return 2 if taps == 3 else 1


def is_depthwise(c: int, weight: Size, groups: int) -> bool:
    """Whether `conv_depthwise` takes filters `weight` (K, C / groups, R, S) for c channels: one for each.

    Code for more rows takes long to compile.
    """
    return 1 < groups == c == weight[0] and weight[2] <= 31


def groups_at_once(c: int, k: int, groups: int, block_k: int) -> int:
    """Of how many groups a program of `conv_pointer` computes filters: all that fit its block, but at least of one.

    Fewer where their channels then begin at multiples of 8, for wide loads.
    """
    most = min(max(block_k * groups // k, 1), groups)
    return next((n for n in range(most, 0, -1) if n * c // groups % 8 == 0), most)


def is_flat(c: int) -> bool:
    """Whether `conv_pointer` reduces over one (tap, channel) index: few channels, or rows too odd for wide loads."""
    return c < 16 or c % 8 != 0
