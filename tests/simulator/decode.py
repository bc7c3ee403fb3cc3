"""Instructions as closures over rows of the register file. Constants and special registers are rows, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import TABLE, TYPES, Array, Operation, bits
from .asynchronous import Asynchronous
from .judge import GRID, Barrier, Rendezvous
from .machine import GRANULE, Machine, Step, Strand, views
from .memory import SHARED
from .ptx import Instruction, Kernel, Unknown

Run = Callable[[Strand], "bool | None"]
MAPS = 1 << 30
"""Address of the first parameter; the others follow."""
_NO_RESULT = {"st", "stmatrix", "cp", "mbarrier", "bar", "barrier", "bra", "brx", "ret", "fence", "setmaxnreg", "trap",
              "wgmma", "griddepcontrol"}  # fmt: skip
_LOADS = {"cg", "ca", "cs", "nc", "L1::evict_last", "L1::evict_first", "L1::evict_normal", "L1::no_allocate"}
_LOADS |= {"L2::evict_last", "L2::evict_first", "L2::evict_normal"}
_REGISTER = re.compile(r"%[a-z]+\d+")


class Decoder(Asynchronous):
    def __init__(self, kernel: Kernel, machine: Machine, values: list[int], grid: tuple[int, int, int]) -> None:
        self.kernel, self.machine, self.grid = kernel, machine, grid
        self.parameters = {name: i for i, (name, _) in enumerate(kernel.parameters)}
        self.values = values
        self.rows: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.constants: dict[tuple[str, int], int] = {}
        self.specials: dict[str, int] = {}
        products = [set(_REGISTER.findall(i.operands[0] + i.operands[1])) for i in kernel.code if "mma_async" in i.op]
        self.of_products = set().union(*products)
        machine.steps[:] = [self.step(i) for i in kernel.code]
        machine.registers = self.registers

    def step(self, i: Instruction) -> Step:
        used = [{self.row(r)[1] for r in _REGISTER.findall(text) if r in self.of_products} for text in i.operands]
        name = i.op.partition(".")[0]
        results = 0 if name in _NO_RESULT else 1
        writes = frozenset().union(*used[:results])
        reads = frozenset() if name == "wgmma" else frozenset().union(*used[results:])
        find = getattr(self, "_" + name, None)
        run = find(i) if find is not None else None
        return Step(run or self.elementwise(i), i, reads, writes)

    def unknown(self, i: Instruction, what: str = "is unknown") -> Unknown:
        return Unknown(f"{self.kernel.name}, line {i.line}: {i} {what}")

    # Operands.

    def row(self, register: str) -> tuple[str, int]:
        """The width of a register, "b32", and its row in the file of that width."""
        declared = self.kernel.type_of(register)
        width = declared if declared == "pred" else f"b{max(bits(declared), 16)}"
        if register not in self.rows:
            self.rows[register] = self.counts[width] = self.counts.get(width, 0) + 1
            self.rows[register] -= 1
        return width, self.rows[register]

    def constant(self, width: str, value: int) -> int:
        key = width, value & ((1 << (1 if width == "pred" else bits(width))) - 1)
        if key not in self.constants:
            self.constants[key] = self.counts.get(width, 0)
            self.counts[width] = self.constants[key] + 1
        return self.constants[key]

    def operand(self, text: str, t: str) -> tuple[str, int]:
        """The view of an operand of type `t`, and its row."""
        width = t if t == "pred" else f"b{max(bits(t), 16)}"
        if text in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"):
            if text not in self.specials:
                self.specials[text] = self.counts.get("b32", 0)
                self.counts["b32"] = self.specials[text] + 1
            return t, self.specials[text]
        if text.startswith("%") or text in self.kernel.registers:
            found, row = self.row(text)
            if found != width:
                raise Unknown(f"{self.kernel.name}: {text}, a {found} register, as {t}")
            return t, row
        return t, self.constant(width, -int(text) if t == "pred" else self.number(text))

    def number(self, text: str) -> int:
        if text in self.kernel.shared:
            return SHARED
        if text in self.parameters:
            return MAPS + self.parameters[text]
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            return int(match[1], 16)
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            raise Unknown(f"{self.kernel.name}: operand {text}") from None

    def address(self, text: str, t: str) -> tuple[str, int, int]:
        """View, row and offset of "[register+offset]"."""
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise Unknown(f"{self.kernel.name}: address {text}")
        return *self.operand(match[1], t), int(match[2] or "0", 0)

    def listed(self, text: str, t: str) -> list[int]:
        """Rows of "{a, b}", or of one operand."""
        return [self.operand(name.strip(), t)[1] for name in text.strip("{} ").split(",")]

    def mask(self, i: Instruction) -> Callable[[Strand], Array]:
        if i.guard is None:
            return lambda s: s.all
        _, row = self.operand(i.guard, "pred")
        return (lambda s: ~s.v["pred"][row]) if i.negated else (lambda s: s.v["pred"][row])

    def plain(self, i: Instruction) -> None:
        if i.guard is not None:
            raise self.unknown(i, "with a guard is unknown")

    def registers(self, index: tuple[int, int, int]) -> dict[str, Array]:
        """A register file for the program at this place of the grid."""
        threads = 32 * self.machine.warps
        made = views(self.counts, threads)
        for (width, _), row in self.constants.items():
            made[width][row] = 0
        for (width, value), row in self.constants.items():
            made[width][row] = TYPES[width](value)
        for name, row in self.specials.items():
            axis = "xyz".index(name[-1])
            if name == "%tid.x":
                made["u32"][row] = np.arange(threads)
            else:
                made["u32"][row] = (self.grid if name.startswith("%n") else index)[axis]
        return made

    # Computing.

    def elementwise(self, i: Instruction) -> Run:
        operation = TABLE.get(i.op)
        if operation is None or len(i.operands) != 1 + len(operation.sources):
            raise self.unknown(i)
        compute = operation.compute
        dt, dr = self.result(i.operands[0], operation)
        sources = [self.source(text, t) for text, t in zip(i.operands[1:], operation.sources, strict=True)]
        if i.guard is not None or any(narrow for *_, narrow in sources) or dt in ("b8", "u8", "s8"):
            return self.general(i, compute, (dt, dr), sources)
        if len(sources) == 1:
            ((at, ar, _),) = sources

            def one(s: Strand) -> None:
                v = s.v
                v[dt][dr] = compute(v[at][ar])

            return one
        if len(sources) == 2:
            (at, ar, _), (bt, br, _) = sources

            def two(s: Strand) -> None:
                v = s.v
                v[dt][dr] = compute(v[at][ar], v[bt][br])

            return two
        (at, ar, _), (bt, br, _), (ct, cr, _) = sources

        def three(s: Strand) -> None:
            v = s.v
            v[dt][dr] = compute(v[at][ar], v[bt][br], v[ct][cr])

        return three

    def result(self, text: str, operation: Operation) -> tuple[str, int]:
        t = operation.result
        width, row = self.row(text)
        if t != "pred" and f"b{max(bits(t), 16)}" != width:
            raise Unknown(f"{self.kernel.name}: {text}, a {width} register, for a result of type {t}")
        return t, row

    def source(self, text: str, t: str) -> tuple[str, int, Any]:
        """View, row, and the narrower type that only the lower bits of the register have."""
        if bits(t) == 8 and t != "pred":
            width, _ = self.row(text)
            return *self.operand(text, width), TYPES[t]
        return *self.operand(text, t), None

    def general(self, i: Instruction, compute: Any, target: tuple[str, int], sources: list[Any]) -> Run:
        mask, (dt, dr) = self.mask(i), target
        into = {"b8": "u16", "u8": "u16", "s8": "s16"}.get(dt, dt)

        def run(s: Strand) -> None:
            v = s.v
            values = [v[t][r] if narrow is None else v[t][r].astype(narrow) for t, r, narrow in sources]
            np.copyto(v[into][dr], compute(*values), where=mask(s), casting="unsafe")

        return run

    def _mov(self, i: Instruction) -> Run | None:
        into, source = i.operands
        if "{" not in into + source:
            return None
        self.plain(i)
        wide = i.op.partition(".")[2]
        half = {"b32": "b16", "b64": "b32"}.get(wide)
        if half is None:
            raise self.unknown(i)
        size = TYPES[wide](bits(half))
        if "{" in source:
            (low, high), (_, row) = self.listed(source, half), self.operand(into, wide)

            def join(s: Strand) -> None:
                parts = s.v[half]
                s.v[wide][row] = parts[low].astype(TYPES[wide]) | parts[high].astype(TYPES[wide]) << size

            return join
        names = [name.strip() for name in into.strip("{} ").split(",")]
        targets = [None if name == "_" else self.operand(name, half)[1] for name in names]
        _, row = self.operand(source, wide)

        def part(s: Strand) -> None:
            word = s.v[wide][row].copy()
            for number, target in enumerate(targets):
                if target is not None:
                    s.v[half][target] = word >> TYPES[wide](number) * size

        return part

    def _setp(self, i: Instruction) -> Run | None:
        """Of two halves, into two predicates; else it is in the table."""
        if not i.op.endswith(".f16x2"):
            return None
        self.plain(i)
        operation = TABLE.get(i.op.removesuffix("x2"))
        if operation is None or "|" not in i.operands[0]:
            raise self.unknown(i)
        (_, low), (_, high) = (self.operand(name, "pred") for name in i.operands[0].split("|"))
        (_, a), (_, b) = (self.operand(text, "b32") for text in i.operands[1:])

        def run(s: Strand) -> None:
            halves = [s.v["u32"][row].copy().view(np.float16).reshape(-1, 2) for row in (a, b)]
            s.v["pred"][low], s.v["pred"][high] = operation.compute(*halves).T

        return run

    def _elect(self, i: Instruction) -> Run:
        self.plain(i)
        into, chosen = i.operands[0].split("|")
        row, pick = self.operand(into, "b32")[1], self.operand(chosen, "pred")[1]
        if i.op != "elect.sync" or self.number(i.operands[1]) != -1:
            raise self.unknown(i)

        def run(s: Strand) -> None:
            s.v["b32"][row] = 0
            s.v["pred"][pick] = np.arange(32 * s.warps) % 32 == 0

        return run

    def _shfl(self, i: Instruction) -> Run:
        self.plain(i)
        how = i.op.split(".")[2]
        into, source, by, clamp, members = i.operands
        if how not in ("idx", "bfly") or (clamp, members) != ("31", "-1"):
            raise self.unknown(i)
        (_, d), (_, a), (_, b) = (self.operand(text, "b32") for text in (into, source, by))

        def run(s: Strand) -> None:
            lane = np.arange(32 * s.warps)
            by = s.v["u32"][b].astype(np.int64) & 31
            other = lane // 32 * 32 + (by if how == "idx" else lane % 32 ^ by)
            s.v["b32"][d] = s.v["b32"][a][other]

        return run

    def _redux(self, i: Instruction) -> Run:
        self.plain(i)
        _, _, how, t = (*i.op.split("."), "", "")[:4]
        reduce = {"max": np.max, "min": np.min, "add": np.sum}.get(how)
        if reduce is None or t not in ("s32", "u32"):
            raise self.unknown(i)
        (_, d), (_, a), (_, members) = (self.operand(text, t) for text in i.operands)

        def run(s: Strand) -> None:
            if (s.v["u32"][members] != 0xFFFFFFFF).any():
                raise self.unknown(i, "of some lanes is unknown")
            s.v[t][d] = reduce(s.v[t][a].reshape(-1, 32), 1).repeat(32)

        return run

    # Control.

    def _bra(self, i: Instruction) -> Run:
        if i.op not in ("bra", "bra.uni"):
            raise self.unknown(i)
        target, mask = self.kernel.labels[i.operands[0]], self.mask(i)

        def run(s: Strand) -> None:
            takes = mask(s).reshape(-1, 32)
            if i.guard is None or takes.all():
                s.pc = target
            elif takes.any():
                self.part(s, i, np.where(takes, target, s.pc))

        return run

    def _brx(self, i: Instruction) -> Run:
        self.plain(i)
        targets = np.array([self.kernel.labels[name] for name in self.kernel.tables[i.operands[1]]])
        _, row = self.operand(i.operands[0], "u32")
        return lambda s: self.part(s, i, targets[s.v["u32"][row]].reshape(-1, 32))

    def part(self, s: Strand, i: Instruction, targets: Array) -> None:
        """Each warp [warps, 32 lanes] goes to its target."""
        if (targets != targets[:, :1]).any():
            raise self.unknown(i, "takes the lanes of a warp apart, which is unknown")
        targets = targets[:, 0]
        while s.warps > 1 and (targets != targets[0]).any():
            same = int(np.argmax(targets != targets[0]))
            rest = s.split(same)
            s.pc, s, targets = int(targets[0]), rest, targets[same:]
        s.pc = int(targets[0])

    def _ret(self, i: Instruction) -> Run:
        self.plain(i)

        def run(s: Strand) -> None:
            for w, component in enumerate(s.own("bulk read")):
                if s.unread > s.clock[w, 0, component]:
                    self.machine.judge.report("store", s.place, "ends while a bulk store may still read shared memory")
            if s.groups or s.open_products:
                self.machine.judge.report("registers", s.place, "ends while a product runs")
            s.end("bulk", 0, ())
            s.done = True

        return run

    def _setmaxnreg(self, i: Instruction) -> Run:
        self.plain(i)
        return lambda s: None

    def _griddepcontrol(self, i: Instruction) -> Run:
        self.plain(i)
        if i.op == "griddepcontrol.launch_dependents":
            return lambda s: None
        if i.op != "griddepcontrol.wait":
            raise self.unknown(i)

        def run(s: Strand) -> None:
            s.clock[:, :, GRID] = 1

        return run

    def _fence(self, i: Instruction) -> Run:
        self.plain(i)
        if not re.fullmatch(r"fence\.proxy\.async(\.shared::cta|\.global)?", i.op):
            raise self.unknown(i)

        def run(s: Strand) -> None:
            np.maximum(s.clock[:, 0], s.clock[:, 1], out=s.clock[:, 1])

        return run

    def _bar(self, i: Instruction) -> Run:
        self.plain(i)
        if i.op == "bar.warp.sync" and i.operands == ("-1",):
            return lambda s: None
        if i.op not in ("bar.sync", "barrier.sync"):
            raise self.unknown(i)
        number, *count = map(self.number, i.operands)

        def run(s: Strand) -> bool:
            program = s.program
            if s.turn is None:
                if number not in program.rendezvous:
                    program.rendezvous[number] = Rendezvous(self.machine.judge, f"barrier {number} of {program.name}")
                meeting = program.rendezvous[number]
                s.turn = meeting, meeting.turn
                threads = count[0] if count else 32 * self.machine.warps
                for clock, component in zip(s.clock, s.own(), strict=True):
                    meeting.arrive(clock, component, threads, s.place)
            meeting, turn = s.turn
            if meeting.turn == turn:
                s.waiting = f"{meeting.name}: {32 * len(meeting.arrived)} of {meeting.threads} threads have come"
                return True
            s.turn = None
            return False

        return run

    _barrier = _bar

    # Memory.

    def _ld(self, i: Instruction) -> Run:
        space, *modifiers, t = i.op.split(".")[1:]
        if space == "param":
            return self.parameter(i, t)
        vector = next((int(m[1:]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
        if space not in ("shared", "global") or set(modifiers) - _LOADS - {f"v{vector}"}:
            raise self.unknown(i)
        names = [name.strip() for name in i.operands[0].strip("{} ").split(",")]
        rows = [self.row(name) for name in names]
        where = self.address(i.operands[1], "u32" if space == "shared" else "u64")
        mask, size, dtype = self.mask(i), bits(t) // 8, TYPES[t]
        access = self.shared_access if space == "shared" else self.global_access
        if len(rows) != vector:
            raise self.unknown(i)

        def run(s: Strand) -> None:
            lanes = mask(s)
            if not lanes.any():
                return
            found = access(s, where, lanes, size * vector, write=False)
            if found is None:
                return
            memory, at, chosen = found
            data = memory[at[:, None] + np.arange(size * vector)].view(dtype)
            for k, (width, row) in enumerate(rows):
                column = data[:, k]
                target = s.v[width if size < 2 or width != f"b{8 * size}" else t][row]
                target[chosen] = column.astype(target.dtype) if column.dtype.itemsize == target.itemsize else column

        return run

    def parameter(self, i: Instruction, t: str) -> Run:
        self.plain(i)
        width, row = self.row(i.operands[0])
        name = i.operands[1].strip("[] ")
        if name not in self.parameters or bits(t) > bits(width):
            raise self.unknown(i)
        value = self.values[self.parameters[name]] & (1 << bits(t)) - 1
        if t[0] == "s" and value >> bits(t) - 1:
            value -= 1 << bits(t)
        constant = self.constant(width, value)

        def run(s: Strand) -> None:
            s.v[width][row] = s.v[width][constant]

        return run

    def _st(self, i: Instruction) -> Run:
        space, *modifiers, t = i.op.split(".")[1:]
        vector = next((int(m[1:]) for m in modifiers if m in ("v2", "v4", "v8")), 1)
        if space not in ("shared", "global") or set(modifiers) - _LOADS - {f"v{vector}"}:
            raise self.unknown(i)
        where = self.address(i.operands[0], "u32" if space == "shared" else "u64")
        width, rows = t if bits(t) > 8 else "b16", self.listed(i.operands[1], t)
        mask, size = self.mask(i), bits(t) // 8
        access = self.shared_access if space == "shared" else self.global_access
        if len(rows) != vector:
            raise self.unknown(i)

        def run(s: Strand) -> None:
            lanes = mask(s)
            if not lanes.any():
                return
            found = access(s, where, lanes, size * vector, write=True)
            if found is None:
                return
            memory, at, chosen = found
            data = np.stack([s.v[width][row] for row in rows], 1)[chosen].astype(TYPES[t], copy=False)
            memory[at[:, None] + np.arange(size * vector)] = np.ascontiguousarray(data).view(np.uint8)

        return run

    def shared_access(self, s: Strand, where: tuple[str, int, int], lanes: Array, size: int, write: bool) -> Any:
        """Shared memory, the places and the lanes of an access that is within it."""
        chosen = np.flatnonzero(lanes)
        at = s.v["u32"][where[1]][chosen].astype(np.int64) + where[2]
        if not self.within_shared(s, at, size):
            return None
        self.judge_shared(s, at, chosen, size, write)
        return s.program.memory, at, chosen

    def judge_shared(self, s: Strand, at: Array, chosen: Array, size: int, write: bool) -> None:
        shadow, seen = s.program.shadow, s.clock[:, 0]
        granules = (at[:, None] // GRANULE) + np.arange(max(size // GRANULE, 1))
        warp = s.warp[chosen]
        shadow.after_writes(granules, seen, warp, s.place, "writes" if write else "reads", seen)
        own = s.own()
        if write:
            shadow.after_reads(granules, seen, warp, s.place, "writes")
            components = own[warp]
            shadow.write(granules, components, seen[warp, components])
        else:
            for w in range(s.warps):
                shadow.read(granules[warp[:, 0] == w], (int(own[w]),), int(seen[w, own[w]]))

    def within_shared(self, s: Strand, at: Array, size: int) -> bool:
        fits = at.min() >= SHARED and at.max() + size <= len(s.program.memory)
        if not fits or (at % size).any():
            text = (
                f"{size} bytes at {int(at.min()) - SHARED:+d} of shared memory: outside, or not a multiple of the size"
            )
            self.machine.judge.report("bounds", s.place, text)
            return False
        return True

    def global_access(self, s: Strand, where: tuple[str, int, int], lanes: Array, size: int, write: bool) -> Any:
        """A region's bytes, the places and the lanes of an access that is within it."""
        chosen = np.flatnonzero(lanes)
        addresses = s.v["u64"][where[1]][chosen] + np.uint64(where[2] & 2**64 - 1)
        found = self.machine.memory.region(addresses)
        if found is None:
            self.machine.judge.report("bounds", s.place, "an address in no tensor")
            return None
        region, at = found
        inside = (at >= 0) & (at + size <= len(region.bytes)) & (at % size == region.base % size)
        inside[inside] = region.covered[at[inside, None] + np.arange(size)].all(1)
        if not inside.all():
            lane = int(np.argmin(inside))
            self.machine.judge.report("bounds", s.place, f"{size} bytes outside {region.name}, at its byte {at[lane]}")
            chosen, at = chosen[inside], at[inside]
        shadow, seen = self.machine.shadows[self.machine.memory.regions.index(region)], s.clock[:, 0]
        units = at[:, None] // region.unit + np.arange(max(size // region.unit, 1))
        warp = s.warp[chosen]
        shadow.after_writes(units, seen, warp, s.place, "writes" if write else "reads", seen)
        own = s.own()
        if write:
            shadow.after_reads(units, seen, warp, s.place, "writes")
            shadow.write(units, own[warp], seen[warp, own[warp]])
        else:
            for w in range(s.warps):
                shadow.read(units[warp[:, 0] == w], (int(own[w]),), int(seen[w, own[w]]))
        return region.bytes, at, chosen

    def _atom(self, i: Instruction) -> Run:
        space, *modifiers = i.op.split(".")[1:]
        semantics = {"acq_rel", "acquire", "release", "relaxed"} & set(modifiers)
        scope = {"cta", "cluster", "gpu", "sys"} & set(modifiers)
        rest = [m for m in modifiers if m not in semantics | scope]
        if space != "global" or rest not in (["add", "u32"], ["add", "s32"]) or len(semantics) != 1 or len(scope) != 1:
            raise self.unknown(i)
        (order,), wide = semantics, bool(scope & {"gpu", "sys"})
        (_, into), where, (_, by) = (
            self.operand(i.operands[0], "u32"),
            self.address(i.operands[1], "u64"),
            None or self.operand(i.operands[2], "u32"),
        )
        mask = self.mask(i)

        def run(s: Strand) -> None:
            for lane in np.flatnonzero(mask(s)):
                w = lane // 32
                address = int(s.v["u64"][where[1]][lane]) + where[2]
                found = self.machine.memory.region(np.array([address], np.uint64))
                if found is None or found[1][0] + 4 > len(found[0].bytes) or not found[0].covered[found[1][0]]:
                    self.machine.judge.report("bounds", s.place, "updates an address in no tensor")
                    continue
                region, at = found
                shadow = self.machine.shadows[self.machine.memory.regions.index(region)]
                units, clock = at // region.unit, s.clock[w : w + 1]
                if shadow.updated is None:
                    shadow.updated = np.zeros(len(shadow.writer), bool)
                known = self.machine.updates.setdefault(address, np.zeros_like(clock[0]))
                if wide and order in ("acq_rel", "acquire"):
                    np.maximum(clock[0], known, out=clock[0])
                if not (wide and shadow.updated[units].all()):
                    shadow.after_writes(units, clock[:, 0], 0, s.place, "updates", clock[:, 0])
                shadow.after_reads(units, clock[:, 0], 0, s.place, "updates")
                own = int(s.own()[w])
                shadow.write(units, own, int(clock[0, 0, own]))
                shadow.updated[units] = wide
                if wide and order in ("acq_rel", "release"):
                    np.maximum(known, clock[0], out=known)
                clock[0, 0, own] += 1
                word = region.bytes[int(at[0]) : int(at[0]) + 4].view(np.uint32)
                s.v["u32"][into][lane] = word[0]
                word[0] += s.v["u32"][by][lane]

        return run

    # Barriers in shared memory.

    def _mbarrier(self, i: Instruction) -> Run:
        parts = i.op.split(".")
        what = ".".join(part for part in parts[1:] if part not in ("shared::cta", "shared", "b64"))
        if what == "init":
            return self.make_barrier(i)
        if what == "inval":
            where, mask = self.address(i.operands[0], "u32"), self.mask(i)

            def invalidate(s: Strand) -> None:
                for lane in np.flatnonzero(mask(s)):
                    address = int(s.v["u32"][where[1]][lane]) + where[2]
                    s.program.retired[address] = s.program.barriers.pop(address)

            return invalidate
        if what in ("arrive", "arrive.expect_tx"):
            return self.arrival(i, what)
        if what == "try_wait.parity":
            return self.wait(i)
        raise self.unknown(i)

    def make_barrier(self, i: Instruction) -> Run:
        where, mask, (_, count) = self.address(i.operands[0], "u32"), self.mask(i), self.operand(i.operands[1], "u32")

        def run(s: Strand) -> None:
            for lane in np.flatnonzero(mask(s)):
                at = s.v["u32"][where[1]][lane : lane + 1].astype(np.int64) + where[2]
                if not self.within_shared(s, at, 8):
                    continue
                self.judge_shared(s, at, np.array([lane]), 8, True)
                address, program = int(at[0]), s.program
                if address in program.barriers:
                    self.machine.judge.report("count", s.place, f"makes the barrier at {address - SHARED:+d} again")
                old = program.retired.get(address)
                loads, base = (old.loads, old.base + old.current + 2) if old else (program.spare.pop(), 0)
                name = f"the barrier at {address - SHARED:+d} of {program.name}"
                program.barriers[address] = Barrier(self.machine.judge, name, int(s.v["u32"][count][lane]), loads, base)

        return run

    def at_barrier(self, s: Strand, address: int, warp: int, verb: str) -> Barrier:
        """The barrier at an address, made before this warp comes to it. No proxy fence is asked for: Triton has none."""
        barrier = s.program.barriers.get(address)
        if barrier is None:
            raise Unknown(f"{s.place}: {verb} at {address - SHARED:+d}, where there is no barrier")
        granules = np.arange(address // GRANULE, address // GRANULE + 4)
        clock = s.clock[warp : warp + 1]
        s.program.shadow.after_writes(granules, clock[:, 0], 0, s.place, verb, clock[:, 0])
        return barrier

    def arrival(self, i: Instruction, what: str) -> Run:
        if i.operands[0] != "_" or len(i.operands) > 3:
            raise self.unknown(i)
        where, mask = self.address(i.operands[1], "u32"), self.mask(i)
        (_, number) = self.operand(i.operands[2] if len(i.operands) == 3 else "1", "u32")

        def run(s: Strand) -> None:
            for lane in np.flatnonzero(mask(s)):
                w, value = lane // 32, int(s.v["u32"][number][lane])
                address = int(s.v["u32"][where[1]][lane]) + where[2]
                barrier = self.at_barrier(s, address, w, "arrives")
                expected, count = (value, 1) if what == "arrive.expect_tx" else (0, value)
                barrier.arrive(s.clock[w], int(s.own()[w]), s.place, expected, count)

        return run

    def wait(self, i: Instruction) -> Run:
        self.plain(i)
        (_, done), where = self.operand(i.operands[0], "pred"), self.address(i.operands[1], "u32")
        _, parity = self.operand(i.operands[2], "u32")

        def run(s: Strand) -> bool:
            addresses, parities = s.v["u32"][where[1]], s.v["u32"][parity]
            if (addresses != addresses[0]).any() or (parities != parities[0]).any():
                raise self.unknown(i, "at several barriers or phases is unknown")
            barrier = self.at_barrier(s, int(addresses[0]) + where[2], 0, "waits")
            targets = [barrier.target(clock, int(parities[0])) for clock in s.clock]
            if not all(map(barrier.passed, targets)):
                phase = barrier.phase
                s.waiting = (
                    f"phase {max(targets)} of {barrier.name}: phase {barrier.current} lacks {phase.pending} arrivals"
                )
                s.waiting += f" and {phase.expected - phase.landed} bytes"
                return True
            for clock, component, target in zip(s.clock, s.own(), targets, strict=True):
                barrier.wait(clock, int(component), target, s.place)
            s.v["pred"][done] = True
            return False

        return run
