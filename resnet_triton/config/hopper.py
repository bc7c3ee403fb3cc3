"""The forms of the warp-specialised convolutions (`kernels/hopper_*.py`) that are worth weighing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..kernels.values import ConvConfig
from .conv import CONV, CONV64, ConvShape, is_legal
from .device import DeviceFacts

# (block_m, block_k, num_stages): pixels are two groups', and an accumulator has to fit a group's registers.
_TILES = ((128, 64, 6), (128, 128, 5), (128, 256, 3), (256, 64, 4), (256, 128, 3))
_TILES64 = ((128, 5), (64, 11), (32, 11))  # (images, num_stages)
_SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16)


def candidates(shape: ConvShape, device: DeviceFacts) -> Iterator[ConvConfig]:
    """The legal forms that the cost model weighs: each tile with the box that wastes least, at each split."""
    for m, k, stages in _TILES:
        found = [ConvConfig(m, k, 64, 4, stages, box, kernel=CONV) for box in boxes(m)]
        legal = [config for config in found if is_legal(config, shape, device)]
        if legal:
            best = min(legal, key=lambda config: waste(config, shape))
            forms = (replace(best, split_k=split) for split in _SPLITS)
            yield from (config for config in forms if is_legal(config, shape, device))
    for images, stages in _TILES64:
        config = ConvConfig(4 * images, 64, 64, 4, stages, (2, 2, images), kernel=CONV64)
        if is_legal(config, shape, device):
            yield config


def boxes(block_m: int) -> list[tuple[int, int, int]]:
    """Every box of so many pixels whose sides are powers of two."""
    sides = [1 << i for i in range(block_m.bit_length())]
    return [(h, w, block_m // (h * w)) for h, w in product(sides, sides) if h * w <= block_m]


def waste(config: ConvConfig, shape: ConvShape) -> tuple[int, int, int]:
    """Boxes that cover the output; then more images, then columns."""
    h, w, n = config.box or (1, 1, 1)
    return -(-shape.p // h) * -(-shape.q // w) * -(-shape.n // n), -n, h
