"""ResNet-18's convolutions in the tiles that are chosen for them, on images small enough for an interpreter."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_triton import config, ops, resnet18
from resnet_triton.config import ConvConfig, ConvShape
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import cdiv
from resnet_triton.kernels.values import is_flat
from resnet_triton.ops.trace import trace


class Layer(NamedTuple):
    """One of ResNet-18's convolutions and a configuration that the lookup chooses for it on a GPU."""

    name: str
    shape: ConvShape
    chosen: ConvConfig
    arch: int

    def __str__(self) -> str:
        box = "x".join(map(str, self.chosen.box)) if self.chosen.box else "pointer"
        box += f"-split{self.chosen.split_k}" * (self.chosen.split_k > 1)
        tile = f"{self.chosen.block_m}x{self.chosen.block_k}x{self.chosen.block_c}"
        precision = f"-{self.shape.precision}" if self.shape.dtype == "float32" else ""
        return f"{self.shape.dtype}{precision}-{self.name}-n{self.shape.n}-{tile}-{box}"


@functools.cache
def resnet18_convolutions() -> list[tuple[str, ConvShape]]:
    traced = trace(resnet18().eval(), (1, 3, 224, 224))
    stem = traced[0].ours
    assert isinstance(stem, ops.Stem)
    return [("conv1", stem.convolution(stem.x).shape)] + [  # as GPUs without descriptors run it
        (c.name, c.shape) for c in traced if c.operator == "conv_bn_relu"
    ]


def layers(archs: Iterable[int], batches: Iterable[int], *, every_dtype: bool = False) -> list[Layer]:
    """Every distinct (layer, configuration) of some GPUs at some batch sizes, without those in Gluon.

    fp32 has batches of 1, 8, 32 and 128 alone. Float16 and bfloat16 are tiled alike, so unless `every_dtype`, they take
    turns, and fp32 only adds tiles that they do not have.
    """
    halves = [("float16", "ieee"), ("bfloat16", "ieee")]
    found: dict[Any, Layer] = {}
    for arch in archs:
        for batch in batches:
            for i, (name, shape) in enumerate(resnet18_convolutions()):
                turn = (i + batch.bit_length()) % 2
                numbers = halves if every_dtype else [halves[turn]]
                singles = [("float32", "tf32"), ("float32", "ieee")] if batch in (1, 8, 32, 128) else []
                for dtype, precision in (*numbers, *singles):
                    shape = replace(shape, n=batch, dtype=dtype, precision=precision)
                    chosen = config.lookup(shape, replace(KNOWN[arch], gluon=False))
                    kind = replace(shape, n=min(batch, 2))  # one image has views of its own
                    kind = kind if every_dtype else replace(kind, dtype="", precision="")
                    found.setdefault((kind, chosen), Layer(name, shape, chosen, arch))
    return list(found.values())


def small(shape: ConvShape, chosen: ConvConfig) -> ConvShape:
    """The layer on smaller images, and fewer: just over whole tiles, so that the last is ragged."""
    if chosen.box is None:
        n, p, q = cdiv(chosen.block_m + 1, 35), 5, 7
    else:
        p, q, n = chosen.box[0] + 1, 2 * chosen.box[1] + 1, chosen.box[2] + 1  # fewer rows of tiles
        n = 1 if shape.n == 1 else n
        if n * p * q * shape.c * shape.k > 3e7:
            n = min(n, 3)  # one ragged tile of images: the reference takes its time, too
    return replace(shape, n=n, h=p * shape.stride[0], w=q * shape.stride[1])


def steps(shape: ConvShape, chosen: ConvConfig) -> int:
    """Products of tiles in one program: what a program costs in the interpreter."""
    if chosen.box is None and is_flat(shape.c):
        main = cdiv(shape.c * shape.r * shape.s, chosen.block_c)
    else:
        main = shape.r * shape.s * cdiv(shape.c, chosen.block_c)
    return main + cdiv(shape.shortcut_c, chosen.block_c)


def tiles_written(written: Tensor, chosen: ConvConfig) -> int:
    """How many tiles of the output were written; each has to be written completely or not at all."""
    n, k, p, q = (torch.arange(size) for size in written.shape)
    if chosen.box is None:
        pixels = torch.arange(len(n) * len(p) * len(q)).reshape(len(n), 1, len(p), len(q)) // chosen.block_m
    else:
        rows, columns, images = chosen.box
        pixels = ((n // images)[:, None, None, None] * 1000 + (p // rows)[:, None]) * 1000 + q // columns
    tiles = pixels * 1000 + (k // chosen.block_k)[:, None, None]
    touched = set(tiles[written].tolist())
    assert not touched & set(tiles[~written].tolist())
    return len(touched)
