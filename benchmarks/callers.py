"""A captured ResNet-18: whether many replays are right, what a call costs beside its graph, several callers."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import resnet_triton
from resnet_triton.bench.runner import Found, Run, Steps
from resnet_triton.bench.worker import WARM_CALLS
from resnet_triton.ops import conv, linear


def steps(run: Run) -> Steps:
    """A rehearsal has no graphs: it calls the model in their place."""
    sizes = [1] if run.device.type == "cpu" else [1, 8, 256]
    for batch in sizes:
        yield f"replays, batch {batch}", partial(_replays, batch, run)
    for batch in sizes:
        yield f"a call, batch {batch}", partial(_beside_the_graph, batch, run)
    yield "callers", partial(_callers, run)


def _model(run: Run) -> Any:
    torch.manual_seed(0)
    model = resnet_triton.resnet18(num_classes=1000).eval()
    return model if run.device.type == "cpu" else resnet_triton.optimize(model.to(run.device).half(), cuda_graph=True)


def _images(batch: int, run: Run, seed: int = 0) -> Tensor:
    size, dtype = (32, torch.float32) if run.device.type == "cpu" else (224, torch.float16)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(run.device, dtype, memory_format=torch.channels_last)


def _wait(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def _replays(batch: int, run: Run) -> Iterator[Found]:
    """Replays back to back, each of other images than the one before: launches then overlap those of the last replay,
    and what one reads too early is of other images. All have the eager call's bits."""
    model, times = _model(run), 4 if run.device.type == "cpu" else 1000
    images = [_images(batch, run, seed) for seed in range(3)]
    with torch.inference_mode():
        expected = [model._forward_impl(x) for x in images]
        for _ in range(WARM_CALLS[run.device.type]):
            model(images[0])
        wrong = torch.zeros((), dtype=torch.int64, device=run.device)
        for i in range(times):
            wrong += (model(images[i % 3]) != expected[i % 3]).any()
    yield {"replays": times, "wrong": int(wrong)}
    if wrong:
        raise AssertionError(f"{int(wrong)} of {times} replays have other bits than eager calls")


def _beside_the_graph(batch: int, run: Run) -> Iterator[Found]:
    """Microseconds: the graph, also without dependent launches, with what is launched in front of it, and as a whole
    that reads the images; a call on images that come from elsewhere each time, on those that stay, one of these alone,
    and the host's part of one."""
    model, x = _model(run), _images(batch, run)
    models = [model]  # kept, for their graphs read their weights
    with torch.inference_mode():
        expected = model._forward_impl(x)
        for _ in range(WARM_CALLS[run.device.type]):
            y = model(x)
        ways: dict[str, Callable[[], object]] = {"a call": partial(model, x)}
        if model._triton_runner is not None:
            models += [_without_dependent_launches(run, x), _never_settled(run, x)]
            captured, other = map(_graph, models[:2])
            bare = captured.graph.replay
            ways = {
                "graph": bare, "graph, no launch dependent": other.graph.replay,
                "first launch and graph": lambda: (captured.fill(x), bare()),
                "graph that reads the images": _graph(model, x.data_ptr()).graph.replay,
                "a call, images elsewhere": partial(models[-1], x), **ways,
            }  # fmt: skip
        for _ in range(3):  # in turns; each starts on an idle GPU
            found = {name: _back_to_back(way, run) for name, way in ways.items()}
            alone, host = _one_by_one(ways["a call"], run)
            yield {"microseconds": {**found, "a call and synchronize": alone, "host": host}}
        same = all(torch.equal(model(x), y) for model in models)
        if not same or not torch.allclose(y, expected, atol=1e-2, rtol=1e-2):
            raise AssertionError("a call's answer is not the eager one")


def _graph(model: Any, place: int | None = None) -> Any:
    """Of images from anywhere, or of those at an address."""
    (graphs,) = model._triton_runner._graphs.values()
    return graphs.anywhere if place is None else graphs.there[place]


def _never_settled(run: Run, x: Tensor) -> Any:
    """The same model, for which all images come from elsewhere."""
    model = _model(run)
    for _ in range(3):
        model(x)
    for shape in model._triton_runner._shapes.values():
        shape.settled = 1 << 60
    return model


def _without_dependent_launches(run: Run, x: Tensor) -> Any:
    """The same model, captured so."""
    model = _model(run)
    none = partial(mock.patch.object, attribute="may_depend", return_value=False)
    with none(conv), none(linear):
        for _ in range(3):
            model(x)
    return model


def _back_to_back(way: Callable[[], object], run: Run) -> float:
    times = 2 if run.device.type == "cpu" else 300
    _wait(run)
    start = time.perf_counter()
    for _ in range(times):
        way()
    _wait(run)
    return (time.perf_counter() - start) / times * 1e6


def _one_by_one(way: Callable[[], object], run: Run) -> tuple[float, float]:
    """Medians of a call that is waited for: in all, and until it returned."""
    alone, host = [], []
    for _ in range(2 if run.device.type == "cpu" else 200):
        _wait(run)
        start = time.perf_counter()
        way()
        host.append(time.perf_counter() - start)
        _wait(run)
        alone.append(time.perf_counter() - start)
    return statistics.median(alone) * 1e6, statistics.median(host) * 1e6


def _callers(run: Run) -> Iterator[Found]:
    """Images a second at batch 8: from one thread, from two with a model each, from two on streams of one model."""
    x, models = _images(8, run), [_model(run) for _ in range(2)]
    with torch.inference_mode():
        for model in models:
            for _ in range(WARM_CALLS[run.device.type]):
                model(x)
    for name, callers in (("one", models[:1]), ("two models", models), ("one model, two streams", [models[0]] * 2)):
        yield {name: _images_a_second(callers, x, run)}


def _images_a_second(callers: list[Any], x: Tensor, run: Run) -> float:
    times = 2 if run.device.type == "cpu" else 500
    begins: list[float] = []
    ready = threading.Barrier(len(callers), action=lambda: begins.append(time.perf_counter()))

    def work(model: Any) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if run.device.type == "cuda" else contextlib.nullcontext()
        try:
            with torch.inference_mode(), stream:
                model(x)
                _wait(run)
                ready.wait()
                for _ in range(times):
                    model(x)
        except BaseException:
            ready.abort()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(len(callers)) as threads:
        done = [threads.submit(work, model) for model in callers]
    _wait(run)
    seconds = time.perf_counter() - begins[0] if begins else 0.0
    for error in (thread.exception() for thread in done):
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return len(callers) * times * len(x) / seconds
