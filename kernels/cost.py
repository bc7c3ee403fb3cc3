"""FLOPs and bytes of each kernel as plain integers: what rooflines, predictions and benchmarks divide by.

One multiply-add counts as two FLOPs. Bytes are the least a kernel can move through DRAM: every input read once, every
output written once, at `itemsize` bytes an element. Batch norm's vectors are too small to count.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """FLOPs and DRAM bytes of one launch."""

    flops: int
    bytes: int

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds below which the launch cannot go on a device with these ceilings."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def conv_bn_relu(
    *, n: int, c: int, h: int, w: int, k: int, p: int, q: int, r: int, s: int, itemsize: int,
    stride: tuple[int, int] = (1, 1), groups: int = 1, residual: bool = False, shortcut_c: int = 0,
) -> Cost:  # fmt: skip
    """Convolution of (n, c, h, w) by (k, c / groups, r, s) to (n, k, p, q), with a residual or a 1x1 shortcut."""
    pixels = n * p * q
    taps = c // groups * r * s + shortcut_c
    flops = 2 * pixels * k * taps
    rows = min(p * r, h) if r < stride[0] else h  # a filter narrower than its stride skips the rows in between
    columns = min(q * s, w) if s < stride[1] else w
    read = n * c * rows * columns
    elements = read + k * taps + pixels * k * (2 if residual else 1) + pixels * shortcut_c
    return Cost(flops, elements * itemsize)


def stem(*, n: int, c: int, h: int, w: int, k: int, p: int, q: int, itemsize: int) -> Cost:
    """7x7/2 convolution of (n, c, h, w) and 3x3/2 max pool, to (n, k, p, q); packing and padding not counted."""
    rows, columns = (h - 1) // 2 + 1, (w - 1) // 2 + 1
    return Cost(2 * n * rows * columns * k * c * 49, (n * c * h * w + k * c * 49 + n * k * p * q) * itemsize)


def max_pool(*, n: int, c: int, h: int, w: int, p: int, q: int, itemsize: int) -> Cost:
    """Max pooling of (n, c, h, w) to (n, c, p, q)."""
    return Cost(0, n * c * (h * w + p * q) * itemsize)


def global_avg_pool(*, n: int, c: int, h: int, w: int, itemsize: int) -> Cost:
    """Mean over all pixels of (n, c, h, w)."""
    return Cost(n * c * h * w, n * c * (h * w + 1) * itemsize)


def avg_pool_linear(*, n: int, c: int, h: int, w: int, k: int, itemsize: int) -> Cost:
    """Mean over all pixels of (n, c, h, w), then (n, c) by (k, c) and a bias."""
    return Cost(n * c * h * w + 2 * n * c * k, (n * c * h * w + k * c + n * k) * itemsize)


def add_relu(*, numel: int, itemsize: int) -> Cost:
    """Sum of two tensors of `numel` elements, then ReLU."""
    return Cost(numel, 3 * numel * itemsize)


def linear(*, m: int, c: int, k: int, itemsize: int) -> Cost:
    """(m, c) by (k, c), plus a bias."""
    return Cost(2 * m * c * k, (m * c + k * c + m * k) * itemsize)
