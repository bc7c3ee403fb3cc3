"""Data to make calls on, and what is right: random sets that no L2 cache holds, and answers in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..ops import Operation
from ..ops.dispatch import Kernels
from ..ops.operation import IMAGES
from .baselines import EAGER

CHUNK = 16  # images at a time in fp64: a batch of stem outputs would not fit a smaller GPU


def drawn(call: Operation, draw: Callable[[str, Tensor], Tensor]) -> Operation:
    """The call on values that `draw(argument, like)` makes, images and filters in channels_last."""

    def tensor(name: str, like: Tensor) -> Tensor:
        memory = torch.channels_last if like.dim() == 4 else torch.contiguous_format
        return draw(name, like).to(like.dtype, memory_format=memory)

    made: Operation = call.schema.with_tensors(call, tensor)
    return made


def filled(call: Operation, device: torch.device, *, seed: int, kernels: Kernels) -> Operation:
    """The call on normally distributed data, scaled as in a trained network."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(name: str, like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, device=device)
        if name.endswith("var"):
            return values.abs() + 0.5
        return values / prod(like.shape[1:]) ** 0.5 if name.endswith("weight") and like.dim() > 1 else values

    made = drawn(call, normal)
    made.modes = made.modes._replace(kernels=kernels)
    return made


def sets(call: Operation, device: torch.device, l2_bytes: int, kernels: Kernels) -> list[Operation]:
    """The call on data of its own each, all of which, with their results, exceed an L2 cache twice."""
    first = filled(call, device, seed=0, kernels=kernels)
    tensors = [*first.schema.tensors(first), first.output()]
    count = 1 + 2 * l2_bytes // sum(t.numel() * t.element_size() for t in tensors)
    return [first, *(filled(call, device, seed=seed, kernels=kernels) for seed in range(1, count))]


def answers(call: Operation) -> Iterator[Tensor]:
    """The answer of PyTorch in fp64, some images after others."""

    def part(start: int, name: str, t: Tensor) -> Tensor:
        return (t[start : start + CHUNK] if name in IMAGES else t).double()

    for start in range(0, len(call.x), CHUNK):
        yield EAGER[call.name](call.schema.with_tensors(call, partial(part, start)))
