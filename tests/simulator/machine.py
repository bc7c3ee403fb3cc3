"""Programs at work: strands of warps in lockstep, their registers and shared memory, in an order of the machine's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import TYPES, Array
from .judge import KINDS, NEVER, Barrier, Judge, Rendezvous, Shadow
from .memory import SHARED, Global, TensorMap
from .ptx import Instruction, Unknown

GRANULE = 2
"""Bytes of shared memory that are judged together."""


class Step(NamedTuple):
    """A decoded instruction: what it does to a strand, True if it has to wait and be tried again."""

    run: Callable[[Strand], bool | None]
    text: Instruction
    reads: frozenset[int]
    """Of the registers that products of this kernel use."""
    writes: frozenset[int]


class Product(NamedTuple):
    """A wgmma that may still run."""

    sums: frozenset[int]
    factors: frozenset[int]
    shape: str
    multiply: Callable[[], None]


class Machine:
    """What the programs of a launch share."""

    def __init__(
        self, judge: Judge, memory: Global, shared: int, seed: int | None, threads: int, barriers: int
    ) -> None:
        self.judge, self.memory, self.shared = judge, memory, shared
        self.warps, self.barriers = threads // 32, barriers
        self.rng = None if seed is None else np.random.default_rng(seed)
        """None: everything asynchronous is done at once, and strands take turns. Else all as late as it may be."""
        self.noise = np.random.default_rng(0)
        self.steps: list[Step] = []
        self.maps: dict[int, TensorMap] = {}
        """By the address of the parameter."""
        self.shadows: list[Shadow] = []
        """Of the regions of global memory."""
        self.updates: dict[int, Array] = {}
        """What was known at the atomic updates of an address."""
        self.registers: Callable[[tuple[int, int, int]], dict[str, Array]] = lambda index: {}


class Strand:
    """Warps `first` to `last` - 1 of a program, with one program counter."""

    def __init__(self, program: Program, first: int, last: int, pc: int) -> None:
        self.program, self.machine, self.pc = program, program.machine, pc
        self.done = False
        self.waiting = ""
        self.turn: tuple[Rendezvous, int] | None = None
        self.open_products: list[Product] = []
        self.groups: list[list[Product]] = []
        self.committed = 0
        self.sums: set[int] = set()
        """Registers of products that may still run, and those they read as their first operand."""
        self.factors: set[int] = set()
        self.unfenced: set[int] = set()
        self.late: dict[str, list[list[Callable[[], None]]]] = {"bulk": [[]], "copy": [[]]}
        """What of the groups is left to do; the last of them is not closed."""
        self.closed = {"bulk": 0, "copy": 0}
        self.unread = 0
        """The last group of bulk stores that holds one."""
        self.take(first, last)

    def take(self, first: int, last: int) -> None:
        self.first, self.last, self.warps = first, last, last - first
        self.lanes = slice(32 * first, 32 * last)
        self.v = {t: view[:, self.lanes] for t, view in self.program.views.items()}
        self.clock = self.program.clocks[first:last]
        self.warp = np.arange(32 * self.warps)[:, None] // 32
        self.all = np.ones(32 * self.warps, bool)

    def split(self, warps: int) -> Strand:
        """Leave all but the first few warps to another strand."""
        if self.groups or self.open_products or self.unread > int(self.clock[0, 0, self.own("bulk read")[0]]):
            raise Unknown(f"{self.place}: warps part while a product or store of theirs runs")
        other = Strand(self.program, self.first + warps, self.last, self.pc)
        other.committed, other.unfenced, other.closed = self.committed, set(self.unfenced), dict(self.closed)
        self.take(self.first, self.first + warps)
        self.program.strands.append(other)
        return other

    def own(self, kind: str = "warp") -> Array:
        """The component of each of its warps."""
        return self.program.components[kind][self.first : self.last]

    @property
    def place(self) -> str:
        key = self.pc, self.first, self.last
        found = self.program.places.get(key)
        if found is None:
            text = self.machine.steps[max(self.pc - 1, 0)].text
            warps = f"warp {self.first}" if self.warps == 1 else f"warps {self.first}-{self.last - 1}"
            found = self.program.places[key] = f"{self.program.name}, {warps}, line {text.line}, {text}"
        return found

    def touch(self, step: Step) -> None:
        """Registers of products, used by something else."""
        if not self.sums.isdisjoint(step.reads):
            self.machine.judge.report("registers", self.place, "reads sums of a product that may still run")
        if not (self.sums.isdisjoint(step.writes) and self.factors.isdisjoint(step.writes)):
            self.machine.judge.report("registers", self.place, "writes a register of a product that may still run")
        self.unfenced |= step.writes

    def retire(self, left: int) -> None:
        """Of all groups of products, only the last few may still run."""
        while len(self.groups) > left:
            for product in self.groups.pop(0):
                product.multiply()
        self.clock[:, :, self.own("product")] = self.committed - len(self.groups)
        self.sums = set().union(*(product.sums for product in self.running()))
        self.factors = set().union(*(product.factors for product in self.running()))

    def running(self) -> Iterator[Product]:
        return (product for group in [*self.groups, self.open_products] for product in group)

    def issue(self, kind: str, work: Callable[[], None]) -> None:
        """Part of a group of copies or bulk stores: now, or when it is waited for."""
        if self.machine.rng is None:
            work()
        else:
            self.late[kind][-1].append(work)

    def close(self, kind: str) -> None:
        self.late[kind].append([])
        self.closed[kind] += 1

    def end(self, kind: str, left: int, components: tuple[str, ...]) -> None:
        """All but the last few closed groups are done with."""
        late = self.late[kind]
        while len(late) > left + 1:
            for work in late.pop(0):
                work()
        rows = (
            slice(0, 1) if kind == "copy" else slice(0, 2)
        )  # a copy writes like a store, a bulk store reads and is gone
        for component in components:
            for i, own in enumerate(self.own(component)):
                known = self.clock[i, rows, own]
                self.clock[i, rows, own] = np.maximum(known, self.closed[kind] - left)


class Program:
    """One program of the grid."""

    def __init__(self, machine: Machine, index: tuple[int, int, int]) -> None:
        self.machine = machine
        self.name = f"program {index}"
        judge = machine.judge
        self.components = {}
        for kind in KINDS:
            names = [
                f"{'' if kind == 'warp' else f'a {kind} of '}warp {w} of {self.name}" for w in range(machine.warps)
            ]
            self.components[kind] = np.array([judge.component(kind, name) for name in names])
        self.spare = [judge.component("load", f"a load of {self.name}") for _ in range(machine.barriers)]
        self.clocks = np.zeros((machine.warps, 2, judge.capacity), np.int32)
        self.clocks[np.arange(machine.warps), 0, self.components["warp"]] = 1
        self.views = machine.registers(index)
        self.memory = machine.noise.integers(0, 256, SHARED + machine.shared, np.uint8)
        self.shadow = Shadow(judge, "", len(self.memory) // GRANULE, GRANULE, NEVER)
        self.barriers: dict[int, Barrier] = {}
        self.rendezvous: dict[int, Rendezvous] = {}
        self.loads: list[Callable[[], None]] = []
        """Those that have not landed."""
        self.places: dict[Any, str] = {}
        self.retired: dict[int, Barrier] = {}
        """Barriers that were, by address."""
        self.strands: list[Strand] = []
        self.strands.append(Strand(self, 0, machine.warps, 0))

    def run(self) -> None:
        rng = self.machine.rng
        while alive := [strand for strand in self.strands if not strand.done]:
            if rng is not None and rng.random() < 0.2:
                rng.shuffle(self.strands)
                continue
            moved = False
            for strand in alive:
                moved = self.advance(strand) or moved
                if moved and rng is not None:
                    break  # the first goes as far ahead as it may, the last comes when nobody else can
            if not moved and self.loads:
                self.loads.pop(int(rng.integers(len(self.loads))) if rng is not None else 0)()
            elif not moved:
                for strand in alive:
                    strand.pc += 1  # to what it waits at
                    text = f"waits for {strand.waiting}, and nobody is left to end it"
                    self.machine.judge.report("deadlock", strand.place, text)
                return

    def advance(self, strand: Strand) -> bool:
        """Run until it has to wait; whether it came any further."""
        steps, moved = self.machine.steps, False
        while not strand.done:
            step = steps[strand.pc]
            strand.pc += 1
            if step.writes or (step.reads and strand.sums):
                strand.touch(step)
            if step.run(strand):
                strand.pc -= 1
                break
            moved = True
        return moved


def views(counts: dict[str, int], threads: int) -> dict[str, Array]:
    """A register file: of each type, all registers of its width as [register, lane]."""
    files = {width: np.zeros((counts.get(width, 0), threads), TYPES[width]) for width in ("pred", "b16", "b32", "b64")}
    found = {"pred": files["pred"]}
    for name, dtype in TYPES.items():
        width = f"b{8 * np.dtype(dtype).itemsize}"
        if name != "pred" and width in files:
            found[name] = files[width].view(dtype)
    return found
