"""Tile choices from shape and device facts alone: nothing is timed at a call, no state, the same answer everywhere.

A cost model chooses (`estimate.py`), fitted to what was timed on an H200.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..kernels.launch import cdiv, next_power_of_2
from ..kernels.values import ConvConfig, groups_at_once, has_several_sides, is_flat
from . import hopper
from .conv import SPLITS, ConvShape, boxes_of, by_waste, is_legal, may_have_rows, supports_descriptors
from .device import DeviceFacts
from .estimate import estimate

# (block_m, block_k, block_c of a 16-bit type, num_warps, num_stages), each seen to compile without spills
# (the first spills 16 bytes with GELU and a residual).
_BOX_TILES = (
    (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (256, 64, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4), (64, 32, 64, 4, 4), (32, 64, 64, 4, 4),
)  # fmt: skip
_POINTER_TILES = (
    (128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3), (32, 32, 64, 4, 3),
)  # fmt: skip
# Element-wise gathers keep an address and a mask per element, so these tiles give each thread fewer elements.
_FLAT_TILES = ((128, 64, 64, 8, 2), (64, 64, 64, 8, 2), (32, 64, 64, 4, 2), (32, 32, 64, 4, 2))
_IEEE_TILES = ((64, 64, 16, 4, 3), (32, 32, 16, 4, 3))  # fp32 multiply-adds: larger accumulators spill
_IEEE_FLAT_TILES = ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2))

_MATRIX_ROWS = 64  # of the smallest product that four warps do at a time (wgmma)
_MANY = 32  # images from which boxes waste little of any shape


@functools.lru_cache(maxsize=4096)  # weighing the candidates takes milliseconds
def conv_heuristic(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for `shape` on `device`. `descriptors=False` asks for `conv_pointer` (unaligned tensors)."""
    found = conv_candidates(shape, device, descriptors=descriptors)
    return min(found, key=lambda config: estimate(config, shape, device))


def conv_candidates(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> list[ConvConfig]:
    """The legal configurations that the cost model weighs, never none."""
    ieee = shape.dtype == "float32" and shape.precision == "ieee"
    pointers: tuple[tuple[int, int, int, int, int], ...]
    if is_flat(shape.c):
        pointers = _IEEE_FLAT_TILES if ieee else _FLAT_TILES
    else:
        pointers = _IEEE_TILES if ieee else _POINTER_TILES
    widest = 32 if shape.itemsize == 4 else 64  # channels in one 128-byte row of shared memory
    found = []
    # IEEE fp32 is bound by its arithmetic, so descriptors would buy nothing.
    boxes = descriptors and not ieee and device.has_descriptors and supports_descriptors(shape)
    if not boxes or shape.n < _MANY:
        found += [
            ConvConfig(m, k, min(c, widest), warps, stages, None, split)
            for m, k, c, warps, stages in pointers
            for split in SPLITS
        ]
    if boxes and device.has_gluon:
        found += hopper.candidates(shape, device)
    if boxes:
        for m, k, c, warps, stages in _BOX_TILES:
            swap = m < _MATRIX_ROWS and shape.pointwise  # as boxes of other shapes mostly are, which have several sides
            tile = ConvConfig(m, k, min(c, widest), warps, stages, swap=swap).on(best_box(shape, m))
            if (k if tile.swap else m) >= _MATRIX_ROWS:
                found += [replace(tile, split_k=split) for split in SPLITS]
    return [config for config in found if is_legal(config, shape, device) and _fits_registers(config, device)]


def _fits_registers(config: ConvConfig, device: DeviceFacts) -> bool:
    """On sm_100 a whole accumulator moves through registers at the end."""
    return device.arch < 100 or config.block_m * config.block_k <= 2048 * config.num_warps


def linear_heuristic(m: int, c: int, k: int, itemsize: int, precision: str, device: DeviceFacts) -> ConvConfig:
    """Tiles for a (m, c) by (c, k) product. 16 is the least a tensor core takes.

    Of few rows only the weights take time. They are in tiles so narrow that nearly every SM has a program, with so many
    of their bytes on their way as memory needs (and 96 KB of shared memory hold).
    """
    ieee = itemsize == 4 and precision == "ieee"
    if m > 16:
        return ConvConfig(64, 64, 16, 4, 3) if ieee else ConvConfig(32 if m <= 64 else 64, 64, 128 // itemsize, 4, 3)
    block_k = next((width for width in (64, 32) if 8 * cdiv(k, width) >= 7 * device.sm_count), 16)
    row = 128 if ieee else min(512, 16384 // block_k)  # bytes; multiply-adds are unrolled
    return ConvConfig(16, block_k, min(max(next_power_of_2(c), 16), row // itemsize), 4, 4)


def head_classes(n: int, k: int, device: DeviceFacts) -> int:
    """Classes of `k` that a program of a classifier's head computes of one of `n` images: about a program an SM."""
    share = cdiv(n * k, device.sm_count)
    return 8 if share <= 8 else 16 if share <= 16 else 64  # 32 would spill


class DepthwiseTile(NamedTuple):
    """Output rows, columns and channels of a program of `conv_depthwise`, one warp."""

    rows: int
    box_w: int
    block_c: int


def depthwise_tile(shape: ConvShape, device: DeviceFacts) -> DepthwiseTile:
    """Columns and channels with the fewest instructions in all, then rows with the fewest for the busiest scheduler.

    So batch sizes differ in rows alone. A thread has eight channels of a pixel. Fewer than 64 bytes of channels would
    leave parts of L2's lines. A thread has registers for about 20 rows of pixels; where a filter is larger, each row is
    needed for a short time only.
    """

    def tiles(tile: DepthwiseTile) -> int:
        return cdiv(shape.q, tile.box_w) * cdiv(shape.c, tile.block_c)

    def in_all(tile: DepthwiseTile) -> int:
        return tiles(tile) * _depthwise_instructions(tile, shape)

    def busiest(tile: DepthwiseTile) -> int:
        programs = shape.n * cdiv(shape.p, tile.rows) * tiles(tile)
        return cdiv(programs, 4 * device.sm_count) * _depthwise_instructions(tile, shape)

    rows = [rows for rows in (7, 4, 2, 1) if _rows_read(rows, shape) <= max(20, shape.r + 3)]
    blocks = [block for block in (128, 64, 32, 16) if block * shape.itemsize >= 64 or block >= shape.c]
    best = min((DepthwiseTile(rows[0], 256 // block, block) for block in blocks), key=in_all)
    return min((best._replace(rows=some) for some in rows), key=busiest)


def _depthwise_instructions(tile: DepthwiseTile, shape: ConvShape) -> int:
    """A warp's instructions, fitted to machine code: for each column of taps its pixels, filters and products."""
    rows, a_tap = tile.rows, 28 if tile.block_c > 64 else 16  # 28 for twice the loads
    return 270 + 60 * rows + shape.s * (14 * _rows_read(rows, shape) + shape.r * (a_tap + 8 * rows))


def _rows_read(rows: int, shape: ConvShape) -> int:
    """Input rows that these output rows read."""
    return len({i * shape.stride[0] + r * shape.dilation[0] for i in range(rows) for r in range(shape.r)})


def grouped_tile(shape: ConvShape, groups: int) -> ConvConfig:
    """The configuration of a grouped convolution, which does not depend on the number of images.

    A block of filters is of one group, except where groups are narrower than a product: then of several.
    """
    ieee = shape.dtype == "float32" and shape.precision == "ieee"
    c, k = shape.c // groups, shape.k // groups
    least = 32 if max(c, k) <= 16 and not ieee else 16
    block_k = min(max(next_power_of_2(k), least), 128 if shape.itemsize == 2 else 64)
    stages = 1 if c * shape.itemsize % 4 else 3  # filters of 2 bytes are not copied while the product before runs
    c *= groups_at_once(shape.c, shape.k, groups, block_k)
    widest = 16 if ieee else 128 // shape.itemsize
    if is_flat(c):
        return ConvConfig(64, block_k, widest, 8, min(stages, 2))
    block_c = max(min(next_power_of_2(c), widest), 16)
    return ConvConfig(64 if ieee else 128, block_k, block_c, 8 if block_k > 32 and not ieee else 4, stages)


@dataclass(frozen=True)
class StemConfig:
    """Tile of the stem's second launch: `strip` pooled rows of `block_q // 2 - 1` columns by `block_k` channels."""

    block_q: int
    block_k: int
    strip: int
    num_warps: int
    num_stages: int


# (block_q, num_warps, num_stages) that compile without spills and fit, by the architecture's major number. None does on
# sm_120, which has a third of the shared memory and no matrix instruction that reads it.
_STEM_TILES = {9: ((128, 8, 2), (64, 4, 2)), 10: ((64, 4, 2),)}


@functools.lru_cache(maxsize=4096)
def stem_heuristic(n: int, k: int, p: int, q: int, device: DeviceFacts) -> StemConfig | None:
    """Tiles for a stem with a result of (n, k, p, q); None where convolution and pool had better be two launches.

    A strip computes one row of the convolution besides its own, so long strips are cheaper, short ones more parallel.
    """
    tiles = stem_tiles(device)
    if not tiles:
        return None
    few = n * p * cdiv(q, 63) < device.sm_count  # narrow tiles then use twice as many SMs
    forms = [replace(tiles[-1 if few else 0], strip=rows) for rows in range(1, p + 1)]
    return min(forms, key=lambda form: (strip_turns(form, n, k, p, q, device), form.strip))


def stem_tiles(device: DeviceFacts) -> list[StemConfig]:
    """The stem's tiles on this device, widest first, with strips of one row; none if it had better be two launches."""
    return [StemConfig(width, 64, 1, warps, stages) for width, warps, stages in _STEM_TILES.get(device.arch // 10, ())]


def strip_turns(tile: StemConfig, n: int, k: int, p: int, q: int, device: DeviceFacts) -> int:
    """Rows of the convolution that an SM computes one after another, each strip one besides its own."""
    programs = n * cdiv(k, tile.block_k) * cdiv(q, tile.block_q // 2 - 1) * cdiv(p, tile.strip)
    return cdiv(programs, device.sm_count) * (tile.strip + 1)


_LONE = 1.5  # what a row takes a group that has nobody beside it to multiply while it stores, to one of two that share


@functools.lru_cache(maxsize=4096)
def hopper_strip(n: int, p: int, q: int, device: DeviceFacts) -> int:
    """Rows of a strip of `hopper_stem` for results of (n, 64, p, q): the longest of those that take the least time."""
    return min(range(1, p + 1), key=lambda strip: (hopper_turns(strip, n, p, q, device), -strip))


def hopper_turns(strip: int, n: int, p: int, q: int, device: DeviceFacts) -> float:
    """Rows of the convolution that the busiest SM computes one after another: two for a pooled row, one for a strip."""
    items = cdiv(n * cdiv(q, 56) * cdiv(p, strip), device.sm_count)
    return (2 * strip + 1) * (items // 2 * 2 + items % 2 * _LONE)


def best_box(shape: ConvShape, block_m: int, *, several_sides: bool = True) -> tuple[int, int, int]:
    """The box of `block_m` pixels that covers the output with the least waste.

    Boxes (1, 1, n), which need no swap, win ties. Without `several_sides` only those are asked that need none.
    """
    boxes = [box for box in boxes_of(block_m) if box[0] == 1 or may_have_rows(shape, box[2])]
    boxes = [box for box in boxes if several_sides or not has_several_sides(box)]
    return by_waste(boxes, shape)[0]
