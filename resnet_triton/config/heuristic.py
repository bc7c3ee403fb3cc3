"""Tile choices from shape and device facts alone: no timing, no state, the same answer everywhere.

The estimate is the number of rounds the GPU needs (tiles over SMs) times the work of one tile, where a tile's speed is
limited by how much arithmetic it does per byte it loads. Nothing here has been fitted to a measurement yet.
"""

from __future__ import annotations

from ..device import DeviceFacts
from .conv import ConvConfig, ConvShape, is_legal, supports_descriptors

# (block_m, block_k, num_warps, num_stages)
_BOX_TILES = ((256, 128, 8, 3), (128, 128, 8, 4), (256, 64, 8, 3), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4))
_POINTER_TILES = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3))


def conv_heuristic(shape: ConvShape, device: DeviceFacts, *, descriptors: bool = True) -> ConvConfig:
    """The configuration for `shape` on `device`. `descriptors=False` asks for the pointer path (unaligned tensors)."""
    ieee = shape.dtype == "float32" and shape.precision == "ieee"
    candidates: list[ConvConfig] = []
    if descriptors and device.has_descriptors and supports_descriptors(shape):
        block_c = 128 // shape.itemsize  # one 128-byte swizzled row
        for block_m, block_k, warps, stages in _BOX_TILES:
            if ieee:
                break  # no tensor cores: the accumulators of these tiles spill
            box = _box(shape, block_m)
            candidates.append(ConvConfig(block_m, block_k, block_c, warps, stages, box))
    if not candidates:
        if ieee:
            candidates = [ConvConfig(64, 64, 16, 4, 3), ConvConfig(32, 32, 16, 4, 3)]
        else:
            block_c = 32 if shape.dtype == "float32" or shape.c <= 32 else 64
            candidates = [ConvConfig(m, k, block_c, warps, stages) for m, k, warps, stages in _POINTER_TILES]
    legal = [config for config in candidates if is_legal(config, shape, device)]
    return min(legal, key=lambda config: _estimate(config, shape, device))


def linear_heuristic(m: int, k: int, itemsize: int, precision: str) -> ConvConfig:
    """Tiles for a (m, c) by (c, k) product. Few rows, so small tiles; 16 is the least a tensor core takes."""
    if itemsize == 4 and precision == "ieee":
        return ConvConfig(16 if m <= 16 else 64, 64, 16, 4, 3)
    block_m = 16 if m <= 16 else 32 if m <= 64 else 64
    return ConvConfig(block_m, 64, 128 // itemsize, 4, 3)


def tiles(config: ConvConfig, shape: ConvShape) -> int:
    """Programs in the launch."""
    if config.box is None:
        pixels = -(-shape.n * shape.p * shape.q // config.block_m)
    else:
        h, w, n = config.box
        pixels = -(-shape.p // h) * -(-shape.q // w) * -(-shape.n // n)
    return pixels * -(-shape.k // config.block_k)


def _estimate(config: ConvConfig, shape: ConvShape, device: DeviceFacts) -> float:
    rounds = -(-tiles(config, shape) // device.sm_count)
    area = config.block_m * config.block_k
    intensity = area / (config.block_m + config.block_k)  # multiply-adds per element loaded
    return rounds * area / min(intensity, 85.0)  # 256x128 and 128x256 reach 85; more would not be faster


def _box(shape: ConvShape, block_m: int) -> tuple[int, int, int]:
    """The box of `block_m` pixels that covers the output with the least waste; ties go to more images, then columns.

    Whole-image-batch boxes (1, 1, n) win ties because their leading unit dimensions let wgmma read the tile straight
    from shared memory.
    """
    flat = shape.stride == (2, 2) or (shape.shortcut_c > 0 and shape.shortcut_stride == (2, 2))
    boxes = []
    for log_h in range(1 if flat else block_m.bit_length()):
        for log_w in range(block_m.bit_length() - log_h):
            h, w = 1 << log_h, 1 << log_w
            boxes.append((h, w, block_m // (h * w)))

    def covered(box: tuple[int, int, int]) -> tuple[int, int, int]:
        h, w, n = box
        return -(-shape.p // h) * -(-shape.q // w) * -(-shape.n // n), -n, h

    return min(boxes, key=covered)
