"""Which configurations of a convolution are worth a try, best first by the cost model.

The tuner times these. The tables use the same model to judge whether a configuration tuned for one batch size will do
for another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..kernels.values import ConvConfig
from . import hopper
from .conv import ConvShape, boxes_of, is_legal, tiles
from .device import DeviceFacts
from .estimate import estimate
from .heuristic import conv_heuristic

AXES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128, 256),
    "block_c": (16, 32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "split_k": tuple(range(1, 17)),
    "swap": (False, True),
}
"""The values that fields other than the box may take, in order: a neighbour is one step away."""

_WASTE = 1.35  # a box may cover this many times what the best box covers
_HOPELESS = 1.5  # a neighbour this many times slower in the model is not tried
_SLACK = 1.1  # differences below 10 % mean nothing to a model of this kind


@functools.lru_cache(maxsize=8)  # asked twice in a tune: to compile ahead, and to time
def candidates(shape: ConvShape, device: DeviceFacts, count: int) -> tuple[ConvConfig, ...]:
    """The heuristic's choice, then about the `count` best tiles by the cost model, each in its most promising form.

    The model knows neither warps nor stages, and many boxes are equal to it: a plain ranking would be variations of one
    tile. Variations are what `neighbours` is for.
    """
    best: dict[tuple[Any, ...], tuple[tuple[float, ...], ConvConfig]] = {}
    for config in _forms(shape, device):
        _, w, n = config.box or (0, 0, 0)
        row = abs(config.block_c * shape.itemsize - 128)  # shared memory is swizzled in rows of 128 bytes
        key = (estimate(config, shape, device), row, -n, -w)
        tile = (config.kernel, config.block_m, config.block_k)
        if tile not in best or key < best[tile][0]:
            best[tile] = key, config
    ranked = [config for _, config in sorted(best.values(), key=lambda pair: pair[0])]
    leaders = {config.kernel: config for config in reversed(ranked)}.values()  # the model may misjudge a whole kernel
    kept = {*ranked[: count - 1], *leaders}
    return tuple(dict.fromkeys([conv_heuristic(shape, device), *(config for config in ranked if config in kept)]))


def neighbours(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> list[ConvConfig]:
    """Legal configurations one step of one field away, a box's sides among them, that are not hopeless."""
    near = []
    for field, values in AXES.items():
        line = [c for c in (replace(config, **{field: v}) for v in values) if c == config or _fits(c, shape, device)]
        at = line.index(config) if config in line else 0
        near += line[max(at - 1, 0) : at + 2]
    if config.is_gluon:
        near += [replace(config, num_stages=config.num_stages + step) for step in (-1, 1)]
        near += [replace(config, box=box) for box in boxes_of(config.block_m)]
        near += hopper.candidates(shape, device)
    elif config.box is None:
        near += [config.on(box) for box in boxes(config, config.block_m, shape, device)[:1]]
    else:
        near += [config.on(box) for box in _box_steps(config.box)]
        near.append(replace(config, box=None, swap=False))
    worst = _HOPELESS * estimate(config, shape, device)
    fitting = (c for c in dict.fromkeys(near) if c != config and _fits(c, shape, device))
    return [c for c in fitting if estimate(c, shape, device) <= worst]


def _box_steps(box: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """One side doubled, one halved, or both."""
    for up, down in product((None, 0, 1, 2), repeat=2):
        h, w, n = (side * (2 if i == up else 1) // (2 if i == down else 1) for i, side in enumerate(box))
        yield h, w, n


def boxes(like: ConvConfig, block_m: int, shape: ConvShape, device: DeviceFacts) -> list[tuple[int, int, int]]:
    """Boxes of `block_m` pixels that are legal in `like` and cover the output without much waste, least waste first."""
    covered = {}
    for box in boxes_of(block_m):
        config = like.on(box)
        if is_legal(config, shape, device):
            covered[box] = tiles(config, shape)
    least = min(covered.values(), default=0)
    return sorted((box for box in covered if covered[box] <= _WASTE * least), key=lambda box: covered[box])


def adapt(
    config: ConvConfig, tuned: ConvShape, shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True
) -> ConvConfig | None:
    """`config`, tuned for another batch size, fitted to `shape`; None if the cost model's own choice promises more.

    The box may be another one of the same size. The model may misjudge a tile, but it does so at both batch sizes
    alike: the tile is refused if it stands worse against the model's choice here than where it was measured.
    """
    if not is_legal(config, tuned, device):  # not even where it claims to have been measured
        return None
    forms = [config]
    if config.box is not None:
        forms += [config.on(box) for box in boxes(config, config.block_m, shape, device)]
    legal = [c for c in forms if is_legal(c, shape, device)]
    if not legal or (config.box is not None and not descriptors):
        return None

    def against_model(c: ConvConfig, at: ConvShape) -> float:
        own = conv_heuristic(at, device, descriptors=descriptors)
        return estimate(c, at, device) / estimate(own, at, device)

    best = min(legal, key=lambda c: estimate(c, shape, device))
    return best if against_model(best, shape) <= _SLACK * against_model(config, tuned) else None


def _forms(shape: ConvShape, device: DeviceFacts) -> Iterator[ConvConfig]:
    """Every legal tile with every box and split, at the warps and stages that usually suit it."""
    for block_m in AXES["block_m"]:
        slim = ConvConfig(block_m, 16, 16, 4, 2)  # legal wherever a larger tile of these boxes is
        every_box = (None, *boxes(slim, block_m, shape, device))
        for block_k, block_c, box in product(AXES["block_k"], AXES["block_c"], every_box):
            warps = 4 if block_m * block_k <= 64 * 128 else 8
            stages = [ConvConfig(block_m, block_k, block_c, warps, s) for s in (4, 3, 2)]
            forms = stages if box is None else [tile.on(box) for tile in stages]
            deepest = next((c for c in forms if _fits(c, shape, device)), None)
            if deepest is not None:
                forms = [replace(deepest, split_k=split) for split in AXES["split_k"]]
                yield from (c for c in forms if _fits(c, shape, device))
    yield from hopper.candidates(shape, device)


def _fits(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> bool:
    """Legal, and not sure to spill: what spills takes the compiler minutes and is never fastest."""
    if config.is_gluon:
        return is_legal(config, shape, device)
    area = config.block_m * config.block_k
    ieee = shape.dtype == "float32" and shape.precision == "ieee"  # multiply-adds unroll over the whole tile
    accumulators = area // (32 * config.num_warps)
    gathered = max(config.block_m, config.block_k) * config.block_c // (32 * config.num_warps)
    if accumulators > (32 if ieee else 128) or (config.box is None and gathered > 64):
        return False
    return is_legal(config, shape, device)
