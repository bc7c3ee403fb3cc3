"""Tile choices from shape and device facts alone: nothing is timed at a call, no state, the same answer everywhere.

A form that was measured for the very shape comes first (`measured.py`); elsewhere a cost model chooses. Its estimate is
the number of rounds the GPU needs (programs over SMs) times the work of one program, which is bound by its arithmetic
or by what it loads, plus what sharing a tile costs. It has been fitted to no measurement.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import product

from ..kernels.values import ConvConfig, has_several_sides, is_flat
from .conv import ConvShape, is_legal, may_have_rows, steps, supports_descriptors, tiles
from .device import DeviceFacts
from .measured import best_measured

# (block_m, block_k, block_c of a 16-bit type, num_warps, num_stages), each seen to compile without spills.
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

_SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
_FLOPS_PER_NS = 6000  # one SM: 790 TFLOP/s over 132
_BYTES_PER_NS = 73  # one SM reading L2: 9.7 TB/s over 132
_PROGRAM_NS = 500  # filling the pipeline, batch norm, the store: half of it hidden behind other programs
_SPLIT_NS = 1500  # a store, a barrier, an atomic and the first load back, none of them overlapped
_MATRIX_ROWS = 64  # of the smallest product that four warps do at a time (wgmma)
_MATRIX = {16: 0.2, 32: 0.4, 64: 0.75}  # share of the matrix rate by columns: narrow products read more operands
_MANY = 32  # images from which boxes waste little of any shape
_POINTERS = 1.4  # loads through pointers spend instructions on addresses and masks, beside the products


@functools.lru_cache(maxsize=4096)  # every launch asks, and weighing the candidates takes milliseconds
def conv_heuristic(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for `shape` on `device`. `descriptors=False` asks for the pointer path (unaligned tensors)."""
    measured = best_measured(shape, device, descriptors=descriptors)
    return measured or best_estimated(shape, device, descriptors=descriptors)


def best_estimated(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """What the cost model alone would choose."""
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
            for split in _SPLITS
        ]
    if boxes:
        for m, k, c, warps, stages in _BOX_TILES:
            tile = ConvConfig(m, k, min(c, widest), warps, stages).on(best_box(shape, m))
            if (k if tile.swap else m) >= _MATRIX_ROWS:
                found += [replace(tile, split_k=split) for split in _SPLITS]
    return [config for config in found if is_legal(config, shape, device) and _fits_registers(config, device)]


def _fits_registers(config: ConvConfig, device: DeviceFacts) -> bool:
    """On sm_100 a whole accumulator moves through registers at the end."""
    return device.arch < 100 or config.block_m * config.block_k <= 2048 * config.num_warps


def linear_heuristic(m: int, k: int, itemsize: int, precision: str) -> ConvConfig:
    """Tiles for a (m, c) by (c, k) product. Few rows, so small tiles; 16 is the least a tensor core takes."""
    if itemsize == 4 and precision == "ieee":
        return ConvConfig(16 if m <= 16 else 64, 64, 16, 4, 3)
    block_m = 16 if m <= 16 else 32 if m <= 64 else 64
    return ConvConfig(block_m, 64, 128 // itemsize, 4, 3)


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
    few = n * p * -(-q // 63) < device.sm_count  # narrow tiles then use twice as many SMs
    forms = [replace(tiles[-1 if few else 0], strip=rows) for rows in range(1, p + 1)]
    return min(forms, key=lambda form: (strip_turns(form, n, k, p, q, device), form.strip))


def stem_tiles(device: DeviceFacts) -> list[StemConfig]:
    """The stem's tiles on this device, widest first, with strips of one row; none if it had better be two launches."""
    return [StemConfig(width, 64, 1, warps, stages) for width, warps, stages in _STEM_TILES.get(device.arch // 10, ())]


def strip_turns(tile: StemConfig, n: int, k: int, p: int, q: int, device: DeviceFacts) -> int:
    """Rows of the convolution that an SM computes one after another, each strip one besides its own."""
    programs = n * -(-k // tile.block_k) * -(-q // (tile.block_q // 2 - 1)) * -(-p // tile.strip)
    return -(-programs // device.sm_count) * (tile.strip + 1)


def estimate(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> float:
    """Nanoseconds the launch might take; only the order of the candidates matters. The ceilings are an H200's."""
    m, k = config.block_m, config.block_k
    turns = -(-steps(config, shape) // config.split_k)
    flops = 2 * m * k * config.block_c * turns
    rate = _FLOPS_PER_NS * _MATRIX.get(m if config.swap else k, 1.0)
    if shape.itemsize == 4:
        rate /= 2
    loading = (m + k) * turns * config.block_c * shape.itemsize / _BYTES_PER_NS
    rounds = -(-tiles(config, shape) * config.split_k // device.sm_count)
    work = rounds * (max(flops / rate, loading) * (_POINTERS if config.box is None else 1.0) + _PROGRAM_NS)
    if config.split_k == 1:
        return work
    return work + _SPLIT_NS + 4 * m * k * (config.split_k + 1) / _BYTES_PER_NS  # the last program reads every partial


def best_box(shape: ConvShape, block_m: int, *, several_sides: bool = True) -> tuple[int, int, int]:
    """The box of `block_m` pixels that covers the output with the least waste; ties go to more images, then columns.

    So boxes (1, 1, n), which need no swap, win ties. Without `several_sides` only those are asked that need none.
    """
    sides = [1 << i for i in range(block_m.bit_length())]
    boxes = [(h, w, block_m // (h * w)) for h, w in product(sides, sides) if h * w <= block_m]
    boxes = [(h, w, n) for h, w, n in boxes if h == 1 or may_have_rows(shape, n)]
    boxes = [box for box in boxes if several_sides or not has_several_sides(box)]

    def covered(box: tuple[int, int, int]) -> tuple[int, int, int]:
        h, w, n = box
        return -(-shape.p // h) * -(-shape.q // w) * -(-shape.n // n), -n, h

    return min(boxes, key=covered)
