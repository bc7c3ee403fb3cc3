"""Timing: alternatives against each other by the wall clock, and single launches on a GPU with its L2 cache cold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

Work = Callable[[], object]
Meter = Callable[[Work, int], list[float]]
"""`meter(work, replays)`: seconds that each of `replays` repetitions of `work` took."""

_LAUNCHES = 10  # at least so many between two events, whose resolution is half a microsecond
_SAMPLE = 100e-6  # seconds: reading the clock and waiting for an idle GPU cost a hundredth of it
_ROUNDS = (5, 1000)  # what `interleaved_for` makes of too little and too much time


class Spread(NamedTuple):
    """Median, 20th and 80th percentile, in seconds."""

    p50: float
    p20: float
    p80: float


def interleaved(alternatives: Mapping[str, Work], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` per alternative, taken in turns so that all meet the same state of the machine.

    Waits for the GPU, where there is one, around each call. The warm-up calls are not kept.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}, expected at least 1")
    samples: dict[str, list[float]] = {name: [] for name in alternatives}
    for i in range(warmup + rounds):
        for name, call in alternatives.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if i >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


def interleaved_for(seconds: float, alternatives: Mapping[str, Work]) -> dict[str, list[float]]:
    """`interleaved`, with as many rounds as take about `seconds`, at least five.

    Alternatives that are faster than 100 us are called several times for a sample, which is the mean.
    """
    once = {name: min(taken) for name, taken in interleaved(alternatives, rounds=3).items()}
    times = {name: max(math.ceil(_SAMPLE / max(fastest, 1e-9)), 1) for name, fastest in once.items()}
    least, most = _ROUNDS
    rounds = int(seconds / max(sum(once[name] * times[name] for name in alternatives), 1e-9))
    batches = {name: partial(_repeat, call, times[name]) for name, call in alternatives.items()}
    samples = interleaved(batches, rounds=min(max(rounds, least), most), warmup=0)
    return {name: [sample / times[name] for sample in taken] for name, taken in samples.items()}


def _repeat(call: Work, times: int) -> None:
    for _ in range(times):
        call()


def spread(samples: Sequence[float]) -> Spread:
    """Percentiles of some samples, interpolated linearly, as NumPy's are."""
    if len(samples) == 1:
        return Spread(*samples, *samples, *samples)
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), p20, p80)


def graph_seconds(calls: Sequence[Work], *, replays: int, meter: Meter | None = None) -> Spread:
    """The spread of `graph_samples`."""
    return spread(graph_samples(calls, replays=replays, meter=meter))


def graph_samples(calls: Sequence[Work], *, replays: int, meter: Meter | None = None) -> list[float]:
    """Seconds of one launch, in each replay. Each of `calls` makes the same launch on buffers of its own, in turns.

    If all buffers together exceed the L2 cache twice, every launch finds its inputs in DRAM. The launches of a turn are
    recorded as one CUDA graph, so that the host takes no part; `meter` stands in for graph and clock in tests.
    """
    if not calls or replays < 2:
        raise ValueError(f"{len(calls)} calls, replays={replays}; expected at least one call and two replays")
    launches = -(-_LAUNCHES // len(calls)) * len(calls)  # whole rounds: the next turn begins where this one did

    def turn() -> None:
        for i in range(launches):
            calls[i % len(calls)]()

    return [seconds / launches for seconds in (meter or replay)(turn, replays)]


def replay(work: Work, replays: int) -> list[float]:
    """The `Meter` of the current CUDA device: capture `work` once, replay it between events, wait at the end."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()  # loads the kernels, which a capture may not
        stream.synchronize()
        graph.capture_begin()  # torch.cuda.graph() would collect garbage each time
        try:
            work()
        finally:
            graph.capture_end()
        graph.replay()  # the first one uploads the graph
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(replays)]
        for start, end in events:
            start.record(stream)
            graph.replay()
            end.record(stream)
    stream.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
