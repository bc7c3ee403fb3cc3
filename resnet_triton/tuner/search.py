"""The search for the fastest configuration of one convolution.

The heuristic's choice and the cost model's best tiles are compiled in other processes and timed with a cold L2 cache;
then the neighbours of the fastest, until none is faster. The winner is checked for exactness and timed once more, in
turn with the heuristic's choice.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..config import ConvConfig, ConvShape, conv_heuristic, table
from ..config.candidates import candidates, neighbours
from ..config.device import DeviceFacts
from ..support.timing import Meter, Spread, replay
from .trial import SLOW, Trial

COUNT = 16  # tiles by the cost model, beside the heuristic's choice
ROUNDS = 3  # of neighbours
REPLAYS, FINAL_REPLAYS = 9, 30


class Compiler(Protocol):
    """Compiles ahead: `submit` starts, and its future gives the faults of a configuration, none if it is sound."""

    def submit(self, shape: ConvShape, chosen: ConvConfig) -> concurrent.futures.Future[list[str]]:
        """The same future for the same pair."""


@dataclass(frozen=True)
class Bench:
    """Where configurations are tried: tests replace the parts that need a GPU, and the clock."""

    where: torch.device
    facts: DeviceFacts
    driver: str
    l2_bytes: int
    compilers: Callable[[], AbstractContextManager[Compiler]]
    meter: Meter = replay
    clock: Callable[[], float] = time.monotonic


class Found(NamedTuple):
    """The outcome for one shape. `timing` is of `config`, None if no configuration was exact."""

    config: ConvConfig | None
    timing: table.Timing | None
    wrong: list[ConvConfig]


class OutOfTime(Exception):
    """The budget is spent."""


class Search:
    """The search for one shape's configuration."""

    def __init__(self, shape: ConvShape, bench: Bench, compiler: Compiler, deadline: float) -> None:
        self.shape, self.bench, self.compiler, self.deadline = shape, bench, compiler, deadline
        self.start = conv_heuristic(shape, bench.facts)
        self.trial = Trial(shape, bench.where, bench.l2_bytes)
        self.seconds: dict[ConvConfig, float] = {}  # of each that was timed
        self.seen: set[ConvConfig] = set()

    def run(self, following: ConvShape | None) -> Found:
        """Search, check and time. The compilers get work on the `following` shape while this one is timed."""
        facts = self.bench.facts
        first = candidates(self.shape, facts, COUNT)
        self._submit(self.shape, first)
        if following is not None:
            self._submit(following, candidates(following, facts, COUNT))
        self._time(first)
        if not self.seconds:
            return Found(None, None, [])
        for _ in range(ROUNDS):
            fastest = min(self.seconds, key=self.seconds.__getitem__)
            self._time([c for c in neighbours(fastest, self.shape, facts) if c not in self.seen])
            if min(self.seconds.values()) == self.seconds[fastest]:
                break
        return self._settle()

    def _submit(self, shape: ConvShape, configs: Sequence[ConvConfig]) -> None:
        for config in configs:
            self.compiler.submit(shape, config)

    def _time(self, configs: Sequence[ConvConfig]) -> None:
        """Time what compiles well; the heuristic's choice, as the one to beat, if it is no worse than slow."""
        self._submit(self.shape, configs)
        self.seen.update(configs)
        for config in configs:
            faults = self._faults(config)
            if not faults or (config == self.start and all(fault.startswith(SLOW) for fault in faults)):
                self.seconds[config] = self._measure(config, REPLAYS).p50

    def _faults(self, config: ConvConfig) -> list[str]:
        for _ in range(2):  # a compiler that crashes takes along what the others were at
            left = self.deadline - self.bench.clock()
            if left <= 0:
                raise OutOfTime
            try:
                return self.compiler.submit(self.shape, config).result(left)
            except concurrent.futures.TimeoutError:
                raise OutOfTime from None
            except BrokenProcessPool:
                pass
        return ["its compiler's process was ended twice"]

    def _settle(self) -> Found:
        """The fastest exact configuration, if it beats the heuristic's choice once more."""
        ranked = sorted(self.seconds, key=self.seconds.__getitem__)
        wrong = []
        for config in ranked:
            if self.trial.is_exact(config):
                break
            wrong.append(config)
        else:
            return Found(None, None, wrong)
        if self.start not in self.seconds:  # nothing to beat
            spread = self._measure(config, FINAL_REPLAYS)
            return Found(config, _timing(spread, spread, len(self.seconds)), wrong)
        base, spread = self._measure(self.start, FINAL_REPLAYS), self._measure(config, FINAL_REPLAYS)
        if base.p50 <= spread.p50 and self.start not in wrong and self.trial.is_exact(self.start):
            config, spread = self.start, base
        return Found(config, _timing(spread, base, len(self.seconds)), wrong)

    def _measure(self, config: ConvConfig, replays: int) -> Spread:
        return self.trial.time(config, replays=replays, meter=self.bench.meter)


def today() -> str:
    """The date as tables give it, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _timing(spread: Spread, base: Spread, tried: int) -> table.Timing:
    import triton

    us, p20, p80, heuristic = (round(seconds * 1e6, 3) for seconds in (*spread, base.p50))
    return table.Timing(us, p20, p80, heuristic, tried, triton.__version__, today())
