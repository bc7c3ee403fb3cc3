"""A configuration that is right once may be wrong at times: a convolution run again and again, in several manners."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resnet_triton.config import ConvConfig
from resnet_triton.ops import operation
from resnet_triton.tuner import trial
from resnet_triton.tuner.trial import Trial

Work = Callable[[], None]


def wrong_runs(subject: Trial, chosen: ConvConfig, runs: int = 100) -> dict[str, int]:
    """How many of so many runs differ from the reference's answer, in each manner of running: see `MANNERS`.

    Whether a race shows is a matter of cycles, so one right run proves nothing. Each is compared on the device, and
    they are waited for once: a run between two waits would have the GPU to itself.
    """
    call, expected = subject.exact
    out = call.output()
    launches = subject.launches(chosen, call, out)
    names = [*MANNERS] if subject.device.type == "cuda" else ["alone"]  # interpreted launches are all alike
    counts = torch.zeros(len(names), dtype=torch.int64, device=subject.device)

    def run(wrong: Tensor) -> None:
        out.fill_(float("nan"))
        trial.run(launches)
        wrong.add_((out != expected).any())

    with operation.on(subject.device):
        for i, name in enumerate(names):
            MANNERS[name](partial(run, counts[i]), runs, counts.device)
    return dict(zip(names, counts.tolist(), strict=True))


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
