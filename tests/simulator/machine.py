"""Programs at work: strands of warps in lockstep, registers and shared memory, in an order of the machine's choice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import BITS, TYPES, Array
from .judge import KINDS, NEVER, Agent, Barrier, Judge, Memory
from .memory import SHARED, SHARED_BYTES, TensorMap
from .ptx import Unknown


class Step(NamedTuple):
    """A decoded instruction: what it does to a strand, True if it has to wait and be tried again."""

    run: Callable[[Strand], bool | None]
    place: str
    reads: frozenset[int]  # of the registers that products of this kernel use
    writes: frozenset[int]


class Row(NamedTuple):
    """A register: its width in bits, and its number among those of this width."""

    width: int
    number: int


class Work(NamedTuple):
    """Something asynchronous that may still run; of a product, also its registers."""

    finish: Callable[[], None]
    sums: frozenset[int] = frozenset()
    factors: frozenset[int] = frozenset()
    shape: str = ""


class Machine:
    """What the programs of a launch share."""

    def __init__(self, judge: Judge, grid: tuple[int, ...], warps: int, maxnreg: int, seed: int | None) -> None:
        self.judge, self.grid, self.warps, self.maxnreg = judge, grid, warps, maxnreg
        # None: everything asynchronous is done at once, and strands take turns. Else all as late as it may be.
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.noise = np.random.default_rng(0)
        self.steps: list[Step] = []
        self.registers: dict[int, int] = {1: 0}  # how many of each width
        self.values: list[int] = []  # bits of the parameters
        self.regions: list[Memory] = []
        self.maps: dict[int, TensorMap] = {}  # by the address of the parameter
        self.updates: dict[int, Array] = {}  # what was known at the atomic updates of an address


class Strand:
    """Warps `first` to `last` - 1 of a program, with one program counter."""

    def __init__(self, program: Program, first: int, last: int, pc: int) -> None:
        self.program, self.machine, self.judge, self.pc = program, program.machine, program.machine.judge, pc
        self.done, self.waiting = False, ""
        self.target: int | None = None  # the turn that it waits for at a barrier of bar.sync
        # Groups of what may still run; the last one is not closed.
        self.groups: dict[str, list[list[Work]]] = {kind: [[]] for kind in ("product", "bulk", "copy")}
        self.closed = dict.fromkeys(self.groups, 0)
        self.sums: set[int] = set()
        self.factors: set[int] = set()
        self.unfenced: set[int] = set()  # registers of products that were written since the last wgmma.fence
        self.storing = False  # whether something may still be stored to tensor memory
        self.take(first, last)

    def take(self, first: int, last: int) -> None:
        self.first, self.last, self.warps = first, last, last - first
        self.lanes = np.arange(32 * self.warps)
        self.v = {t: view[:, 32 * first : 32 * last] for t, view in self.program.views.items()}
        self.clock = self.program.clocks[first:last]

    def part(self, targets: Array) -> None:
        """Each warp [warps, 32 lanes] goes to its target."""
        self.expect((targets == targets[:, :1]).all(), "lanes of a warp that stay together")
        same = int(np.argmax(np.append(targets[:, 0], -1) != targets[0, 0]))
        if same < self.warps:
            running = self.sums or any(self.groups["bulk"])
            self.expect(not running, "warps that stay together while a product or store of theirs runs")
            other = Strand(self.program, self.first + same, self.last, self.pc)
            other.unfenced, other.closed = set(self.unfenced), dict(self.closed)
            other.storing = self.storing
            other.groups["copy"] = [list(group) for group in self.groups["copy"]]  # each waits for its own
            self.program.strands.append(other)
            self.take(self.first, self.first + same)
            other.part(targets[same:])
        self.pc = int(targets[0, 0])

    def expect(self, condition: Any, what: str) -> None:
        if not condition:
            raise Unknown(f"{self.place}: expected {what}")

    def report(self, check: str, text: str) -> None:
        self.judge.report(check, self.place, text)

    def get(self, operand: Any, t: str) -> Array:
        """An operand's values, a lane each. Of a wider register, its lower bits."""
        if isinstance(operand, int):
            return constant(operand, t, 32 * self.warps)
        view = _view(operand, t)
        values = self.v[view][operand.number]
        return values if view == t else values.astype(TYPES[t])

    def put(self, operand: Row, t: str, values: Array, lanes: Any = slice(None)) -> None:
        """Into a wider register, extended."""
        self.v[_view(operand, t)][operand.number][lanes] = values

    def uniform(self, operand: Any, t: str, lanes: slice = slice(None)) -> int:
        values = self.get(operand, t)[lanes]
        self.expect((values == values[0]).all(), "an operand that lanes of a group share")
        return int(values[0])

    def own(self, kind: str = "warp") -> Array:
        """The component of each of its warps."""
        return self.program.components[kind][self.first : self.last]

    def agent(self, lanes: Array, kind: str = "warp") -> Agent:
        """These lanes' warps, or the next group of something asynchronous that they set going."""
        next_ = self.closed.get(kind.partition(" ")[0], 0) + 1
        epochs = [((int(c),), next_) for c in self.own(kind)]
        if kind == "warp":
            epochs = [((c,), int(clock[0, c])) for ((c,), _), clock in zip(epochs, self.clock, strict=True)]
        return Agent(self.clock, epochs, self.place, lanes // 32)

    @property
    def place(self) -> str:
        key = self.pc, self.first, self.last
        if key not in self.program.places:
            warps = f"warp {self.first}" if self.warps == 1 else f"warps {self.first}-{self.last - 1}"
            self.program.places[key] = f"{self.program.name}, {warps}, {self.machine.steps[self.pc - 1].place}"
        return self.program.places[key]

    def touch(self, step: Step) -> None:
        """Registers of products, used by something else."""
        if not self.sums.isdisjoint(step.reads):
            self.report("registers", "reads sums of a product that may still run")
        if not (self.sums.isdisjoint(step.writes) and self.factors.isdisjoint(step.writes)):
            self.report("registers", "writes a register of a product that may still run")
        self.unfenced |= step.writes

    def issue(self, kind: str, work: Work) -> None:
        """Part of a group: done now, or when it is waited for."""
        if self.machine.rng is None:
            work.finish()
            work = work._replace(finish=lambda: None)
        else:
            work = work._replace(finish=functools.cache(work.finish))  # once, whichever strand waits for it
        self.groups[kind][-1].append(work)

    def close(self, kind: str) -> None:
        self.groups[kind].append([])
        self.closed[kind] += 1

    def end(self, kind: str, left: int, components: Iterable[str]) -> None:
        """All but the last few closed groups are done. A copy writes as its warp would, the others for themselves."""
        while len(self.groups[kind]) > left + 1:
            for work in self.groups[kind].pop(0):
                work.finish()
        rows = 1 if kind == "copy" else 2
        for component in components:
            own = self.own(component)
            for w, clock in enumerate(self.clock[:, :rows]):
                mine = own if kind == "product" else own[w]  # warps multiply together
                clock[:, mine] = np.maximum(clock[:, mine], self.closed[kind] - left)
        if kind == "product":
            running = [work for group in self.groups[kind] for work in group]
            self.sums = set().union(*(work.sums for work in running))
            self.factors = set().union(*(work.factors for work in running))


class Program:
    """One program of the grid."""

    def __init__(self, machine: Machine, index: tuple[int, ...]) -> None:
        self.machine, self.name, judge, lanes = machine, f"program {index}", machine.judge, 32 * machine.warps
        names = [f"warp {w} of {self.name}" for w in range(machine.warps)]
        self.components = {
            kind: np.array([judge.component(kind, name if kind == "warp" else f"a {kind} of {name}") for name in names])
            for kind in KINDS
        }
        self.clocks = np.zeros((machine.warps, 2, judge.size), np.int32)
        self.clocks[np.arange(machine.warps), 0, self.components["warp"]] = 1
        self.views = {"pred": np.zeros((machine.registers[1], lanes), bool)}
        for width in (16, 32, 64):
            file = np.zeros((machine.registers.get(width, 0), lanes), TYPES[f"b{width}"])
            self.views |= {t: file.view(TYPES[t]) for t in TYPES if np.dtype(TYPES[t]).itemsize == width // 8}
        first = [np.arange(lanes), *index, *machine.grid]  # the special registers are the first rows
        self.views["u32"][: len(first)] = np.stack(np.broadcast_arrays(*first))
        data = machine.noise.integers(0, 256, SHARED + SHARED_BYTES, np.uint8)
        self.shared = Memory(judge, "shared memory", data, 0, 2, np.arange(len(data)) >= SHARED, NEVER)
        self.tensor: Any = None  # its tensor memory, once it has some: see `tensor_memory.py`
        self.barriers: dict[int, Barrier] = {}  # mbarriers by address, and those of bar.sync by number
        self.retired: dict[int, Barrier] = {}
        self.loads: list[Callable[[], None]] = []  # those that have not landed
        self.maxnreg = np.full(machine.warps, machine.maxnreg)  # registers of a thread, by warp
        self.places: dict[Any, str] = {}
        self.strands: list[Strand] = []
        self.strands.append(Strand(self, 0, machine.warps, 0))

    def barrier(self, key: int, name: str, count: int) -> Barrier:
        """A new one, where one may have been before."""
        old, judge = self.retired.get(key), self.machine.judge
        if old:
            self._expect_no_loads(old, "makes it anew")
        loads = old.loads if old else judge.component("load", f"a load at {name}")
        base = old.base + len(old.phases) if old else 0
        self.barriers[key] = self.retired[key] = Barrier(judge, f"{name} of {self.name}", count, loads, base)
        return self.barriers[key]

    def run(self) -> None:
        rng = self.machine.rng
        while alive := [strand for strand in self.strands if not strand.done]:
            if rng is not None and rng.random() < 0.2:
                rng.shuffle(self.strands)
                continue
            moved = False
            for strand in alive:
                moved = self._advance(strand) or moved
                if moved and rng is not None:
                    break  # the first goes as far ahead as it may, the last comes when nobody else can
            if not moved and self.loads:
                self.loads.pop(int(rng.integers(len(self.loads))))()
            elif not moved:
                for strand in alive:
                    strand.pc += 1  # to what it waits at
                    strand.report("deadlock", f"waits for {strand.waiting}, and nobody is left to end it")
                return
        if self.tensor is not None and self.tensor.covered.any():
            self.machine.judge.report("deadlock", self.name, "ends with tensor memory that the next one will wait for")
        for barrier in self.retired.values():
            self._expect_no_loads(barrier, "ends")

    def _expect_no_loads(self, barrier: Barrier, verb: str) -> None:
        """A program that ends, or makes a barrier anew, has waited for all loads there."""
        last = max((number for number, phase in enumerate(barrier.phases) if phase.issued), default=-1)
        if last >= 0 and self.clocks[:, 0, barrier.loads].max() <= barrier.base + last:
            self.machine.judge.report("arrival", self.name, f"{verb} while a load at {barrier.name} may be under way")

    def _advance(self, strand: Strand) -> bool:
        """Run until it has to wait; whether it came any further."""
        moved = False
        while not strand.done:
            step = self.machine.steps[strand.pc]
            strand.pc += 1
            if step.writes or (step.reads and strand.sums):
                strand.touch(step)
            if step.run(strand):
                strand.pc -= 1
                break
            moved = True
        return moved


def _view(operand: Row, t: str) -> str:
    """The type to read a register by: `t`, or all its bits."""
    return t if operand.width == BITS[t] and t[1:] != "8" else f"b{operand.width}"


@functools.lru_cache(maxsize=4096)
def constant(value: int, t: str, lanes: int) -> Array:
    """A number's lower bits, in each lane."""
    size = 8 * np.dtype(TYPES[t]).itemsize
    found = np.full(lanes, value != 0 if t == "pred" else value & (1 << size) - 1, f"u{size // 8}").view(TYPES[t])
    found.flags.writeable = False
    return found
