"""A process that runs one alternative of a race: it does what its conductor (`race.py`) asks for, in turn.

A process of its own gives an alternative its own compiler settings, an empty cache to start from, and a peak of memory
that is nobody else's. Between requests it waits without taking time from the others.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from ..ops import dispatch
from ..support import vision
from ..support.names import use_device
from .alternatives import Alternative, Model
from .check import relative_error, right_code
from .environment import environment
from .results import one_line

REPEATS = 10  # calls in a row between two events of the GPU
WARM_CALLS = {"cpu": 3, "cuda": 36}  # compilers record at the second or third call, our graphs also at the 34th


@dataclass(frozen=True)
class Spec:
    """What a worker needs to know. `tiny` stands for a network cut to its first stages, for rehearsals and tests."""

    model: str = "resnet18"
    dtype: str = "float32"
    device: str = "cpu"
    image: int = 224
    tiny: bool = False


def network(spec: Spec) -> nn.Module:
    """torchvision's model with random weights, and statistics that have to be read to be right."""
    torch.manual_seed(0)
    models: Any = vision.torchvision().models
    if spec.tiny:
        model = models.resnet.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 16)
    else:
        model = getattr(models, spec.model)()
    norm: Any
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 1.0, 3.0)
    model = model.eval().to(spec.device, getattr(torch, spec.dtype))
    return model.to(memory_format=torch.channels_last)


def serve(connection: Connection, spec: Spec, alternative: Alternative) -> None:
    """Answer requests (a method's name and its arguments) until the other end closes."""
    contest: Contest | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            contest = contest or Contest(spec, alternative)
            answer: Any = getattr(contest, name)(**arguments)
        except Exception as error:  # whatever an alternative does wrong, the others go on
            answer = RuntimeError(one_line(error))
        connection.send(answer)


class Contest:
    """One alternative's part. Methods are the requests; what they return crosses to another process."""

    def __init__(self, spec: Spec, alternative: Alternative) -> None:
        self.device, self.alternative = use_device(spec.device), alternative
        torch.backends.cudnn.benchmark = True
        self.base = network(spec)
        self.call: Model = self.base
        self.images = self.expected = torch.empty(0)

    def hello(self) -> dict[str, Any]:
        """Where and with what this process runs."""
        return environment(self.device)

    @torch.inference_mode()
    def prepare(self, file: str) -> dict[str, Any]:
        """Build the alternative for the images in a file and call it until it is warm."""
        data = torch.load(file, weights_only=True, map_location=self.device)
        self.expected, self.call = data["expected"], self.base
        self.images = self.alternative.images(data["images"])
        self._synchronize()
        if cuda := self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        start, before = time.perf_counter(), Counter(dispatch.calls)
        self.call = self.alternative.build(self.base, self.images)
        self.call(self.images)
        self._synchronize()
        first = time.perf_counter() - start
        right_code(self.alternative.ours, self.device, before)
        for _ in range(WARM_CALLS[self.device.type]):
            self.call(self.images)
        self._synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - held if cuda else None
        return {"first_s": first, "peak_bytes": peak, "error": self._error()}

    def _error(self) -> float:
        return relative_error(self.call(self.images), self.expected)

    @torch.inference_mode()
    def turn(self, seconds: float) -> tuple[dict[tuple[str, str], list[float]], float]:
        """About so many seconds of samples, by clock and state of the L2 cache; then the answer's error."""
        self.call(self.images)  # another process had the caches
        self._synchronize()
        measure = self._gpu_samples if self.device.type == "cuda" else self._cpu_samples
        found: dict[tuple[str, str], list[float]] = {}
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            for key, sample in measure().items():
                found.setdefault(key, []).append(sample)
        return found, self._error()

    def _cpu_samples(self) -> dict[tuple[str, str], float]:
        start = time.perf_counter()
        self.call(self.images)
        return {("wall", "uncontrolled"): time.perf_counter() - start}

    def _gpu_samples(self) -> dict[tuple[str, str], float]:
        """One call from an idle GPU until its answer is there; a share of ten in a row; one behind a flush of L2."""
        start = time.perf_counter()
        self.call(self.images)
        self._synchronize()
        wall = time.perf_counter() - start
        warm = self._events(REPEATS, flush=False)
        return {("wall", "warm"): wall, ("gpu", "warm"): warm, ("gpu", "cold"): self._events(1, flush=True)}

    def _events(self, times: int, *, flush: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        begin.record()
        for _ in range(times):
            self.call(self.images)
        end.record()
        self._synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
