"""Who knows what: vector clocks of warps and of what they set going, and every access held against them.

A clock has a component for each agent: a warp; its wgmma groups; its bulk stores (their reads of shared memory, and
themselves); its copies; the loads that complete on a barrier. An access is an epoch (component, value); it happened
before a warp's next step if the warp's clock has reached that value. A warp's clock has two rows: what it knows, and
what of that a proxy fence has made known to the async proxy. Barriers join rows alike. So one execution judges all
orders, as long as control does not depend on who comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array

CHECKS = (
    "arrival",  # shared memory is used before the load that fills it has arrived
    "release",  # it is overwritten while a product may still read it
    "store",  # it is overwritten, or the program ends, while a bulk store may still read it
    "race",  # warps use it without a barrier in between
    "uninitialised",  # it is read, and nobody wrote it
    "proxy",  # the async proxy uses what was written without fence.proxy.async
    "registers",  # of a running product: written, or its sums read
    "fence",  # registers of a product were written since the last wgmma.fence
    "count",  # an arrival that may count for one phase or for another
    "bytes",  # loads bring more than a barrier expects
    "phase",  # a wait for a phase that may have passed twice
    "deadlock",  # a wait that cannot end
    "dependent",  # global memory is used before griddepcontrol.wait
    "bounds",  # an access outside
    "global",  # programs or warps use global memory without an order
)

NEVER, GRID = 0, 1
"""Components that every launch has: of what is not written, and of griddepcontrol.wait."""
_WRITES = ("writes", "loads into", "copies into", "stores into")
KINDS = ("warp", "product", "bulk read", "bulk store", "copy")
"""Components that every warp has."""
_CHECK_OF = {"never": "uninitialised", "grid": "dependent", "warp": "race", "copy": "race", "product": "release",
             "bulk read": "store", "bulk store": "global", "load": "arrival"}  # fmt: skip


class Judge:
    """The components of a launch, and what is wrong with it."""

    def __init__(self, checks: Iterable[str] | None, components: int) -> None:
        self.checks = frozenset(CHECKS if checks is None else checks)
        if unknown := self.checks - set(CHECKS):
            raise ValueError(f"no checks: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
        self.found: dict[tuple[str, str], str] = {}
        self.capacity = components + 2
        self.kinds, self.names = ["never", "grid"], ["nobody", "an earlier launch"]

    def component(self, kind: str, name: str) -> int:
        self.kinds.append(kind)
        self.names.append(name)
        if len(self.kinds) > self.capacity:
            raise AssertionError(f"more than {self.capacity} components: a program makes more barriers than its PTX")
        return len(self.kinds) - 1

    def report(self, check: str, place: str, text: str) -> None:
        if check in self.checks:
            self.found.setdefault((check, place), f"{check}: {place}: {text}")

    @property
    def faults(self) -> list[str]:
        return list(self.found.values())


class Shadow:
    """Of each granule of a memory, the epoch of its last write, and of its last read by each agent.

    `at` is a slice of granules, or an array [lanes, granules] with `warp`, each lane's row of `seen`, [lanes, 1]. A
    read by several components at once (a product's four warps) has ended when all of them say so.
    """

    def __init__(self, judge: Judge, name: str, granules: int, unit: int, first: int) -> None:
        self.judge, self.name, self.unit = judge, name, unit
        self.writer = np.full(granules, first, np.int32)
        self.written = np.full(granules, first == NEVER, np.int32)
        self.reads: dict[tuple[int, ...], Array] = {}
        self.newest: dict[tuple[int, ...], int] = {}
        self.updated: Array | None = None
        """Whether the last write was an atomic update, where there are any."""

    def after_writes(
        self, at: slice | Array, seen: Array, warp: Array | int, place: str, verb: str, plain: Array
    ) -> None:
        """Whoever wrote there did so before; `plain` is what is known without regard to proxies."""
        writer, written = self.writer[at], self.written[at]
        late = seen[warp, writer] < written
        if late.any() and verb in _WRITES:
            late &= writer != NEVER
        if late.any():
            first = np.unravel_index(np.argmax(late), late.shape)
            row = warp[first[0], 0] if isinstance(warp, np.ndarray) else warp
            component = int(writer[first])
            kind = self.judge.kinds[component]
            check = _CHECK_OF[kind]
            if plain[row, component] >= written[first]:
                check, how = "proxy", "without fence.proxy.async in between"
            elif kind == "never":
                how = "which is not initialised"
            elif kind == "grid":
                how = "before griddepcontrol.wait"
            elif kind == "load":
                how = "before it has waited for them"
            else:
                how = "with nothing in between that orders the two"
            by = "" if kind in ("never", "grid") else f", written by {self.judge.names[component]},"
            if self.name and check in ("race", "arrival"):
                check = "global"
            self.judge.report(check, place, f"{verb} {self._where(at, first)}{by} {how}")

    def after_reads(self, at: slice | Array, seen: Array, warp: Array | int, place: str, verb: str) -> None:
        """Whoever read there has done with it."""
        for components, row in self.reads.items():
            known = seen[:, components].min(1)
            if self.newest[components] <= known.min():
                continue
            late = row[at] > known[warp]
            if late.any():
                first = np.unravel_index(np.argmax(late), late.shape)
                kind = self.judge.kinds[components[0]]
                by = " and ".join(self.judge.names[c] for c in (components[0], components[-1])[: len(components)])
                text = f"{verb} {self._where(at, first)}, which {by} may still read"
                self.judge.report("global" if self.name else _CHECK_OF[kind], place, text)

    def read(self, at: slice | Array, components: tuple[int, ...], value: int) -> None:
        row = self.reads.get(components)
        if row is None:
            row = self.reads[components] = np.full(len(self.writer), -1, np.int32)
        row[at] = self.newest[components] = value

    def write(self, at: slice | Array, component: Array | int, value: Array | int) -> None:
        self.writer[at], self.written[at] = component, value
        if self.updated is not None:
            self.updated[at] = False

    def _where(self, at: slice | Array, first: tuple[int, ...]) -> str:
        granule = at.start + int(first[0]) if isinstance(at, slice) else int(at[first])
        return f"{self.name or 'shared memory'} at byte {granule * self.unit}"


@dataclass
class Phase:
    """Of a barrier: who has arrived in it, and what they knew."""

    pending: int
    clock: Array
    arrivals: list[tuple[int, int]] = field(default_factory=list)
    """(component, value) of each."""
    expected: int = 0
    issued: int = 0
    landed: int = 0
    waits: list[tuple[int, int, str]] = field(default_factory=list)
    """(component, value, place) of who has waited for the phase before."""

    @property
    def full(self) -> bool:
        return self.pending <= 0 and self.landed >= self.expected


class Barrier:
    """An mbarrier. Its phases are numbered; the loads of phase i are component `loads` from `base + i + 1` on."""

    def __init__(self, judge: Judge, name: str, count: int, loads: int, base: int) -> None:
        self.judge, self.name, self.count, self.loads, self.base = judge, name, count, loads, base
        self.phases = [Phase(count, self._blank())]

    def _blank(self) -> Array:
        return np.zeros((2, self.judge.capacity), np.int32)

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    @property
    def current(self) -> int:
        return len(self.phases) - 1

    def known(self, clock: Array) -> int:
        """How many phases a warp with this clock knows to be complete."""
        return max(int(clock[0, self.loads]) - self.base, 0)

    def _sure(self, clock: Array, place: str, verb: str) -> None:
        """An arrival counts for the current phase in every order: the one before is known to be complete."""
        if self.current and self.known(clock) < self.current:
            before = self.phases[-2]
            if before.expected or any(clock[0, component] < value for component, value in before.arrivals):
                text = f"{verb} at {self.name}, maybe still in the phase before, which takes {self.count} arrivals"
                self.judge.report("count", place, text)

    def arrive(self, clock: Array, component: int, place: str, expected: int = 0, count: int = 1) -> None:
        self._sure(clock, place, "arrives")
        phase = self.phase
        phase.expected += expected
        phase.pending -= count
        phase.arrivals.append((component, int(clock[0, component])))
        np.maximum(phase.clock, clock, out=phase.clock)
        if phase.pending < 0:
            self.judge.report("count", place, f"arrives at {self.name} beyond its count of {self.count}")
        clock[0, component] += 1
        self.settle()

    def issue(self, clock: Array, size: int, place: str) -> int:
        """A load will complete here: the phase it counts for."""
        self._sure(clock, place, "loads")
        phase = self.phase
        phase.issued += size
        if phase.issued > phase.expected:
            text = f"loads {phase.issued} bytes in a phase of {self.name} that expects {phase.expected}"
            self.judge.report("bytes", place, text)
        return self.current

    def land(self, number: int, size: int) -> None:
        self.phases[number].landed += size
        self.settle()

    def settle(self) -> None:
        while self.phase.full:
            number, clock = self.current, self.phase.clock
            clock[:, self.loads] = self.base + number + 1
            for component, value, place in self.phase.waits:
                if clock[0, component] < value:
                    self._passed(place, number - 1)
            self.phases.append(Phase(self.count, self._blank()))

    def _passed(self, place: str, number: int) -> None:
        text = f"waits for phase {number} of {self.name}, but phase {number + 1} may complete before it looks"
        self.judge.report("phase", place, text)

    def target(self, clock: Array, parity: int) -> int:
        """The phase that a wait with this parity ends at, for a warp with this clock; -1: none, it goes on at once."""
        known = self.known(clock)
        return known if known & 1 == parity & 1 else known - 1

    def passed(self, target: int) -> bool:
        return target < self.current

    def wait(self, clock: Array, component: int, target: int, place: str) -> None:
        """A warp goes on because phase `target` is complete, and learns what was known there."""
        if target < self.current - 1:
            self._passed(place, target)
        if target >= 0:
            np.maximum(clock, self.phases[target].clock, out=clock)
        self.phases[target + 1].waits.append((component, int(clock[0, component]), place))
        clock[0, component] += 1


class Rendezvous:
    """One of the sixteen numbered barriers of bar.sync."""

    def __init__(self, judge: Judge, name: str) -> None:
        self.judge, self.name = judge, name
        self.threads = self.turn = 0
        self.arrived: list[tuple[Array, int, int]] = []
        """Clock, component and its value of each warp that has come."""

        self.before: list[tuple[int, int]] = []

    def arrive(self, clock: Array, component: int, threads: int, place: str) -> None:
        if any(clock[0, c] < value for c, value in self.before):
            self.judge.report("count", place, f"arrives at {self.name}, maybe still in the turn before")
        if self.arrived and threads != self.threads:
            text = f"arrives at {self.name} for {threads} threads, where others came for {self.threads}"
            self.judge.report("count", place, text)
        self.threads = threads
        self.arrived.append((clock, component, int(clock[0, component])))
        if 32 * len(self.arrived) >= threads:
            together = np.maximum.reduce([clock for clock, _, _ in self.arrived])
            for clock, component, _ in self.arrived:
                clock[:] = together
                clock[0, component] += 1
            self.before = [(component, value) for _, component, value in self.arrived]
            self.arrived = []
            self.turn += 1
