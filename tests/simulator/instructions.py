"""What instructions do to a strand. A function takes the opcodes that its pattern matches, and the pattern's groups."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import TABLE, TYPES, Array, Operation
from .judge import GRID, Agent
from .machine import Machine, Product, Row, Step, Strand, region
from .memory import SHARED, TensorMap, numbers, operand, words_of
from .ptx import Instruction, Kernel, Unknown

MAPS = 1 << 20
"""Address of the first parameter, which a tensor map is known by; the others follow."""
_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
_NO_RESULT = ("st", "cp", "mbarrier", "bar", "barrier", "bra", "brx", "ret", "fence", "wgmma", "setmaxnreg", "stmatrix")


class Address(NamedTuple):
    """`[base + offset]`, or a tensor map's and a box's coordinates, innermost first."""

    base: Any
    offset: int
    coordinates: list[Any]


class Decoded(NamedTuple):
    text: Instruction
    args: list[Any]
    guard: Any

    def mask(self, s: Strand) -> Array:
        if self.guard is None:
            return s.all
        return s.get(self.guard, "pred") ^ self.text.negated


HANDLERS: list[tuple[re.Pattern[str], Callable[..., bool | None], bool]] = []


def does(pattern: str, *, guarded: bool = False) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        HANDLERS.append((re.compile(pattern), function, guarded))
        return function

    return register


class Decoder:
    def __init__(self, kernel: Kernel, machine: Machine) -> None:
        self.kernel, self.machine = kernel, machine
        self.rows: dict[str, Row] = {}
        of_products = [i.operands[0] + i.operands[1] for i in kernel.code if "mma_async" in i.op]
        self.products = set(re.findall(r"%r\d+", " ".join(of_products)))
        for name in _SPECIAL:
            self.row(name, 32)
        machine.steps[:] = [self.step(i) for i in kernel.code]

    def row(self, name: str, width: int) -> Row:
        if name not in self.rows:
            number = self.machine.registers[width] = self.machine.registers.get(width, 0) + 1
            self.rows[name] = Row(width, number - 1)
        return self.rows[name]

    def step(self, i: Instruction) -> Step:
        name = i.op.partition(".")[0]
        used = [{self.resolve(r).number for r in re.findall(r"%r\d+", o) if r in self.products} for o in i.operands]
        results = 0 if name in _NO_RESULT else 1
        reads = set() if name == "wgmma" else set().union(*used[results:])
        decoded = Decoded(i, [self.resolve(o) for o in i.operands], i.guard and self.resolve(i.guard))
        return Step(self.find(decoded), i, frozenset(reads), frozenset(set().union(*used[:results])))

    def find(self, i: Decoded) -> Callable[[Strand], bool | None]:
        for pattern, function, guarded in HANDLERS:
            match = pattern.fullmatch(i.text.op)
            if match and (guarded or i.guard is None):
                return functools.partial(function, i=i, **match.groupdict())
        operation = TABLE.get(i.text.op)
        if operation is None or len(i.args) != 1 + len(operation.sources):
            raise Unknown(f"{self.kernel.name}, line {i.text.line}: {i.text}")
        return functools.partial(compute, i=i, operation=operation)

    def resolve(self, text: str) -> Any:
        """An operand: a register, a number, an address, a place in the code, or a list of such."""
        text = text.strip()
        kernel, name = self.kernel, text.rstrip("0123456789")
        declared = kernel.registers.get(text) or (kernel.registers.get(name) if text.startswith("%") else None)
        if declared or text in _SPECIAL:
            return self.row(text, 1 if declared == "pred" else int(declared[1:]) if declared else 32)
        if text[0] == "[":
            base, _, rest = text[1:-1].partition("," if "{" in text else "+")
            coordinates = self.resolve(rest) if "{" in text else []
            return Address(self.resolve(base), 0 if "{" in text else int(rest or 0), coordinates)
        if text[0] == "{" or "|" in text:
            return [self.resolve(part) for part in re.split("[,|]", text.strip("{}"))]
        if text in kernel.tables:
            return np.array([kernel.labels[label] for label in kernel.tables[text]])
        if text in kernel.labels:
            return kernel.labels[text]
        if text in kernel.parameters:
            return MAPS + list(kernel.parameters).index(text)
        if text == "_" or text == kernel.shared:
            return None if text == "_" else SHARED
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+U?", text):
            return int(text.rstrip("U"), 0)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return int(text[2:], 16)
        raise Unknown(f"{kernel.name}: operand {text}")


def compute(s: Strand, i: Decoded, operation: Operation) -> None:
    values = [s.get(x, t) for x, t in zip(i.args[1:], operation.sources, strict=True)]
    result = operation.compute(*values)
    if i.guard is None:
        s.put(i.args[0], operation.result, result)
    else:
        mask = i.mask(s)
        s.put(i.args[0], operation.result, result[mask], mask)


# Computing, beside the table.


@does(r"mov\.b(?P<width>32|64)")
def pack(s: Strand, i: Decoded, width: str) -> None:
    """Two halves of a register; or a register as it is."""
    into, source = i.args
    wide, half, size = f"b{width}", f"b{int(width) // 2}", TYPES[f"b{width}"](int(width) // 2)
    if isinstance(source, list):
        low, high = (s.get(part, half).astype(TYPES[wide]) for part in source)
        s.put(into, wide, low | high << size)
    elif isinstance(into, list):
        word = s.get(source, wide).copy()
        for number, part in enumerate(into):
            if part is not None:
                s.put(part, half, word >> TYPES[wide](number) * size)
    else:
        s.put(into, wide, s.get(source, wide))


@does(r"setp\.(?P<how>\w+)\.f16x2")
def compare_halves(s: Strand, i: Decoded, how: str) -> None:
    halves = [s.get(x, "b32").copy().view(np.float16).reshape(-1, 2) for x in i.args[1:]]
    for into, result in zip(i.args[0], TABLE[f"setp.{how}.f16"].compute(*halves).T, strict=True):
        s.put(into, "pred", result)


@does(r"elect\.sync")
def elect(s: Strand, i: Decoded) -> None:
    s.put(i.args[0][0], "b32", 0)
    s.put(i.args[0][1], "pred", np.arange(32 * s.warps) % 32 == 0)


@does(r"shfl\.sync\.(?P<how>idx|bfly)\.b32")
def shuffle(s: Strand, i: Decoded, how: str) -> None:
    into, source, by, clamp, members = i.args
    if (clamp, members) != (31, -1):
        raise Unknown(f"{s.place}: a shuffle of some lanes")
    lane, by = np.arange(32 * s.warps), s.get(by, "u32").astype(np.int64) & 31
    s.put(into, "b32", s.get(source, "b32")[lane // 32 * 32 + (by if how == "idx" else lane % 32 ^ by)])


@does(r"redux\.sync\.(?P<how>max|min)\.(?P<t>[su]32)")
def reduce(s: Strand, i: Decoded, how: str, t: str) -> None:
    if s.uniform(i.args[2], "s32") != -1:
        raise Unknown(f"{s.place}: a reduction of some lanes")
    s.put(i.args[0], t, getattr(np, how)(s.get(i.args[1], t).reshape(-1, 32), 1).repeat(32))


# Control.


@does(r"bra(\.uni)?", guarded=True)
def branch(s: Strand, i: Decoded) -> None:
    takes = i.mask(s)
    if takes.all():
        s.pc = i.args[0]
    elif takes.any():
        s.part(np.where(takes, i.args[0], s.pc).reshape(-1, 32))


@does(r"brx\.idx")
def branch_by_index(s: Strand, i: Decoded) -> None:
    s.part(i.args[1][s.get(i.args[0], "u32")].reshape(-1, 32))


@does(r"ret")
def leave(s: Strand, i: Decoded) -> None:
    if (s.clock[:, 0, s.own("bulk read")] < s.unread).any():
        s.judge.report("store", s.place, "ends while a bulk store may still read shared memory")
    if len(s.groups) > 1 or s.groups[0]:
        s.judge.report("registers", s.place, "ends while a product runs")
    s.end("bulk", 0, ())
    s.done = True


@does(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32|griddepcontrol\.launch_dependents|bar\.warp\.sync")
def nothing(s: Strand, i: Decoded) -> None:
    """Lanes of a warp are in lockstep, and of registers there are enough."""


@does(r"griddepcontrol\.wait")
def wait_for_launch(s: Strand, i: Decoded) -> None:
    s.clock[:, :, GRID] = 1


@does(r"fence\.proxy\.async(\.shared|\.global)?")
def fence(s: Strand, i: Decoded) -> None:
    np.maximum(s.clock[:, 0], s.clock[:, 1], out=s.clock[:, 1])


@does(r"(bar|barrier)\.sync")
def meet(s: Strand, i: Decoded) -> bool:
    number, threads = (*i.args, 32 * s.machine.warps)[:2]
    if not isinstance(number, int) or not isinstance(threads, int) or threads % 32:
        raise Unknown(f"{s.place}: a barrier or a count that is not in the text")
    barrier = s.program.barriers.get(number) or s.program.barrier(number, f"barrier {number}", threads // 32)
    if s.target is None:
        s.target = barrier.current
        if threads != 32 * barrier.count:
            s.judge.report("count", s.place, f"comes to {barrier.name} of {32 * barrier.count} threads with {threads}")
        for clock, own in zip(s.clock, s.own(), strict=True):
            barrier.arrive(clock, int(own), s.place, 0, 1)
    if s.target == barrier.current:
        s.waiting = f"{barrier.name}: {barrier.lack()}"
        return True
    np.maximum(s.clock, barrier.phases[s.target].clock, out=s.clock)
    s.target = None
    return False


# Memory.

_HINTS = r"(?:\.(?:cg|ca|cs|nc|L1::\w+|L2::evict_\w+))*"


def locate(s: Strand, address: Address, lanes: Array, space: str) -> tuple[Any, Array]:
    """The memory of some lanes' addresses, and their places in it."""
    at = s.get(address.base, "u32" if space == "shared" else "u64")[lanes].astype(np.int64) + address.offset
    if space == "shared":
        return s.program.shared, at
    memory = region(s.machine, int(at[0]))
    if memory is None:
        s.judge.report("bounds", s.place, "an address in no tensor")
    return memory, at - (memory.base if memory else 0)


def shared_at(s: Strand, address: Address, lane: int) -> int:
    return int(s.get(address.base, "u32")[lane]) + address.offset


@does(rf"(?P<way>ld|st)\.(?P<space>shared|global){_HINTS}(\.v[248])?{_HINTS}\.(?P<t>[busf]\d+)", guarded=True)
def move(s: Strand, i: Decoded, way: str, space: str, t: str) -> None:
    lanes = np.flatnonzero(i.mask(s))
    address, values = i.args if way == "st" else reversed(i.args)
    rows = values if isinstance(values, list) else [values]
    memory, at = locate(s, address, lanes, space) if len(lanes) else (None, lanes)
    if memory is None:
        return
    size = np.dtype(TYPES[t]).itemsize * len(rows)
    inside = memory.access(s.agent(lanes), at, size, "writes" if way == "st" else "reads")
    places, lanes = at[inside, None] + np.arange(size), lanes[inside]
    if way == "st":
        memory.bytes[places] = np.stack([s.get(row, t) for row in rows], 1).view(np.uint8)[lanes]
    else:
        for row, column in zip(rows, memory.bytes[places].view(TYPES[t]).T, strict=True):
            s.put(row, t, column, lanes)


@does(r"ld\.param\.(?P<t>[busf]\d+)")
def load_parameter(s: Strand, i: Decoded, t: str) -> None:
    s.put(i.args[0], t, s.get(s.machine.values[i.args[1].base - MAPS], t))


@does(
    r"atom\.global(\.(?P<scope>cta|cluster|gpu|sys)|\.(?P<order>relaxed|acquire|release|acq_rel)){2}\.add\.[us]32",
    guarded=True,
)
def add_atomically(s: Strand, i: Decoded, scope: str, order: str) -> None:
    into, address, by = i.args
    for lane in np.flatnonzero(i.mask(s)):
        w, lanes = lane // 32, np.array([lane])
        memory, at = locate(s, address, lanes, "global")
        if memory is None:
            continue
        clock, own = s.clock[w], int(s.own()[w])
        known = s.machine.updates.setdefault(int(at[0]) + memory.base, np.zeros_like(clock))
        if scope in ("gpu", "sys") and order in ("acquire", "acq_rel"):
            np.maximum(clock, known, out=clock)
        if not memory.access(s.agent(lanes), at, 4, "updates" if scope in ("gpu", "sys") else "writes").all():
            continue
        if scope in ("gpu", "sys") and order in ("release", "acq_rel"):
            np.maximum(known, clock, out=known)
        clock[0, own] += 1
        word = memory.bytes[int(at[0]) : int(at[0]) + 4].view(np.uint32)
        s.put(into, "u32", word.copy(), lanes)
        word += s.get(by, "u32")[lane]


@does(r"(?P<way>ld|st)matrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<turned>\.trans)?\.shared\.b16")
def move_matrices(s: Strand, i: Decoded, way: str, count: str, turned: str | None) -> None:
    """8x8 matrices of 16-bit values: lane 8j + r has the address of row r of matrix j, and two values of each."""
    address, rows = i.args if way == "st" else reversed(i.args)
    lanes = np.flatnonzero(np.arange(32 * s.warps) % 32 < 8 * int(count))
    memory, at = locate(s, address, lanes, "shared")
    if not memory.access(s.agent(lanes), at, 16, "writes" if way == "st" else "reads").all():
        return
    places = at.reshape(s.warps, int(count), 8)[..., None] // 2 + np.arange(8)  # [warps, matrices, row, column]
    mine = (places.swapaxes(2, 3) if turned else places).reshape(s.warps, int(count), 32, 2)
    values = memory.bytes.view(np.uint16)
    for number, row in enumerate(rows):
        if way == "st":
            values[mine[:, number]] = s.get(row, "b32").copy().view(np.uint16).reshape(s.warps, 32, 2)
        else:
            s.put(row, "b32", values[mine[:, number]].reshape(-1, 2).view(np.uint32)[:, 0])


@does(r"cp\.async\.c[ag]\.shared\.global", guarded=True)
def copy(s: Strand, i: Decoded) -> None:
    """Some bytes for each lane, zeros where it is to read none."""
    into, source, size, *rest = i.args
    lanes = np.flatnonzero(i.mask(s))
    length = s.get(rest[0] if rest else size, "u32")
    if not np.isin(length[lanes], (0, size)).all():
        raise Unknown(f"{s.place}: a copy of a part")
    if not len(lanes):
        return
    shared, at = locate(s, into, lanes, "shared")
    epochs = [((int(c),), s.closed["copy"] + 1) for c in s.own("copy")]
    inside = shared.access(s.agent(lanes, epochs), at, size, "copies into")
    data, reads = np.zeros((32 * s.warps, size), np.uint8), lanes[length[lanes] > 0]
    memory, places = locate(s, source, reads, "global") if len(reads) else (None, None)
    if memory is not None:
        there = memory.access(s.agent(reads, epochs), places, size, "reads")
        data[reads[there]] = memory.bytes[places[there, None] + np.arange(size)]
    at, data = at[inside, None] + np.arange(size), data[lanes[inside]]
    s.issue("copy", lambda: shared.bytes.__setitem__(at, data))


@does(r"cp\.async\.(?P<bulk>bulk\.)?commit_group")
def close_group(s: Strand, i: Decoded, bulk: str | None) -> None:
    kind = "bulk" if bulk else "copy"
    s.late[kind].append([])
    s.closed[kind] += 1


@does(r"cp\.async\.(?P<bulk>bulk\.)?wait_group(?P<read>\.read)?")
def wait_for_groups(s: Strand, i: Decoded, bulk: str | None, read: str | None) -> None:
    kind = "bulk" if bulk else "copy"
    s.end(kind, i.args[0], ("bulk read",) if read else ("bulk read", "bulk store") if bulk else ("copy",))


# Tensor copies and the barriers that they complete on.


def barrier_at(s: Strand, address: int, w: int, verb: str) -> Any:
    """The barrier at an address, made before this warp comes to it. No proxy fence is asked for: Triton has none."""
    if address not in s.program.barriers:
        raise Unknown(f"{s.place}: {verb} at {address - SHARED:+d}, where there is no barrier")
    lanes = np.array([32 * w])
    s.program.shared.access(s.agent(lanes), np.array([address]), 8, verb)
    return s.program.barriers[address]


@does(r"mbarrier\.(?P<what>init|inval)\.shared\.b64", guarded=True)
def make_or_end_barrier(s: Strand, i: Decoded, what: str) -> None:
    for lane in np.flatnonzero(i.mask(s)):
        at, barriers = shared_at(s, i.args[0], lane), s.program.barriers
        if (at in barriers) == (what == "init"):
            raise Unknown(f"{s.place}: at {at - SHARED:+d} there is {'a' if at in barriers else 'no'} barrier")
        s.program.shared.access(s.agent(np.array([lane])), np.array([at]), 8, "writes")
        if what == "init":
            s.program.barrier(at, f"the barrier at {at - SHARED:+d}", int(s.get(i.args[1], "u32")[lane]))
        else:
            del barriers[at]


@does(r"mbarrier\.arrive(?P<expect>\.expect_tx)?\.shared\.b64", guarded=True)
def arrive(s: Strand, i: Decoded, expect: str | None) -> None:
    for lane in np.flatnonzero(i.mask(s)):
        value = int(s.get(i.args[2], "u32")[lane]) if len(i.args) > 2 else 1
        expected, count = (value, 1) if expect else (0, value)
        barrier = barrier_at(s, shared_at(s, i.args[1], lane), lane // 32, "arrives")
        barrier.arrive(s.clock[lane // 32], int(s.own()[lane // 32]), s.place, expected, count)


@does(r"mbarrier\.try_wait\.parity\.shared\.b64")
def wait(s: Strand, i: Decoded) -> bool:
    barrier = barrier_at(s, s.uniform(i.args[1].base, "u32") + i.args[1].offset, 0, "waits")
    parity = s.uniform(i.args[2], "u32")
    targets = [barrier.target(clock, parity) for clock in s.clock]
    if max(targets) >= barrier.current:
        s.waiting = f"phase {max(targets)} of {barrier.name}: {barrier.lack()}"
        return True
    for clock, own, target in zip(s.clock, s.own(), targets, strict=True):
        barrier.wait(clock, int(own), target, s.place)
    s.put(i.args[0], "pred", True)
    return False


_TENSOR = r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\."


def box(s: Strand, tensor: Address, shared: Address, lane: int, rank: str) -> tuple[TensorMap, int, Array, Array]:
    """Of a lane's copy: the map, where the box begins in shared memory, and its places in global memory."""
    found = s.machine.maps.get(int(s.get(tensor.base, "u64")[lane]))
    coordinates = [int(s.get(x, "s32")[lane]) for x in reversed(tensor.coordinates)]
    if found is None or not len(found.box) == len(coordinates) == int(rank):
        raise Unknown(f"{s.place}: no tensor map of rank {rank}")
    start = shared_at(s, shared, lane)
    if start % 128:
        raise Unknown(f"{s.place}: a box at {start - SHARED:+d}, expected a multiple of 128")
    return found, start, *found.place(coordinates)


@does(_TENSOR + r"shared(::cluster)?\.global(\.tile)?\.mbarrier::complete_tx::bytes", guarded=True)
def load_box(s: Strand, i: Decoded, rank: str) -> None:
    for lane in np.flatnonzero(i.mask(s)):
        w, shared = lane // 32, s.program.shared
        map_, start, places, inside = box(s, i.args[1], i.args[0], lane, rank)
        barrier = barrier_at(s, shared_at(s, i.args[2], lane), w, "loads")
        number = barrier.issue(s.clock[w], map_.bytes, s.place)
        epoch = (barrier.loads,), barrier.base + number + 1
        agent = Agent(s.clock[w : w + 1], [epoch], s.place, proxy=1)
        if not shared.access(agent, np.arange(start, start + map_.bytes, 16), 16, "loads into").all():
            continue
        if inside.any():
            map_.memory.access(agent, places[inside], map_.size, "loads")

        def land(map_=map_, barrier=barrier, number=number, rest=(shared.bytes, start, places, inside)) -> None:
            map_.load(*rest)
            barrier.land(number, map_.bytes)

        if s.machine.rng is None:
            land()
        else:
            s.program.loads.append(land)


@does(_TENSOR + r"global\.shared(\.tile)?\.bulk_group", guarded=True)
def store_box(s: Strand, i: Decoded, rank: str) -> None:
    for lane in np.flatnonzero(i.mask(s)):
        w, shared = lane // 32, s.program.shared
        map_, start, places, inside = box(s, i.args[0], i.args[1], lane, rank)
        s.unread = group = s.closed["bulk"] + 1
        reads, writes = (
            Agent(s.clock[w : w + 1], [((int(s.own(kind)[w]),), group)], s.place, proxy=1)
            for kind in ("bulk read", "bulk store")
        )
        if not shared.access(reads, np.arange(start, start + map_.bytes, 16), 16, "stores").all():
            continue
        if inside.any():
            map_.memory.access(writes, places[inside], map_.size, "stores into")
        s.issue("bulk", functools.partial(map_.store, shared.bytes, start, places, inside))


# Products.


@does(r"wgmma\.fence\.sync\.aligned")
def fence_registers(s: Strand, i: Decoded) -> None:
    s.unfenced.clear()


@does(r"wgmma\.commit_group\.sync\.aligned")
def commit_products(s: Strand, i: Decoded) -> None:
    s.groups.append([])
    s.closed["product"] += 1


@does(r"wgmma\.wait_group\.sync\.aligned")
def wait_for_products(s: Strand, i: Decoded) -> None:
    s.retire(i.args[0])


@functools.lru_cache(maxsize=64)
def _sums(n: int) -> tuple[Array, Array]:
    """Row and column, [registers, 128 lanes], of each value of a wgmma's sums [64, n]."""
    register, lane = np.arange(n // 2)[:, None], np.arange(128)
    return lane // 32 * 16 + lane % 32 // 4 + register // 2 % 2 * 8, register // 4 * 8 + lane % 4 * 2 + register % 2


def fragments(v: Array, rows: list[Row], kind: str) -> Array:
    """[warps, 8 rows x len(rows) / 2, 32 bytes] of registers with 8 x 16 bytes each: rows first, then columns."""
    words = np.stack([v[row.number] for row in rows]).reshape(len(rows), -1, 8, 4)  # [register, warp, row, column]
    values = numbers(words.view(words_of(kind)[1]), kind)
    halves = values.reshape(2, -1, *values.shape[1:])  # [columns, rows, warp, row, column]
    return halves.transpose(2, 1, 3, 0, 4).reshape(values.shape[1], 4 * len(rows), -1)


@functools.lru_cache(maxsize=4096)
def _chunks(*key: Any) -> Array:
    return np.unique(operand(*key) // 16 * 16)


@does(r"wgmma\.mma_async\.sync\.aligned\.(?P<shape>m64n(?P<n>\d+)k\d+\.f32)\.(?P<kind>f16|bf16|tf32)\.(?P=kind)")
def multiply(s: Strand, i: Decoded, shape: str, n: str, kind: str) -> None:
    sums, a, b, use, *rest = i.args
    in_registers, size = isinstance(a, list), words_of(kind)[0]
    major = [*([0] * in_registers), *rest[2:]] if len(rest) > 2 else [0, 0]
    if rest[:2] != [1, 1] or s.first % 4 or s.warps % 4:
        raise Unknown(f"{s.place}: a product that subtracts, or of warps that have parted")
    _judge_registers(s, sums, a if in_registers else [], shape + kind)
    rows, columns = _sums(int(n))
    numbers_of = [row.number for row in sums]
    work = []
    for first in range(0, s.warps, 4):
        lanes = slice(32 * first, 32 * first + 128)
        sides = [(b, int(n), major[1])] if in_registers else [(a, 64, major[0]), (b, int(n), major[1])]
        keys = [(s.uniform(x, "u64", lanes), extent, size, turned) for x, extent, turned in sides]
        clock, components = s.clock[first : first + 4], s.own("product")[first : first + 4]
        epoch = tuple(map(int, components)), s.closed["product"] + 1
        for key in keys:
            s.program.shared.access(
                Agent(clock.min(0)[None], [epoch], s.place, proxy=1), _chunks(*key), 16, "multiplies"
            )
        work.append((s.v["f32"][:, lanes], s.v["u32"][:, lanes], keys, s.uniform(use, "pred", lanes)))

    def finish() -> None:
        for v, words, keys, add in work:
            memory = s.program.shared.bytes.view(words_of(kind)[1])
            values = [numbers(memory[operand(*key) // size], kind) for key in keys]
            if in_registers:
                values.insert(0, fragments(words, a, kind).reshape(64, -1))
            total = (values[0] @ values[1].T)[rows, columns]
            v[numbers_of] = total + v[numbers_of] if add else total

    if s.machine.rng is None:
        finish()
    factors = frozenset(row.number for row in a) if in_registers else frozenset()
    done = (lambda: None) if s.machine.rng is None else finish
    s.groups[-1].append(Product(frozenset(numbers_of), factors, shape + kind, done))
    s.sums.update(numbers_of)
    s.factors |= factors


def _judge_registers(s: Strand, sums: list[Row], factors: list[Row], shape: str) -> None:
    numbers_of, read = {row.number for row in sums}, {row.number for row in factors}
    if not s.sums.isdisjoint(read):
        s.judge.report("registers", s.place, "multiplies sums of a product that may still run")
    for other in (product for group in s.groups for product in group):
        alike = (other.sums, other.shape) == (numbers_of, shape)
        if not (alike or other.sums.isdisjoint(numbers_of)) or not other.factors.isdisjoint(numbers_of):
            s.judge.report("registers", s.place, "adds to registers of a product that may still run")
    if not s.unfenced.isdisjoint(numbers_of | read):
        s.judge.report("fence", s.place, "multiplies registers that were written since the last wgmma.fence")


@does(r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32")
def multiply_at_once(s: Strand, i: Decoded, kind: str) -> None:
    d, a, b, c = i.args
    left, right = (fragments(s.v["u32"], rows, kind) for rows in (a, b))
    total = left @ right.transpose(0, 2, 1)
    lane = np.arange(32)
    for number, (into, old) in enumerate(zip(d, c, strict=True)):
        part = total[:, lane // 4 + number // 2 * 8, lane % 4 * 2 + number % 2].reshape(-1)
        s.put(into, "f32", part + s.get(old, "f32"))
