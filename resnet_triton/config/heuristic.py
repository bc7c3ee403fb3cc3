"""Tile choices from shape and device facts alone: nothing is timed at a call, no state, the same answer everywhere.

A cost model chooses (`estimate`), fitted to what was timed on an H200. Where a form was timed for the very shape
(`measured.py`), its time stands for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..kernels.launch import cdiv, next_power_of_2
from ..kernels.values import ConvConfig, groups_at_once, has_several_sides, is_flat
from . import hopper
from .conv import (
    CONV64,
    FEW,
    SPLITS,
    ConvShape,
    boxes_of,
    by_waste,
    is_legal,
    may_have_rows,
    shared_memory,
    steps,
    supports_descriptors,
    taps,
    tiles,
)
from .device import DeviceFacts
from .measured import best_measured

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
_MATRIX = {16: 0.2, 32: 0.4, 64: 0.8}  # share of the matrix rate by columns: narrow products read more operands
_COLUMN = 0.88  # the same where pixels are loaded for a column of taps: a fifth fewer bytes; stated, not timed
_SLACK = 1.1  # a warp-specialised form, timed nowhere yet, may be so much slower by the model than another was
_MANY = 32  # images from which boxes waste little of any shape


class Rates(NamedTuple):
    """What an SM does, in nanoseconds and in what is done in one, fitted by `python -m benchmarks.fit_estimate`."""

    flops: float = 6230
    bytes: float = 86  # from L2
    launch: float = 1660
    program: float = 600  # batch norm's loads and the first tile's arrival
    turn: float = 150  # at least, of a main loop, of 64 channels
    pointer_turn: float = 219
    pointers: float = 2.08  # loads through pointers spend instructions on addresses and masks, beside the products
    element: float = 0.138  # of the result
    split: float = 840  # a store, a barrier, an atomic
    specialised_flops: float = 7260
    specialised_turn: float = 44  # besides its products: barriers
    hidden: float = 0.65  # of a result's time, where an accumulator has 4,096 elements
    residual: float = 1.32  # times as much for a result with one


RATES = Rates()


class Latencies(NamedTuple):
    """What a dependent launch is a chain of, in nanoseconds, and `hopper_few`. Stated, not fitted: none has run yet."""

    launch: float = (
        1000  # from the last store of the kernel before to the first load, and from the last store to the end
    )
    load: float = 600  # TMA, from L2
    result: float = 250  # through shared memory
    parts: float = 350  # from L2, the first of the parts that the last program adds
    width: float = 224  # bytes a ns that a product's operands come from shared memory with
    beside: float = 96 * 1024  # bytes of shared memory that a program of the launch before has


LATENCIES = Latencies()


@functools.lru_cache(maxsize=4096)  # weighing the candidates takes milliseconds
def conv_heuristic(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for `shape` on `device`. `descriptors=False` asks for the pointer path (unaligned tensors)."""
    chosen = best_estimated(shape, device, descriptors=descriptors)
    timed = best_measured(shape, device, descriptors=descriptors)
    if timed is None or (chosen.kernel and estimate(chosen, shape, device) < _SLACK * 1000 * timed.us):
        return chosen
    return timed.config


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
    of their bytes on their way as memory needs (and 80 KB of shared memory hold).
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
    """Those of a warp, fitted to machine code: for each column of taps its pixels, its filters and their products."""
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


def estimate(
    config: ConvConfig, shape: ConvShape, device: DeviceFacts, rates: Rates = RATES, chained: Latencies = LATENCIES
) -> float:
    """Nanoseconds that a launch might take, with what an H200's SM does. Those in Gluon are taken for dependent ones.

    A program's products and loads keep an SM busy, several programs side by side all the more; but however few there
    are, each is a chain: what comes before its loop, turn after turn, its result. DRAM is left out, as what it moves
    hardly depends on the tile: a pointwise convolution of many images may take longer than this.
    """
    if config.kernel == FEW:
        return _estimate_few(config, shape, device, rates, chained)
    m, k = config.block_m, config.block_k
    column = taps(config, shape)
    turns = cdiv(steps(config, shape), config.split_k) * column + cdiv(shape.shortcut_c, config.block_c)
    flops = 2 * m * k * config.block_c * (1 if shape.itemsize == 2 else 2)
    result = rates.element * m * k * (rates.residual if shape.residual else 1)
    programs = cdiv(tiles(config, shape) * config.split_k, device.sm_count)  # of the busiest SM
    if config.kernel:  # one program an SM takes them in turn
        columns = m // 4 if config.kernel == CONV64 else k
        share = _COLUMN if column > 1 else _MATRIX.get(columns, 1.0)
        turn = flops / (rates.specialised_flops * share) + rates.specialised_turn / column
        accumulator = m * k // (8 if config.kernel == CONV64 else 2)
        result *= rates.hidden * (accumulator / 4096) ** 0.3  # the larger, the less of it other products hide
        work = rates.program + programs * (turns * turn + result)
    else:
        loads = (m + k) * config.block_c * shape.itemsize
        turn = max(flops / (rates.flops * _MATRIX.get(m if config.swap else k, 1.0)), loads / rates.bytes)
        least = rates.turn
        if config.box is None:
            turn, least = turn * rates.pointers, rates.pointer_turn
        beside = max(min(_programs_per_sm(config, shape, device), programs), 1)
        chain = rates.program + turns * max(turn, least * config.block_c / 64) + result
        work = max(programs * (turns * turn + result), cdiv(programs, beside) * chain)
    work += chained.launch if config.kernel else rates.launch
    if config.split_k == 1:
        return work
    # The last program reads every partial.
    return work + rates.split + 6 * m * k * (config.split_k + 1) / rates.bytes


def _estimate_few(config: ConvConfig, shape: ConvShape, device: DeviceFacts, rates: Rates, chained: Latencies) -> float:
    """The same of `hopper_few`: an SM with room for it beside the launch before has its filters before its input."""
    m = config.block_m
    blocks = steps(config, shape) // config.split_k + bool(shape.shortcut_c)
    filters, pixels = blocks * 64 * 128 / rates.bytes, blocks * m * 128 / rates.bytes
    products = blocks * (64 + m) * 128 / chained.width
    programs = cdiv(tiles(config, shape) * config.split_k, device.sm_count)  # of the busiest SM
    shared = shared_memory(config, shape)
    chain = chained.load + max(pixels, products) + chained.result
    turns = cdiv(programs, device.shared_memory // shared)
    ns = chained.launch + turns * chain + (programs - 1) * max(filters + pixels, products)
    if programs * shared + chained.beside > device.shared_memory:
        ns += filters
    if config.split_k > 1:
        ns += rates.split + chained.parts + config.split_k * m * 64 * 4 / rates.bytes
    return ns


def _programs_per_sm(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> int:
    """By shared memory, and by registers: accumulators and some 56 others a thread."""
    accumulators = config.block_m * config.block_k // (32 * config.num_warps) * (2 if shape.shortcut_c else 1)
    registers = 32 * config.num_warps * max(64, accumulators + 56)
    return max(1, min(device.shared_memory // shared_memory(config, shape), 65536 // registers))


def best_box(shape: ConvShape, block_m: int, *, several_sides: bool = True) -> tuple[int, int, int]:
    """The box of `block_m` pixels that covers the output with the least waste.

    Boxes (1, 1, n), which need no swap, win ties. Without `several_sides` only those are asked that need none.
    """
    boxes = [box for box in boxes_of(block_m) if box[0] == 1 or may_have_rows(shape, box[2])]
    boxes = [box for box in boxes if several_sides or not has_several_sides(box)]
    return by_waste(boxes, shape)[0]
