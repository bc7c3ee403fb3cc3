"""Wall-clock timing of alternatives against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    alternatives: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
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


def median(samples: list[float]) -> float:
    """The median of some samples."""
    return statistics.median(samples)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
