"""What works on whole matrices, most of it while its warps go on: products, tensor copies, matrices of fragments."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Array
from .machine import GRANULE, Machine, Product, Strand
from .memory import SHARED, TensorMap, numbers, operand, swizzled
from .ptx import Instruction, Unknown

Run = Callable[[Strand], "bool | None"]
_WORDS = {2: np.uint16, 4: np.uint32}


@functools.lru_cache(maxsize=64)
def fragment(n: int) -> tuple[Array, Array]:
    """Row and column, [registers, 128 lanes], of each value of a wgmma's sums [64, n]."""
    i, lane = np.arange(n // 2)[:, None], np.arange(128)[None, :]
    return lane // 32 * 16 + lane % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


@functools.lru_cache(maxsize=4096)
def granules(descriptor: int, rows: int, size: int, mn_major: bool) -> Array:
    return np.unique(operand(descriptor, rows, size, mn_major) // GRANULE)


class Asynchronous:
    """The part of the decoder for these. What it needs of the rest is declared here."""

    machine: Machine
    unknown: Callable[..., Unknown]
    plain: Callable[[Instruction], None]
    operand: Callable[[str, str], tuple[str, int]]
    address: Callable[[str, str], tuple[str, int, int]]
    listed: Callable[[str, str], list[int]]
    mask: Callable[[Instruction], Callable[[Strand], Array]]
    number: Callable[[str], int]
    judge_shared: Callable[..., None]
    within_shared: Callable[..., bool]
    shared_access: Callable[..., Any]
    global_access: Callable[..., Any]
    at_barrier: Callable[..., Any]

    # Products.

    def _wgmma(self, i: Instruction) -> Run:
        self.plain(i)
        what = i.op.removeprefix("wgmma.").removesuffix(".sync.aligned")
        if what == "fence":
            return lambda s: s.unfenced.clear()
        if what == "commit_group":

            def commit(s: Strand) -> None:
                s.groups.append(s.open_products)
                s.open_products, s.committed = [], s.committed + 1

            return commit
        if what == "wait_group":
            left = self.number(i.operands[0])
            return lambda s: s.retire(left)
        return self.product(i)

    def product(self, i: Instruction) -> Run:
        match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", i.op)
        if match is None or match[3] != match[4]:
            raise self.unknown(i)
        n, k, kind = int(match[1]), int(match[2]), match[3]
        size = {"f16": 2, "bf16": 2, "tf32": 4}.get(kind)
        if size is None or k * size != 32:
            raise self.unknown(i)
        sums, a, b, use, *immediates = i.operands
        from_registers = a.startswith("{")
        if immediates[:2] != ["1", "1"] or len(immediates) != (2 if size == 4 else 3 if from_registers else 4):
            raise self.unknown(i)
        major = [text == "1" for text in immediates[2:]] or [False, False]
        a_major, b_major = (False, major[0]) if from_registers else (major[0], major[1])
        d = self.listed(sums, "f32")
        a_rows = self.listed(a, "b32") if from_registers else []
        if len(d) != n // 2 or (from_registers and len(a_rows) != 4):
            raise self.unknown(i)
        a_row = 0 if from_registers else self.operand(a, "u64")[1]
        b_row, use_row = self.operand(b, "u64")[1], self.operand(use, "pred")[1]
        of_sums, of_factors = frozenset(d), frozenset(a_rows)
        rows, columns = fragment(n)
        registers = slice(d[0], d[-1] + 1) if d == list(range(d[0], d[0] + len(d))) else np.array(d)
        a_places = self.places(a_rows, k)

        def run(s: Strand) -> None:
            if s.first % 4 or s.warps % 4:
                raise self.unknown(i, "of warps that have parted is unknown")
            self.judge_registers(s, of_sums, of_factors, i.op)
            work = []
            for first in range(0, s.warps, 4):
                lanes = slice(32 * first, 32 * first + 128)
                v = {t: s.v[t][:, lanes] for t in ("f32", "u16", "u32", "u64", "pred")}
                descriptors = [(b_row, n, b_major)] if from_registers else [(a_row, 64, a_major), (b_row, n, b_major)]
                found = []
                for row, extent, mn_major in descriptors:
                    values = v["u64"][row]
                    if (values != values[0]).any():
                        raise self.unknown(i, "with a descriptor that differs between lanes is unknown")
                    found.append((int(values[0]), extent, size, mn_major))
                for key in found:
                    self.judge_operand(s, first, granules(*key))
                add = v["pred"][use_row]
                if (add != add[0]).any():
                    raise self.unknown(i, "of which some lanes add is unknown")
                work.append((v, found, bool(add[0])))

            def multiply() -> None:
                for v, found, add in work:
                    words = s.program.memory.view(_WORDS[size])
                    values = [numbers(words[operand(*key) // size][..., None], kind) for key in found]
                    if from_registers:
                        raw = v["u32"][a_rows] if size == 4 else v["u32"][a_rows].view(np.uint16).reshape(4, 128, 2)
                        values.insert(0, numbers(raw[a_places][..., None], kind))
                    total = (values[0] @ values[1].T)[rows, columns]
                    if add:
                        total += v["f32"][registers]
                    v["f32"][registers] = total

            product = Product(of_sums, of_factors, i.op, multiply)
            s.sums |= of_sums
            s.factors |= of_factors
            if self.machine.rng is None:
                multiply()
                product = product._replace(multiply=lambda: None)
            s.open_products.append(product)

        return run

    @staticmethod
    def places(a_rows: list[int], k: int) -> tuple[Array, ...]:
        """Where A [64, k] is in its four registers: by register, lane and, of 16 bits, half."""
        row, column = np.arange(64)[:, None], np.arange(k)[None, :]
        if k == 8:  # one value a register
            return row // 8 % 2 + column // 4 * 2, row // 16 * 32 + row % 8 * 4 + column % 4
        lane = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
        return row // 8 % 2 + column // 8 * 2, lane, column % 2 + 0 * row

    def judge_registers(self, s: Strand, sums: frozenset[int], factors: frozenset[int], shape: str) -> None:
        judge = self.machine.judge
        if not s.sums.isdisjoint(factors):
            judge.report("registers", s.place, "multiplies sums of a product that may still run")
        for other in s.running():
            alike = other.sums is sums or (other.sums, other.shape) == (sums, shape)
            if not (alike or other.sums.isdisjoint(sums)) or not other.factors.isdisjoint(sums):
                judge.report("registers", s.place, "adds to registers of a product that may still run")
        if not (s.unfenced.isdisjoint(sums) and s.unfenced.isdisjoint(factors)):
            judge.report("fence", s.place, "multiplies registers that were written since the last wgmma.fence")

    def judge_operand(self, s: Strand, first: int, at: Array) -> None:
        """Four warps read an operand from now on until they have waited for the group."""
        shadow, clock = s.program.shadow, s.clock[first : first + 4]
        if at[0] * GRANULE < SHARED or at[-1] >= len(s.program.memory) // GRANULE:
            raise Unknown(f"{s.place}: an operand outside shared memory")
        seen, plain = clock[:, 1].min(0)[None], clock[:, 0].min(0)[None]
        shadow.after_writes(at, seen, 0, s.place, "multiplies", plain)
        shadow.read(at, tuple(s.own("product")[first : first + 4].tolist()), s.committed + 1)

    def _mma(self, i: Instruction) -> Run:
        self.plain(i)
        match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.(\w+)\.f32", i.op)
        if (
            match is None
            or match[2] != match[3]
            or (match[1], match[2]) not in (("16", "f16"), ("16", "bf16"), ("8", "tf32"))
        ):
            raise self.unknown(i)
        k, kind = int(match[1]), match[2]
        d, a, b, c = (self.listed(text, "b32") for text in i.operands)
        group = np.arange(32)
        row, column = group // 4, group % 4

        def matrix(v: Array, rows: list[int], turned: bool) -> Array:
            """[warps, 8 or 16, k] of fragments: registers alternate rows 0 and 8 of A, then columns."""
            words = v[rows].reshape(len(rows), -1, 32)
            values = numbers(
                np.ascontiguousarray(words[..., None])
                if k == 8
                else np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)[..., None],
                kind,
            )
            values = values[..., None] if values.ndim == 3 else values
            out = np.zeros((words.shape[1], 8 if turned else 16, k), np.float32)
            each = values.shape[-1]
            for number in range(len(rows)):
                down, across = (0, number) if turned else (number % 2 * 8, number // 2)
                for e in range(each):
                    out[:, row + down, column * each + e + across * (k // 2)] = values[number, ..., e]
            return out

        def run(s: Strand) -> None:
            v = s.v["u32"]
            total = matrix(v, a, False) @ matrix(v, b, True).transpose(0, 2, 1)
            for number in range(4):
                part = total[:, row + number // 2 * 8, column * 2 + number % 2].reshape(-1)
                s.v["f32"][d[number]] = part + s.v["f32"][c[number]]

        return run

    # Fragments.

    def _ldmatrix(self, i: Instruction) -> Run:
        return self.matrices(i, i.operands[1], i.operands[0], store=False)

    def _stmatrix(self, i: Instruction) -> Run:
        return self.matrices(i, i.operands[0], i.operands[1], store=True)

    def matrices(self, i: Instruction, address: str, registers: str, store: bool) -> Run:
        """8x8 matrices of 16-bit values: lane 8j + r has the address of row r of matrix j, and two values of each."""
        self.plain(i)
        match = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", i.op)
        if match is None:
            raise self.unknown(i)
        count, turned = int(match[1]), match[2] is not None
        where, rows = self.address(address, "u32"), self.listed(registers, "b32")
        lane = np.arange(32)

        def run(s: Strand) -> None:
            lanes = s.all.reshape(-1, 32).copy()
            lanes[:, 8 * count :] = False
            found = self.shared_access(s, where, lanes.reshape(-1), 16, write=store)
            if found is None:
                return
            memory, at, _ = found
            places = at.reshape(s.warps, count, 8)[..., None] + np.arange(0, 16, 2)
            places = (places.swapaxes(2, 3) if turned else places) // 2  # [warps, matrices, row, column]
            values = memory.view(np.uint16)
            mine = places.reshape(s.warps, count, 32, 2)
            for number, row in enumerate(rows):
                words = s.v["b32"][row].reshape(s.warps, 32)
                if store:
                    values[mine[:, number, lane, 0]] = words & 0xFFFF
                    values[mine[:, number, lane, 1]] = words >> 16
                else:
                    pair = values[mine[:, number]].astype(np.uint32)
                    s.v["b32"][row] = (pair[..., 0] | pair[..., 1] << np.uint32(16)).reshape(-1)

        return run

    # Copies.

    def _cp(self, i: Instruction) -> Run:
        what = i.op.removeprefix("cp.async.")
        load = r"bulk\.tensor\.([1-5])d\.shared::(?:cta|cluster)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes"
        if match := re.fullmatch(load, what):
            return self.tensor_load(i, int(match[1]))
        if match := re.fullmatch(r"bulk\.tensor\.([1-5])d\.global\.shared::cta(?:\.tile)?\.bulk_group", what):
            return self.tensor_store(i, int(match[1]))
        if re.fullmatch(r"c[ag]\.shared\.global", what):
            return self.copy(i)
        self.plain(i)
        kind = "bulk" if what.startswith("bulk.") else "copy"
        if what in ("bulk.commit_group", "commit_group"):
            return lambda s: s.close(kind)
        if what in ("bulk.wait_group", "bulk.wait_group.read", "wait_group", "wait_all"):
            left = self.number(i.operands[0]) if i.operands else 0
            parts = (
                ("copy",)
                if kind == "copy"
                else ("bulk read",)
                if what.endswith("read")
                else ("bulk read", "bulk store")
            )
            return lambda s: s.end(kind, left, parts)
        raise self.unknown(i)

    def tensor(
        self, i: Instruction, text: str, rank: int
    ) -> Callable[[Strand, int], tuple[TensorMap, tuple[int, ...]]]:
        """Of "[map, {x, y, ...}]", the map and the coordinates, outermost first, that a lane asks for."""
        match = re.fullmatch(r"\[\s*(%\w+)\s*,\s*(\{[^}]*\})\s*\]", text)
        if match is None:
            raise self.unknown(i)
        (_, row), coordinates = self.operand(match[1], "u64"), self.listed(match[2], "s32")

        def find(s: Strand, lane: int) -> tuple[TensorMap, tuple[int, ...]]:
            map_ = self.machine.maps.get(int(s.v["u64"][row][lane]))
            if map_ is None or len(map_.box) != rank or len(coordinates) != rank:
                raise Unknown(f"{s.place}: no tensor map of rank {rank}")
            return map_, tuple(int(s.v["s32"][c][lane]) for c in reversed(coordinates))

        return find

    def box(self, s: Strand, map_: TensorMap, start: int) -> slice | None:
        """The granules of shared memory that a box takes."""
        if start % 128 or start < SHARED or start + map_.bytes > len(s.program.memory):
            text = f"a box of {map_.bytes} bytes at {start - SHARED:+d}: outside, or not a multiple of 128"
            self.machine.judge.report("bounds", s.place, text)
            return None
        return slice(start // GRANULE, (start + map_.bytes) // GRANULE)

    def tensor_load(self, i: Instruction, rank: int) -> Run:
        into, source, at_barrier = i.operands
        where, barrier_at = self.address(into, "u32"), self.address(at_barrier, "u32")
        find, mask = self.tensor(i, source, rank), self.mask(i)

        def run(s: Strand) -> None:
            for lane in np.flatnonzero(mask(s)):
                w = lane // 32
                map_, coordinates = find(s, lane)
                start = int(s.v["u32"][where[1]][lane]) + where[2]
                at = self.box(s, map_, start)
                if at is None:
                    continue
                places, inside = map_.place(coordinates)
                clock, shadow = s.clock[w : w + 1], s.program.shadow
                barrier = self.at_barrier(s, int(s.v["u32"][barrier_at[1]][lane]) + barrier_at[2], w, "loads")
                shadow.after_writes(at, clock[:, 1], 0, s.place, "loads into", clock[:, 0])
                shadow.after_reads(at, clock[:, 0], 0, s.place, "loads into")
                number = barrier.issue(s.clock[w], map_.bytes, s.place)
                value = barrier.base + number + 1
                shadow.write(at, barrier.loads, value)
                self.judge_region(s, map_, places[inside], clock, (barrier.loads,), value, write=False)
                load = functools.partial(self.land, s, map_, start, places, inside, barrier, number)
                if self.machine.rng is None:
                    load()
                else:
                    s.program.loads.append(load)

        return run

    @staticmethod
    def land(s: Strand, map_: TensorMap, start: int, places: Array, inside: Array, barrier: Any, number: int) -> None:
        data = np.zeros((len(places), map_.size), np.uint8)
        data[inside] = map_.region.bytes[places[inside, None] + np.arange(map_.size)]
        chunk = min(16, map_.box[-1] * map_.size)
        at = swizzled(start + map_.chunks, map_.swizzle)
        s.program.memory[at[:, None] + np.arange(chunk)] = data.reshape(-1, chunk)
        barrier.land(number, map_.bytes)

    def tensor_store(self, i: Instruction, rank: int) -> Run:
        into, source = i.operands
        where, find, mask = self.address(source, "u32"), self.tensor(i, into, rank), self.mask(i)

        def run(s: Strand) -> None:
            for lane in np.flatnonzero(mask(s)):
                w = lane // 32
                map_, coordinates = find(s, lane)
                start = int(s.v["u32"][where[1]][lane]) + where[2]
                at = self.box(s, map_, start)
                if at is None:
                    continue
                places, inside = map_.place(coordinates)
                clock, shadow, group = s.clock[w : w + 1], s.program.shadow, s.closed["bulk"] + 1
                shadow.after_writes(at, clock[:, 1], 0, s.place, "stores", clock[:, 0])
                shadow.read(at, (int(s.own("bulk read")[w]),), group)
                s.unread = group
                own = (int(s.own("bulk store")[w]),)
                self.judge_region(s, map_, places[inside], clock, own, group, write=True)
                s.issue("bulk", functools.partial(self.leave, s, map_, start, places, inside))

        return run

    @staticmethod
    def leave(s: Strand, map_: TensorMap, start: int, places: Array, inside: Array) -> None:
        chunk = min(16, map_.box[-1] * map_.size)
        at = swizzled(start + map_.chunks, map_.swizzle)
        data = s.program.memory[at[:, None] + np.arange(chunk)].reshape(-1, map_.size)
        map_.region.bytes[places[inside, None] + np.arange(map_.size)] = data[inside]

    def judge_region(
        self, s: Strand, map_: TensorMap, places: Array, clock: Array, own: tuple[int], value: int, write: bool
    ) -> None:
        """A box's elements in global memory."""
        if not len(places):
            return
        region = map_.region
        if places.min() < 0 or places.max() + map_.size > len(region.bytes) or not region.covered[places].all():
            self.machine.judge.report("bounds", s.place, f"a box reaches outside {region.name}")
            raise Unknown(f"{s.place}: a tensor map that is larger than its tensor")
        shadow = self.machine.shadows[self.machine.memory.regions.index(region)]
        units = places // region.unit
        if map_.size > region.unit:
            units = (units[:, None] + np.arange(map_.size // region.unit)).reshape(-1)
        shadow.after_writes(units, clock[:, 1], 0, s.place, "stores into" if write else "loads", clock[:, 0])
        if write:
            shadow.after_reads(units, clock[:, 0], 0, s.place, "stores into")
            shadow.write(units, own[0], value)
        else:
            shadow.read(units, own, value)

    def copy(self, i: Instruction) -> Run:
        """cp.async: some bytes for each lane, zeros behind those that it is to read."""
        size = self.number(i.operands[2])
        where, source, mask = self.address(i.operands[0], "u32"), self.address(i.operands[1], "u64"), self.mask(i)
        length = self.operand(i.operands[3] if len(i.operands) > 3 else str(size), "u32")[1]

        def run(s: Strand) -> None:
            lanes = mask(s)
            chosen = np.flatnonzero(lanes)
            if not len(chosen):
                return
            at = s.v["u32"][where[1]][chosen].astype(np.int64) + where[2]
            if not self.within_shared(s, at, size):
                return
            shadow, seen, warp = s.program.shadow, s.clock[:, 0], s.warp[chosen]
            units = at[:, None] // GRANULE + np.arange(size // GRANULE)
            shadow.after_writes(units, seen, warp, s.place, "copies into", seen)
            shadow.after_reads(units, seen, warp, s.place, "copies into")
            shadow.write(units, s.own("copy")[warp], s.closed["copy"] + 1)
            taken = s.v["u32"][length][chosen]
            if not np.isin(taken, (0, size)).all():
                raise self.unknown(i, "of a part is unknown")
            data = np.zeros((len(chosen), size), np.uint8)
            reads = np.zeros(len(lanes), bool)
            reads[chosen] = taken > 0
            found = self.global_access(s, source, reads, size, write=False) if reads.any() else None
            if found is not None:
                memory, places, loaded = found
                data[np.searchsorted(chosen, loaded)] = memory[places[:, None] + np.arange(size)]

            def arrive() -> None:
                s.program.memory[at[:, None] + np.arange(size)] = data

            s.issue("copy", arrive)

        return run
