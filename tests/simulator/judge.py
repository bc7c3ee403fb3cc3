"""Who knows what: vector clocks of warps and of what they set going, and every access held against them.

A clock has a component for each agent: a warp; its wgmma groups; its bulk stores (their reads of shared memory, and
themselves); its copies; the loads that complete on a barrier. An access is an epoch (component, value); it happened
before a warp's next step if the warp's clock has reached that value. A warp's clock has two rows: what it knows, and
what of that a proxy fence has made known to the async proxy. Barriers join rows alike. So one execution judges all
orders, as long as control does not depend on who comes first.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .arithmetic import Array

CHECKS = (
    "arrival",  # shared memory is used, or the program ends, before the load that fills it has arrived
    "release",  # it is overwritten while a product may still read it
    "store",  # it is overwritten, or the program ends, while a bulk store may still read it
    "race",  # warps use it without a barrier in between
    "uninitialised",  # it is read, and nobody wrote it
    "init",  # a load ends at a barrier that was made without fence.proxy.async
    "proxy",  # the async proxy uses what else was written without fence.proxy.async
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
KINDS = ("warp", "product", "bulk read", "bulk store", "copy")
"""Components that every warp has."""
WRITES = ("writes", "updates", "loads into", "copies into", "stores into")
_CHECK = {"warp": "race", "copy": "race", "product": "release", "bulk read": "store", "load": "arrival"}
_NOBODY = {"never": ("uninitialised", ", which nobody wrote"), "grid": ("dependent", " before griddepcontrol.wait")}


def learn(clock: Array, other: Array) -> None:
    np.maximum(clock, other, out=clock)


class Judge:
    """The components of a launch, and what is wrong with it."""

    def __init__(self, checks: Iterable[str] | None, components: int) -> None:
        self.checks = frozenset(CHECKS if checks is None else checks)
        if unknown := sorted(self.checks - set(CHECKS)):
            raise ValueError(f"no checks: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
        self.size = components + 2
        self.components = [("never", "nobody"), ("grid", "an earlier launch")]  # (kind, name) of each
        self.found: dict[tuple[str, str], str] = {}

    def component(self, kind: str, name: str) -> int:
        self.components.append((kind, name))
        return len(self.components) - 1

    def report(self, check: str, place: str, text: str) -> None:
        if check in self.checks:
            self.found.setdefault((check, place), f"{check}: {place}: {text}")


class Agent(NamedTuple):
    """Who accesses memory: for each row of `clock`, [rows, 2, components], the components and value of its epoch."""

    clock: Array
    epochs: list[tuple[tuple[int, ...], int]]  # of several components (a product's warps), all have to have got there
    place: str
    row: Array | int = 0  # of each lane
    proxy: int = 0  # 1: what it reads or overwrites has to be known to the async proxy


class Memory:
    """Bytes, and of each unit of them the epochs of its last write and of its last read by each agent."""

    def __init__(self, judge: Judge, name: str, data: Array, base: int, unit: int, covered: Array, writer: int) -> None:
        self.judge, self.name, self.bytes, self.base, self.unit, self.covered = judge, name, data, base, unit, covered
        self.writer = np.full(len(data) // unit + 1, writer, np.int32)
        self.written = np.full(len(data) // unit + 1, writer == NEVER, np.int32)
        self.reads: dict[tuple[int, ...], Array] = {}
        self.newest: dict[tuple[int, ...], int] = {}

    def access(self, agent: Agent, at: Array, size: int, verb: str, same: Array | None = None) -> Array:
        """Judge an access of some bytes at each of some places, and say which are within this memory.

        Where it writes the `same` as is there, another warp may just have done so: of a vector that several hold. Then
        the write before counts, and this one as a read: whoever overwrites it comes after both.
        """
        inside = (at >= 0) & (at + size <= len(self.bytes)) & ((self.base + at) % size == 0)
        last = np.clip(at, 0, len(self.bytes) - size) + size - 1
        inside &= self.covered[last] & self.covered[last - size + 1]
        if not inside.all():
            text = f"{verb} {size} bytes outside {self.name}, at its byte {int(at[np.argmin(inside)])}"
            self.judge.report("bounds", agent.place, text)
        if not self.judge.checks:
            return inside
        row = np.broadcast_to(agent.row, at.shape)[inside]
        units = at[inside, None] // self.unit + np.arange(max(size // self.unit, 1))
        again = self._after_writes(agent, units, row[:, None], verb, False if same is None else same[inside, None])
        if verb in WRITES:
            self._after_reads(agent, units, row[:, None], verb, again)
            values = np.array([(components[0], value) for components, value in agent.epochs])[row]
            self.writer[units] = np.where(again, self.writer[units], values[:, :1])
            self.written[units] = np.where(again, self.written[units], values[:, 1:])
            if not again.any():
                return inside
            units, row = units[again], np.broadcast_to(row[:, None], again.shape)[again]
        for i, (components, value) in enumerate(agent.epochs):
            if components not in self.reads:
                self.reads[components] = np.full(len(self.writer), -1, np.int32)
            self.reads[components][units[row == i]] = value
            self.newest[components] = value
        return inside

    def _after_writes(self, agent: Agent, units: Array, row: Array, verb: str, same: Array | bool) -> Array:
        """Whoever wrote there did so before; or it is the `same`, by another warp: where it is, is returned."""
        writer, written = self.writer[units], self.written[units]
        late = agent.clock[row, agent.proxy, writer] < written
        if late.any() and verb in WRITES:
            late &= writer != NEVER
        again = np.zeros_like(late)
        if late.any() and same is not False:
            again = late & same & np.array([kind == "warp" for kind, _ in self.judge.components])[writer]
            late &= ~again
        if not late.any():
            return again
        first = np.unravel_index(np.argmax(late), late.shape)
        component = int(writer[first])
        kind, name = self.judge.components[component]
        check, text = _NOBODY.get(kind, (_CHECK.get(kind, "global"), f", not after the write by {name}"))
        if agent.clock[row[first[0], 0], 0, component] >= written[first]:
            check = "init" if verb == "ends at" else "proxy"
            text = text.replace("not after", "no fence.proxy.async after")
        elif self.base and check in ("race", "arrival"):
            check = "global"
        self.judge.report(check, agent.place, f"{verb} {self.name} at byte {units[first] * self.unit}{text}")
        return again

    def _after_reads(self, agent: Agent, units: Array, row: Array, verb: str, again: Array) -> None:
        """Whoever read there has done with it."""
        for components, read in self.reads.items():
            known = agent.clock[:, 0, components].min(1)
            if self.newest[components] <= known.min():
                continue
            late = (read[units] > known[row]) & ~again
            if late.any():
                byte = units.reshape(-1)[np.argmax(late)] * self.unit
                kind, name = self.judge.components[components[0]]
                text = f"{verb} {self.name} at byte {byte}, which {name} may still read"
                self.judge.report("global" if self.base else _CHECK[kind], agent.place, text)


@dataclass
class Phase:
    """Of a barrier: who has arrived in it, what had happened then, and what of that they tell who waits."""

    pending: int
    past: Array
    clock: Array
    arrivals: list[tuple[int, int]] = field(default_factory=list)  # (component, value) of each
    expected: int = 0
    issued: int = 0
    landed: int = 0
    waits: list[tuple[int, int, str]] = field(default_factory=list)  # (component, value, place) for the phase before


class Barrier:
    """An mbarrier, or one of bar.sync. Phase i is known to be complete when component `loads` is at `base` + i + 1."""

    def __init__(self, judge: Judge, name: str, count: int, loads: int, base: int) -> None:
        self.judge, self.name, self.count, self.loads, self.base = judge, name, count, loads, base
        self.phases = [Phase(count, *np.zeros((2, 2, judge.size), np.int32))]

    @property
    def current(self) -> int:
        return len(self.phases) - 1

    def _known(self, clock: Array) -> int:
        """How many phases a warp with this clock knows to be complete."""
        return max(int(clock[0, self.loads]) - self.base, 0)

    def _sure(self, clock: Array, place: str, verb: str) -> None:
        """What is done now counts for the current phase in every order: the one before is known to be complete."""
        if self._known(clock) < self.current:
            before = self.phases[-2]
            if before.expected or any(clock[0, component] < value for component, value in before.arrivals):
                text = f"{verb} at {self.name} of count {self.count}, maybe in the phase before"
                self.judge.report("count", place, text)

    def arrive(
        self, clock: Array, component: int, place: str, expected: int = 0, count: int = 1, knows: Array | None = None
    ) -> None:
        """Whoever waits learns what is known here, or `knows` alone."""
        self._sure(clock, place, "arrives")
        phase = self.phases[-1]
        phase.expected += expected
        phase.pending -= count
        phase.arrivals.append((component, int(clock[0, component])))
        learn(phase.past, clock)
        learn(phase.clock, clock if knows is None else knows)
        clock[0, component] += 1
        if phase.pending < 0:
            self.judge.report("count", place, f"arrives at {self.name} beyond its count of {self.count}")
        self._settle()

    def issue(self, clock: Array, size: int, place: str) -> int:
        """A load will complete here: the phase it counts for."""
        self._sure(clock, place, "loads")
        phase = self.phases[-1]
        phase.issued += size
        if phase.issued > phase.expected:
            text = f"loads {phase.issued} bytes in a phase of {self.name} that expects {phase.expected}"
            self.judge.report("bytes", place, text)
        return self.current

    def land(self, number: int, size: int) -> None:
        self.phases[number].landed += size
        self._settle()

    def _settle(self) -> None:
        """Begin the next phase when this one has all that it expects."""
        while self.phases[-1].pending <= 0 and self.phases[-1].landed >= self.phases[-1].expected:
            phase = self.phases[-1]
            phase.clock[:, self.loads] = self.base + len(self.phases)
            for component, value, place in phase.waits:
                if phase.past[0, component] < value:
                    self._passed(place, self.current - 1)
            self.phases.append(Phase(self.count, np.zeros_like(phase.clock), np.zeros_like(phase.clock)))

    def _passed(self, place: str, number: int) -> None:
        text = f"waits for phase {number} of {self.name}, but phase {number + 1} may complete before it looks"
        self.judge.report("phase", place, text)

    def target(self, clock: Array, parity: int) -> int:
        """The phase that a wait with this parity ends at, for a warp with this clock; -1: it goes on at once."""
        known = self._known(clock)
        return known if known % 2 == parity else known - 1

    def wait(self, clock: Array, component: int, target: int, place: str) -> None:
        """A warp goes on because phase `target` is complete, and learns what was known there."""
        if target < self.current - 1:
            self._passed(place, target)
        if target >= 0:
            learn(clock, self.phases[target].clock)
        self.phases[target + 1].waits.append((component, int(clock[0, component]), place))
        clock[0, component] += 1

    def lack(self) -> str:
        phase = self.phases[-1]
        missing = f"{phase.pending} arrivals and {phase.expected - phase.landed} bytes"
        return f"phase {self.current} of {self.name}, which lacks {missing}"
