"""ResNet-18 as a whole: ours and PyTorch's, in turns on the same random images, checked before and after.

Images lie in channels_last memory, which spares PyTorch a conversion. A CUDA graph's time includes the copy of the
images into its buffer. Three times of each: `wall`, one call from an idle GPU until its answer is there; `gpu`, by
events round ten calls in a row, a call's share, L2 as the call before left it; `cold`, by events round one call that
waits behind a write of twice the L2 cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import vision

from .gpu_steps import Setting, Steps, one_line

Model = Callable[[Tensor], Tensor]


def network(setting: Setting) -> nn.Module:
    """torchvision's ResNet-18 with random weights and statistics; in a rehearsal only its first two stages, halved."""
    torch.manual_seed(0)
    models = vision.torchvision().models
    if setting.rehearse:
        model = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 16)
    else:
        model = models.resnet18()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 1.0, 3.0)
    return model.eval()


def steps(setting: Setting) -> Steps:
    """A step for each batch size."""
    dtype = setting.options["dtype"]
    for batch in setting.batches:
        yield f"{dtype} {batch}", partial(_measure, setting, batch, getattr(torch, dtype))


def _measure(setting: Setting, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    base = network(setting).to(setting.device, dtype).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, setting.image, setting.image, device=setting.device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    clock = Clock(setting)
    with torch.inference_mode():
        exact = copy.deepcopy(base).double()
        torch.backends.cudnn.benchmark = False  # no search for the fastest fp64 algorithm
        expected = torch.cat([exact(some.double()) for some in images.split(32)])
        torch.backends.cudnn.benchmark = True
        limit = 2 * max(distance(base(images), expected), torch.finfo(dtype).eps)
        calls, rows = {}, {}
        for name in setting.options["alternatives"]:
            try:
                calls[name], rows[name] = _first(name, base, images, setting)
            except Exception as error:  # one alternative that fails leaves the others to compare
                rows[name] = {"error": one_line(error)}
        measured = compare(calls, images, expected, limit, clock, rounds=1 if setting.rehearse else 25)
    return {
        "batch": batch,
        "limit": limit,
        "alternatives": {n: {**row, **measured.get(n, {})} for n, row in rows.items()},
    }


def _first(name: str, base: nn.Module, images: Tensor, setting: Setting) -> tuple[Model, dict[str, Any]]:
    """An alternative, and what its first call cost: seconds from nothing, and memory beside parameters and images."""
    setting.synchronize()
    before = 0 if setting.rehearse else torch.cuda.memory_allocated()
    if not setting.rehearse:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call = build(name, base, images, rehearse=setting.rehearse)
    call(images)
    setting.synchronize()
    row = {"first_s": time.perf_counter() - start}
    if not setting.rehearse:
        for _ in range(3):  # compilers and runners capture at the second or third call
            call(images)
        setting.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return call, row


def build(name: str, base: nn.Module, images: Tensor, *, rehearse: bool) -> Model:
    """An alternative by name: "[eager|folded|ours][ graph]" or "compile MODE[ freezing]"."""
    kind, _, how = name.partition(" ")
    if kind == "compile":
        torch.compiler.reset()  # each batch size compiles anew, and none meets the limit on recompilations
        torch._inductor.config.freezing = how.endswith(" freezing")
        mode = how.removesuffix(" freezing")
        return torch.compile(base, **({"backend": "eager"} if rehearse else {"mode": mode}), dynamic=False)
    graph = how == "graph" and not rehearse
    if kind == "ours":
        return resnet_triton.optimize(base, kernels="triton", cuda_graph=graph)
    if kind == "folded":
        from torch.fx.experimental.optimization import fuse

        base = fuse(base).to(memory_format=torch.channels_last)
    return captured(base, images) if graph else base


def captured(model: Model, images: Tensor) -> Model:
    """The model as one CUDA graph with an input buffer of its own."""
    static = images.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = model(static)

    def call(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return answer

    return call


class Clock:
    """Seconds of calls by the wall clock and by the GPU's; in a rehearsal both are the wall clock."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        size = 4096 if setting.rehearse else 2 * setting.l2_bytes
        self.flood = torch.empty(size, dtype=torch.uint8, device=setting.device)

    def __call__(self, call: Callable[[], object], times: int = 1, *, cold: bool = False) -> tuple[float, float]:
        self.setting.synchronize()
        if cold:
            self.flood.fill_(1)
        start = time.perf_counter()
        if self.setting.rehearse:
            for _ in range(times):
                call()
            wall = gpu = time.perf_counter() - start
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(times):
                call()
            end.record()
            self.setting.synchronize()
            wall, gpu = time.perf_counter() - start, begin.elapsed_time(end) / 1e3
        return wall / times, gpu / times


def distance(y: Tensor, expected: Tensor) -> float:
    """Relative error; NaN and infinities stay."""
    return (torch.linalg.vector_norm(y.double() - expected) / torch.linalg.vector_norm(expected)).item()


def compare(
    calls: dict[str, Model], images: Tensor, expected: Tensor, limit: float, clock: Clock, rounds: int
) -> dict[str, dict[str, Any]]:
    """Times of each call, taken in turns, and its error before and after; `red` if either is over the limit."""
    repeats = 1 if clock.setting.rehearse else 10
    before = {name: distance(call(images), expected) for name, call in calls.items()}
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            work = partial(call, images)
            samples[name].append((clock(work)[0], clock(work, repeats)[1], clock(work, cold=True)[1]))
    rows = {}
    for name, call in calls.items():
        after = distance(call(images), expected)
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        spreads = torch.tensor(samples[name], dtype=torch.float64).quantile(quantiles, 0) * 1e6
        wall, gpu, cold = spreads.T.tolist()
        good = before[name] <= limit and after <= limit  # NaN is not
        rows[name] = {"red": not good, "error_before": before[name], "error_after": after,
                      "wall_us": wall, "gpu_us": gpu, "cold_us": cold, "of": "p50, p20, p80"}  # fmt: skip
    return rows
