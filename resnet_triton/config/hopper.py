"""The forms of the convolutions in Gluon (`kernels/hopper_*.py`) that are worth weighing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

from ..kernels.values import CONV, CONV64, FEW, PINGPONG, ConvConfig
from .conv import SPLITS, ConvShape, boxes_of, by_waste, is_legal
from .device import DeviceFacts

# (block_m, block_k, most num_stages): pixels are two groups', and an accumulator has to fit a group's registers.
_TILES = ((128, 64, 6), (128, 128, 5), (128, 256, 3), (256, 64, 4), (256, 128, 3))
_TWO_ROWS = (128, 64, 3)  # of boxes of two rows, where a slot holds a column of taps
_TILES64 = ((128, 5), (64, 11), (32, 11))  # (images, num_stages)
_ROWS = (2, 4, 8)  # of 8 pixels, of a box of few images
FEW_IMAGES = 16
"""More leave no multiprocessor idle, and what `hopper_few` has no loop for is then asked for many times."""


def candidates(shape: ConvShape, device: DeviceFacts) -> Iterator[ConvConfig]:
    """The legal forms that the cost model weighs: each tile with the box that wastes least, at each split."""
    tiles = [(tile, boxes_of(tile[0])) for tile in _TILES]
    if (shape.r, shape.stride) == (3, (1, 1)) and shape.n <= _TWO_ROWS[0] // 2:  # more fill tiles of more filters
        tiles.append((_TWO_ROWS, [box for box in boxes_of(_TWO_ROWS[0]) if box[0] == 2]))
    for kernel, ((m, k, stages), boxes) in product((CONV, PINGPONG), tiles):
        forms = (
            ConvConfig(m, k, 128 // shape.itemsize, 4, deep, box, kernel=kernel)
            for deep in range(stages, 2, -1)  # one slot to fill while products read two
            for box in by_waste(boxes, shape)
        )
        best = next((config for config in forms if is_legal(config, shape, device)), None)
        if best is not None:
            shared = (replace(best, split_k=split) for split in SPLITS)
            yield from (config for config in shared if is_legal(config, shape, device))
    for images, stages in _TILES64:
        config = ConvConfig(2 * images, 64, 64, 4, stages, (2, 1, images), kernel=CONV64)
        if is_legal(config, shape, device):
            yield config
    if shape.n <= FEW_IMAGES:
        small = [(1, 1, 8 * rows) if shape.pointwise else (rows, 8, 1) for rows in _ROWS]
        few = (ConvConfig(prod(box), 64, 64, 4, 1, box, split, kernel=FEW) for box in small for split in SPLITS)
        yield from (config for config in few if is_legal(config, shape, device))
