"""One convolution on made-up data, to be run under any configuration: compiled, timed and checked.

For timing the data are random, as zeros would flatter. For checking they are small integers, with batch norms that
scale by powers of two: nothing is rounded before the output, so every order of summation gives the same bits and a
configuration is right if it equals the fp64 reference, and wrong otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ConvConfig, ConvShape
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from ..ops import BatchNorm, ConvBnRelu, Geometry, Shortcut, gluon, operation
from ..ops.dispatch import Modes
from ..ops.in_graph import dependent_launches
from ..ops.precision import fp32_precision
from ..support.timing import Meter, Spread, graph_seconds

UNSAFE = "may give wrong answers: "
"""How a fault begins that is worse than slow: such a configuration is not even timed."""
_CHUNK = 16  # images at a time in fp64: a batch of stem outputs would not fit a smaller GPU

Fill = Callable[[Sequence[int]], Tensor]
Norm = Callable[[int], BatchNorm]
Work = Callable[[], None]


def abstract_call(shape: ConvShape) -> ConvBnRelu:
    """A call of this shape without memory, on the meta device."""

    def nothing(size: Sequence[int]) -> Tensor:
        return torch.empty(*size, device="meta")

    return _call(
        shape, nothing, nothing, lambda k: BatchNorm(nothing([k]), nothing([k]), nothing([k]), nothing([k]), 0.0)
    )


def random_call(shape: ConvShape, device: torch.device, seed: int) -> ConvBnRelu:
    """Normally distributed data, scaled as in a trained network."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(size: Sequence[int]) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    def filters(size: Sequence[int]) -> Tensor:
        return normal(size) / (shape.c * shape.r * shape.s) ** 0.5

    def norm(k: int) -> BatchNorm:
        return BatchNorm(normal([k]), normal([k]).abs() + 0.5, normal([k]), normal([k]), 0.0)

    return _call(shape, normal, filters, norm)


def exact_call(shape: ConvShape, device: torch.device, seed: int) -> ConvBnRelu:
    """Data on which the answer is exact in fp32 whatever the tiling."""
    g = torch.Generator(device).manual_seed(seed)

    def integers(limit: int, size: Sequence[int]) -> Tensor:
        return torch.randint(-limit, limit + 1, size, generator=g, device=device).float()

    def one_of(values: list[float], k: int) -> Tensor:
        return torch.tensor(values, device=device)[torch.randint(len(values), (k,), generator=g, device=device)]

    def norm(k: int) -> BatchNorm:
        variances, scales = one_of([0.25, 1, 4, 16], k), one_of([0.5, -0.5, 1, 2], k)
        return BatchNorm(integers(3, [k]), variances, scales, integers(4, [k]), 0.0)

    return _call(shape, lambda size: integers(3, size), lambda size: integers(2, size), norm)


def exact_answer(call: ConvBnRelu) -> Tensor:
    """The call's answer on exact data: computed in fp64, rounded once."""
    batch = call.x.shape[0]
    parts = [_answer(_images(call, slice(i, i + _CHUNK))).to(call.x.dtype) for i in range(0, batch, _CHUNK)]
    return torch.cat(parts)


class Trial:
    """A convolution on enough sets of buffers to exceed twice an L2 cache of `l2_bytes`."""

    def __init__(self, shape: ConvShape, device: torch.device, l2_bytes: int) -> None:
        self.shape, self.device, self.facts = shape, device, gluon.facts(device)
        first = random_call(shape, device, 0)
        tensors = [*first.schema.tensors(first), first.output()]
        sets = 1 + 2 * l2_bytes // sum(t.numel() * t.element_size() for t in tensors)
        self.calls = [first, *(random_call(shape, device, seed) for seed in range(1, sets))]
        self.outputs = [call.output() for call in self.calls]
        self._expected: tuple[ConvBnRelu, Tensor] | None = None

    def time(self, chosen: ConvConfig, *, replays: int, meter: Meter) -> Spread:
        """Seconds of one launch with the L2 cache cold."""
        sets = zip(self.calls, self.outputs, strict=True)
        planned = [launches_of(call, out, chosen, self.shape.precision, self.facts) for call, out in sets]
        with operation.on(self.device):
            return graph_seconds([partial(_run, launches) for launches in planned], replays=replays, meter=meter)

    def is_exact(self, chosen: ConvConfig) -> bool:
        """Whether the kernel gives exactly the reference's answer; its output is full of NaN before."""
        call, expected = self._exact()
        out = call.output().fill_(float("nan"))
        launches = launches_of(call, out, chosen, self.shape.precision, self.facts)
        with operation.on(self.device):
            _run(launches)
        return torch.equal(out, expected)

    def wrong_runs(self, chosen: ConvConfig, runs: int = 100) -> dict[str, int]:
        """How many of so many runs differ from the reference's answer, in each manner of running: see `MANNERS`.

        Whether a race shows is a matter of cycles, so one right run proves nothing. Each is compared on the device, and
        they are waited for once: a run between two waits would have the GPU to itself.
        """
        call, expected = self._exact()
        out = call.output()
        launches = launches_of(call, out, chosen, self.shape.precision, self.facts)
        names = [*MANNERS] if self.device.type == "cuda" else ["alone"]  # interpreted launches are all alike
        counts = torch.zeros(len(names), dtype=torch.int64, device=self.device)

        def run(wrong: Tensor) -> None:
            out.fill_(float("nan"))
            _run(launches)
            wrong.add_((out != expected).any())

        with operation.on(self.device):
            for i, name in enumerate(names):
                MANNERS[name](partial(run, counts[i]), runs, counts.device)
        return dict(zip(names, counts.tolist(), strict=True))

    def _exact(self) -> tuple[ConvBnRelu, Tensor]:
        if self._expected is None:
            call = exact_call(self.shape, self.device, 0)
            self._expected = call, exact_answer(call)
        return self._expected


def _alone(run: Work, runs: int, device: torch.device) -> None:
    for _ in range(runs):
        run()


def _beside_another_stream(run: Work, runs: int, device: torch.device) -> None:
    """Copies and products keep memory and SMs busy meanwhile: 0.2 ms of them at least from the start of every run."""
    main, other = torch.cuda.current_stream(device), _other_stream(device)
    source, target = torch.empty(2, 64 << 20, dtype=torch.uint8, device=device)
    a, b, product = torch.randn(3, 2048, 2048, device=device).half()
    for _ in range(runs):
        other.wait_stream(main)  # the host is far ahead: all of it would be over before most runs begin
        with torch.cuda.stream(other):
            for _ in range(4):
                target.copy_(source)
                torch.matmul(a, b, out=product)
        run()
    main.wait_stream(other)


def _in_a_graph(run: Work, runs: int, device: torch.device) -> None:
    """Replayed, with kernels before and after it. The launches have run before: a capture may load no kernels."""
    image = torch.randn(1 << 20, device=device)

    def other_layer() -> None:
        image.add_(1).relu_()

    other_layer()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin()
        try:
            other_layer()
            run()
            other_layer()
        finally:
            graph.capture_end()
    for _ in range(runs):
        graph.replay()
    torch.cuda.current_stream(device).synchronize()  # a graph has to outlive its replays


MANNERS = {"alone": _alone, "beside another stream": _beside_another_stream, "in a graph": _in_a_graph}
"""Ways to repeat a run, in this order. Only the last one waits for the device, for all of them."""


@functools.cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all trials: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


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


def _run(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch.run()


def _call(shape: ConvShape, images: Fill, filters: Fill, norm: Norm) -> ConvBnRelu:
    def cast(t: Tensor) -> Tensor:
        return t.to(getattr(torch, shape.dtype)).contiguous(memory_format=torch.channels_last)

    output = [shape.n, shape.k, shape.p, shape.q]
    x = cast(images([shape.n, shape.c, shape.h, shape.w]))
    weight = cast(filters([shape.k, shape.c, shape.r, shape.s]))
    shortcut = None
    if shape.shortcut_c:
        size = [shape.n, shape.shortcut_c, shape.shortcut_h, shape.shortcut_w]
        pointwise = cast(filters([shape.k, shape.shortcut_c, 1, 1]))
        shortcut = Shortcut(cast(images(size)), pointwise, norm(shape.k), shape.shortcut_stride)
    return ConvBnRelu(
        x, weight, norm(shape.k), Geometry(shape.stride, shape.padding, shape.dilation),
        cast(images(output)) if shape.residual else None, shortcut, modes=Modes(kernels="triton"),
    )  # fmt: skip


def _images(call: ConvBnRelu, some: slice) -> ConvBnRelu:
    shortcut = None if call.shortcut is None else call.shortcut._replace(x=call.shortcut.x[some])
    residual = None if call.residual is None else call.residual[some]
    return replace(call, x=call.x[some], residual=residual, shortcut=shortcut)


def _answer(call: ConvBnRelu) -> Tensor:
    y = _normed(F.conv2d(call.x.double(), call.weight.double(), None, *call.geometry), call.batch_norm)
    if call.residual is not None:
        y += call.residual.double()
    if call.shortcut is not None:
        x, weight, batch_norm, stride = call.shortcut
        y += _normed(F.conv2d(x.double(), weight.double(), None, stride), batch_norm)
    return y.relu_()


def _normed(y: Tensor, batch_norm: Any) -> Tensor:
    # Integers stay integers in a convolution; rounding undoes what an algorithm that transforms its input would leave.
    mean, var, bn_weight, bn_bias, _ = batch_norm
    mean, scale, bn_bias = (v.double()[:, None, None] for v in (mean, bn_weight / var.sqrt(), bn_bias))
    return (y.round_() - mean) * scale + bn_bias
