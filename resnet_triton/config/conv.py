"""The shape that a convolution's configuration is chosen for, and the one statement of what is legal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import prod

from ..kernels.launch import cdiv
from ..kernels.values import (
    CONV,
    CONV64,
    FEW,
    MAX_SPLIT_K_OF_FEW,
    PINGPONG,
    ConvConfig,
    boxes_in_slot,
    has_several_sides,
    is_flat,
    taps_at_once,
)
from .device import DeviceFacts

SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
"""How many programs may share a tile, as far as it is worth weighing."""
_LINES = 8  # pixels in one pattern of swizzled shared memory, the least that a load may bring
_MAX_TILE = 128 * 128  # pixels x filters of a tile of fp32, or with a residual, or that sums a shortcut's products


@dataclass(frozen=True)
class ConvShape:
    """Everything about a `conv_bn_relu` call that tiling may depend on.

    `shortcut_c`, `shortcut_h` and `shortcut_w` are channels, rows and columns of the shortcut's input, 0 without one.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int = 1
    s: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "float16"
    precision: str = "ieee"  # "ieee" or "tf32"; only fp32 has the choice
    residual: bool = False
    shortcut_c: int = 0
    shortcut_h: int = 0
    shortcut_w: int = 0
    shortcut_stride: tuple[int, int] = (1, 1)

    @property
    def p(self) -> int:
        """Output rows."""
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        """Output columns."""
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def pointwise(self) -> bool:
        """Whether an output pixel depends on no input pixel but the one in its place."""
        return (self.r, self.s) == self.stride == self.shortcut_stride == (1, 1) and self.padding == (0, 0)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self.dtype == "float32" else 2


def supports_descriptors(shape: ConvShape) -> bool:
    """Whether `conv_box` can serve this shape at all; anything else takes `conv_pointer`.

    Descriptors want channel rows in multiples of 16 bytes; the stride-2 view splits columns by parity, so the width
    must be even. The kernel is written for the filters of ResNets and is kept that narrow.
    """
    granule = 16 // shape.itemsize
    channels = (shape.c, shape.k, shape.shortcut_c)
    if shape.shortcut_c and not _fits_stride(shape.shortcut_stride, shape.shortcut_w):
        return False
    return (
        (shape.r, shape.s) in ((1, 1), (3, 3))
        and _fits_stride(shape.stride, shape.w)
        and shape.padding == (shape.r // 2, shape.s // 2)
        and shape.dilation == (1, 1)
        and all(c % granule == 0 for c in channels)
    )


def _fits_stride(stride: tuple[int, int], width: int) -> bool:
    return stride == (1, 1) or (stride == (2, 2) and width % 2 == 0)


def shared_memory(config: ConvConfig, shape: ConvShape) -> int:
    """Upper bound on a launch's shared memory, in bytes; `test_codegen.py` holds it against the compiler."""
    if config.is_gluon:
        return _gluon_shared_memory(config, shape)
    tiles = config.num_stages * (config.block_m + config.block_k) * config.block_c * shape.itemsize
    if config.box is None:
        return max(tiles, config.block_m * config.block_k * 4) + 1024
    return max(tiles, config.block_m * config.block_k * shape.itemsize * (2 if shape.residual else 1)) + 2048


def _gluon_shared_memory(config: ConvConfig, shape: ConvShape) -> int:
    """A ring of slots, buffers that results leave by; then barriers, and what spreads batch norms over threads."""
    if config.kernel == FEW:  # no slot twice
        blocks = steps(config, shape) // config.split_k + bool(shape.shortcut_c)
        return blocks * (config.block_m + config.block_k) * config.block_c * 2 + 2048
    if config.kernel == CONV64:  # filters stay, a slot is one pixel of all images
        return 9 * 64 * 64 * 2 + (config.num_stages + 4) * config.block_m // 2 * 64 * 2 + 2048
    column = taps(config, shape)
    lines = config.block_m * boxes_in_slot(column) + config.block_k * column
    slots = config.num_stages * lines * config.block_c
    results = config.block_m * config.block_k * (2 if shape.residual or config.kernel == PINGPONG else 1)
    return (slots + results) * shape.itemsize + 2560


def boxes_of(pixels: int) -> list[tuple[int, int, int]]:
    """Every box of so many pixels, a power of two, whose sides are powers of two."""
    sides = [1 << i for i in range(pixels.bit_length())]
    return [(h, w, pixels // (h * w)) for h, w in product(sides, sides) if h * w <= pixels]


def is_run(box: tuple[int, int, int] | None, shape: ConvShape) -> bool:
    """Whether a tile is a run of consecutive pixels, whichever images they belong to: one piece of memory.

    So a pointwise convolution takes a box of images alone, with each pixel as an image of its own.
    """
    return box is not None and box[:2] == (1, 1) and shape.pointwise


def covering(box: tuple[int, int, int], shape: ConvShape) -> int:
    """How many such boxes cover the output."""
    h, w, n = box
    if is_run(box, shape):
        return cdiv(shape.n * shape.p * shape.q, n)
    return cdiv(shape.p, h) * cdiv(shape.q, w) * cdiv(shape.n, n)


def by_waste(boxes: Iterable[tuple[int, int, int]], shape: ConvShape) -> list[tuple[int, int, int]]:
    """Boxes of so many pixels, least waste first; of equal ones, those of more images, then of more columns."""
    return sorted(boxes, key=lambda box: (covering(box, shape), -box[2], box[0]))


def steps(config: ConvConfig, shape: ConvShape) -> int:
    """Turns of the main loop: filter taps, or columns of them, times slabs of `block_c` channels."""
    if config.box is None and is_flat(shape.c):
        return cdiv(shape.r * shape.s * shape.c, config.block_c)
    return shape.r * shape.s // taps(config, shape) * cdiv(shape.c, config.block_c)


def taps(config: ConvConfig, shape: ConvShape) -> int:
    """Taps that a turn multiplies."""
    return taps_at_once(config.box, shape.r, shape.stride[0]) if config.kernel == CONV and config.box else 1


def tiles(config: ConvConfig, shape: ConvShape) -> int:
    """Output tiles; a launch has `split_k` programs for each."""
    if config.box is None:
        pixels = cdiv(shape.n * shape.p * shape.q, config.block_m)
    else:
        pixels = covering(config.box, shape)
    return pixels * cdiv(shape.k, config.block_k)


def _may_split(config: ConvConfig, shape: ConvShape) -> bool:
    """At most 16 equal parts, with partials of at most 64 KB: one program reads them all."""
    flat = config.box is None and is_flat(shape.c)
    small = config.block_m * config.block_k * 4 <= 64 * 1024
    return 2 <= config.split_k <= 16 and steps(config, shape) % config.split_k == 0 and small and not flat


def may_have_rows(shape: ConvShape, images: int) -> bool:
    """Whether a box of so many images may have several rows.

    At stride 2 these would be every second input row, which one load cannot fetch, except of a single image: then the
    view of `kernels/conv_box.py` has a dimension to spare for row parity.
    """
    strided = [shape.h] if shape.stride == (2, 2) else []
    if shape.shortcut_c and shape.shortcut_stride == (2, 2):
        strided.append(shape.shortcut_h)
    return not strided or (shape.n == images == 1 and all(h % 2 == 0 for h in strided))


def is_legal(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> bool:
    """Whether `config` may be used for `shape` on `device`. Tuner, tables, heuristic and tests all ask here."""
    if config.is_gluon:
        return _is_legal_gluon(config, shape, device)
    sizes = (config.block_m, config.block_k, config.block_c, config.num_warps)
    if any(size <= 0 or size & (size - 1) for size in sizes) or not 1 <= config.num_stages <= 8:
        return False
    if min(config.block_m, config.block_k, config.block_c) < 16 or max(config.block_m, config.block_k) > 256:
        return False
    if config.split_k != 1 and not _may_split(config, shape):
        return False
    if config.num_warps > 8 or config.block_c * shape.itemsize > 256:
        return False
    if shape.shortcut_c and config.block_m * config.block_k > 128 * 128:
        return False  # two fp32 accumulators at 256x128 spill whatever one does (sm_90, ptxas 12.8)
    if config.swap and config.box is None:
        return False
    if config.box is not None:
        if has_several_sides(config.box) and not config.swap:
            return False
        if not (device.has_descriptors and supports_descriptors(shape)) or prod(config.box) != config.block_m:
            return False
        if any(size <= 0 or size & (size - 1) for size in config.box):
            return False
        if config.box[0] != 1 and not may_have_rows(shape, config.box[2]):
            return False
    return shared_memory(config, shape) <= device.shared_memory


def _is_legal_gluon(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> bool:
    """`is_legal` of a kernel in Gluon: 16 bits, one of them also fp32 where TF32 is asked for."""
    box, wide = config.box, shape.itemsize == 4
    if wide and (shape.precision != "tf32" or config.kernel != CONV):
        return False
    if not device.has_gluon or not supports_descriptors(shape):
        return False
    if box is None or config.swap or prod(box) != config.block_m or any(side & (side - 1) for side in box):
        return False
    if (config.block_c * shape.itemsize, config.num_warps) != (128, 4) or not 1 <= config.num_stages <= 16:
        return False
    if config.kernel == FEW:
        return _is_legal_few(config, shape, box) and shared_memory(config, shape) <= device.shared_memory
    if config.num_stages == 1 or shared_memory(config, shape) > device.shared_memory:
        return False
    if config.kernel == CONV64:
        return _is_legal64(config, shape, box)
    if config.kernel not in (CONV, PINGPONG):
        return False
    in_turn = config.kernel == PINGPONG
    if config.block_m not in (128, 256) or config.block_k not in (64, 128, 256):
        return False
    if in_turn and (config.split_k > 1 or shape.shortcut_c):
        return False
    most = _MAX_TILE if wide or shape.residual or shape.shortcut_c or in_turn else 2 * _MAX_TILE
    if config.block_m * config.block_k > most:
        return False
    strided = (2, 2) in ((shape.stride, shape.shortcut_stride) if shape.shortcut_c else (shape.stride,))
    if box[0] > 1 and strided and box[1] * box[2] < _LINES:
        return False
    return config.split_k == 1 or _may_split(config, shape)


def _is_legal64(config: ConvConfig, shape: ConvShape, box: tuple[int, int, int]) -> bool:
    if (shape.c, shape.k, shape.r, shape.stride, shape.shortcut_c) != (64, 64, 3, (1, 1), 0):
        return False
    return (config.block_k, config.split_k) == (64, 1) and box[:2] == (2, 1) and box[2] in (32, 64, 128)


def _is_legal_few(config: ConvConfig, shape: ConvShape, box: tuple[int, int, int]) -> bool:
    """A part of a tile is whole slabs of channels; a shortcut has at most one for each part."""
    slabs, short_slabs = shape.c // 64, cdiv(shape.shortcut_c, 64)
    if shape.c % 64 or shape.k % 64 or not 1 <= config.split_k <= MAX_SPLIT_K_OF_FEW or slabs % config.split_k:
        return False
    if shape.stride == (2, 2) and shape.r == 3 and (shape.h % 2 or shape.w % 2):
        return False
    if (config.block_k, config.num_stages) != (64, 1) or short_slabs > config.split_k or shape.shortcut_c % 64:
        return False
    return prod(box) in (16, 32, 64) and (box[1:] == (8, 1) or is_run(box, shape))
