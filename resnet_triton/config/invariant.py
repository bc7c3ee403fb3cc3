"""One configuration for all batch sizes, so that an image's sums are taken in one order whatever its batch is.

What decides on the order is the same for every batch: the kernel's path, its tile, its split, its warps and stages, and
whether pixels or filters are the rows of its products. The box may differ, for it only says which pixels share a tile,
and so may the number of programs.

The price is that no batch size gets what is best for it. The choice is the one that stands best where it stands worst,
over `BATCHES`, by the cost model. Tuned tables are not asked: they are tuned for one batch size each.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from ..kernels.values import ConvConfig
from .conv import ConvShape, tiles
from .device import DeviceFacts
from .estimate import estimate
from .heuristic import StemConfig, best_box, conv_candidates, stem_tiles, strip_turns

BATCHES = (1, 4, 16, 64, 256)
_DRAM_BYTES_PER_NS = 4300  # an H200's


def invariant(shape: ConvShape, device: DeviceFacts) -> ConvConfig:
    """The configuration for `shape`, which at another batch size differs in its box alone.

    It is never a kernel in Gluon: no GPU has shown yet that these add alike in every row of a tile. The stem's kernel
    in Gluon need not be left out, for there a pixel has the same place in its tile in any batch (`ops/stem.py`).
    """
    device = replace(device, gluon=False)
    return _fit(_tile(replace(shape, n=1), device), shape)


@functools.lru_cache(maxsize=1024)
def _tile(shape: ConvShape, device: DeviceFacts) -> ConvConfig:
    """The tile for all batch sizes of `shape`, with the box of one of them."""
    shapes = [replace(shape, n=n) for n in BATCHES]
    found = [conv_candidates(s, device) for s in shapes]
    best = [min(ns_with_partials(c, s, device) for c in configs) for s, configs in zip(shapes, found, strict=True)]

    def worst(tile: ConvConfig) -> float:
        return max(ns_with_partials(_fit(tile, s), s, device) / least for s, least in zip(shapes, best, strict=True))

    return min(found[0], key=worst)


def ns_with_partials(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> float:
    """`estimate`, which counts the partial sums of one round of programs, and the memory traffic of all rounds.

    The heuristic splits where one round is enough. A split that holds for every batch size writes and reads those of a
    large batch, too: `split_k` fp32 copies of the output.
    """
    if config.split_k == 1:
        return estimate(config, shape, device)
    partials = 4 * config.split_k * config.block_m * config.block_k * tiles(config, shape)
    return estimate(config, shape, device) + 2 * partials / _DRAM_BYTES_PER_NS


def _fit(tile: ConvConfig, shape: ConvShape) -> ConvConfig:
    """`tile` with the box that suits this batch size."""
    if tile.box is None:
        return tile
    return replace(tile, box=best_box(shape, tile.block_m, several_sides=tile.swap))


@functools.lru_cache(maxsize=1024)
def invariant_stem(k: int, p: int, q: int, device: DeviceFacts) -> StemConfig | None:
    """The stem's tile for results of (any, k, p, q); None where convolution and pool are two launches."""
    forms = [replace(tile, strip=rows) for tile in stem_tiles(device) for rows in range(1, p + 1)]
    if not forms:
        return None
    turns = {form: [strip_turns(form, n, k, p, q, device) * form.block_q for n in BATCHES] for form in forms}
    best = [min(column) for column in zip(*turns.values(), strict=True)]
    return min(forms, key=lambda form: max(t / least for t, least in zip(turns[form], best, strict=True)))
