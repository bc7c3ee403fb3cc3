"""One convolution on made-up data, to be run under any configuration: compiled, timed and checked.

For timing the data are random, as zeros would flatter. For checking they are small integers, with batch norms that
scale by powers of two: nothing is rounded before the output, so every order of summation gives the same bits and a
configuration is right if it equals the fp64 reference, and wrong otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..bench import data
from ..config import ConvConfig, ConvShape
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from ..ops import BatchNorm, ConvBnRelu, Geometry, Shortcut, gluon, operation
from ..ops.dispatch import Modes
from ..ops.in_graph import dependent_launches
from ..ops.precision import fp32_precision
from ..support.timing import Meter, Spread, graph_seconds

SLOW = "may be slow: "
"""How a fault begins that is no worse: the heuristic's choice is timed with it, as the one to beat."""


def abstract_call(shape: ConvShape) -> ConvBnRelu:
    """A call of this shape without memory, on the meta device."""

    def tensor(*size: int) -> Tensor:
        kind: Any = {"dtype": getattr(torch, shape.dtype), "memory_format": torch.channels_last, "device": "meta"}
        return torch.empty(size, **kind)

    def norm() -> BatchNorm:
        mean, var, weight, bias = (torch.empty(shape.k, device="meta") for _ in range(4))
        return BatchNorm(mean, var, weight, bias, 0.0)

    shortcut = None
    if shape.shortcut_c:
        x = tensor(shape.n, shape.shortcut_c, shape.shortcut_h, shape.shortcut_w)
        shortcut = Shortcut(x, tensor(shape.k, shape.shortcut_c, 1, 1), norm(), shape.shortcut_stride)
    return ConvBnRelu(
        tensor(shape.n, shape.c, shape.h, shape.w), tensor(shape.k, shape.c, shape.r, shape.s), norm(),
        Geometry(shape.stride, shape.padding, shape.dilation),
        tensor(shape.n, shape.k, shape.p, shape.q) if shape.residual else None, shortcut, modes=Modes(kernels="triton"),
    )  # fmt: skip


def exact_call(shape: ConvShape, device: torch.device, seed: int) -> ConvBnRelu:
    """Data on which the answer is exact in fp32 whatever the tiling."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(name: str, like: Tensor) -> Tensor:
        if like.dim() == 1 and name.endswith(("var", "weight")):
            powers = torch.tensor([0.25, 1, 4, 16] if name.endswith("var") else [0.5, -0.5, 1, 2], device=device)
            return powers[torch.randint(4, like.shape, generator=g, device=device)]
        limit = 4 if name.endswith("bias") else 2 if name.endswith("weight") else 3
        return torch.randint(-limit, limit + 1, like.shape, generator=g, device=device)

    return cast(ConvBnRelu, data.drawn(abstract_call(shape), draw))


def exact_answer(call: ConvBnRelu) -> Tensor:
    """The call's answer on exact data: computed in fp64, rounded once."""
    # All are multiples of an eighth: rounding to them undoes what an algorithm that transforms its input would leave.
    return torch.cat([answer.mul_(8).round_().div_(8).to(call.x.dtype) for answer in data.answers(call)])


class Trial:
    """A convolution on enough sets of buffers to exceed twice an L2 cache of `l2_bytes`."""

    def __init__(self, shape: ConvShape, device: torch.device, l2_bytes: int) -> None:
        self.shape, self.device, self.facts = shape, device, gluon.facts(device)
        self.calls = cast("list[ConvBnRelu]", data.sets(abstract_call(shape), device, l2_bytes, "triton"))
        self.outputs = [call.output() for call in self.calls]

    def time(self, chosen: ConvConfig, *, replays: int, meter: Meter) -> Spread:
        """Seconds of one launch with the L2 cache cold."""
        planned = [self.launches(chosen, *buffers) for buffers in zip(self.calls, self.outputs, strict=True)]
        with operation.on(self.device):
            return graph_seconds([partial(run, launches) for launches in planned], replays=replays, meter=meter)

    def is_exact(self, chosen: ConvConfig) -> bool:
        """Whether the kernel gives exactly the reference's answer; its output is full of NaN before."""
        call, expected = self.exact
        out = call.output().fill_(float("nan"))
        with operation.on(self.device):
            run(self.launches(chosen, call, out))
        return torch.equal(out, expected)

    def launches(self, chosen: ConvConfig, call: ConvBnRelu, out: Tensor) -> tuple[Launch, ...]:
        """The launches that write a call's result under a configuration."""
        return launches_of(call, out, chosen, self.shape.precision, self.facts)

    @functools.cached_property
    def exact(self) -> tuple[ConvBnRelu, Tensor]:
        """A call that has an exact answer, and this."""
        call = exact_call(self.shape, self.device, 0)
        return call, exact_answer(call)


def launches_of(
    call: ConvBnRelu, out: Tensor, chosen: ConvConfig, precision: str, facts: DeviceFacts
) -> tuple[Launch, ...]:
    """The launches of a call under a given configuration, as a graph of a model has them: dependent where they may be.

    `precision` is how fp32 is multiplied.
    """
    may = dependent_launches.set(True)  # a trial writes no parameters
    try:
        with fp32_precision(precision):
            return replace(call, tile=chosen).launches(out, facts)
    finally:
        dependent_launches.reset(may)


def run(launches: tuple[Launch, ...]) -> None:
    """Run them, one after another."""
    for launch in launches:
        launch.run()
