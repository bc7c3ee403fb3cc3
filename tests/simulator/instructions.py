"""What instructions do to a strand: rows of a table, from a pattern of opcodes to a function of the strand, the
operands and the pattern's groups. What only computes has a table of its own (`arithmetic.py`)."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import tensor_memory
from .arithmetic import TABLE, TYPES, Array, Operation
from .judge import GRID, Agent, Barrier, learn
from .machine import Machine, Row, Step, Strand, Work
from .memory import REGION_BITS, SHARED, numbers, operand, words_of
from .ptx import Instruction, Kernel, Unknown

MAPS = 1 << 20
"""Address of the first parameter, which a tensor map is known by; the others follow."""
_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
_NO_RESULT = (
    "st", "cp", "mbarrier", "bar", "barrier", "bra", "brx", "ret", "fence", "wgmma", "tcgen05", "setmaxnreg",
    "stmatrix",
)  # fmt: skip


class Address(NamedTuple):
    """`[base + offset]`, or a tensor map's and a box's coordinates, innermost first."""

    base: Any
    offset: int
    coordinates: list[Any]


class Decoder:
    def __init__(self, kernel: Kernel, machine: Machine) -> None:
        self.kernel, self.machine = kernel, machine
        self.rows: dict[str, Row] = {}
        of_products = [i.operands[0] + i.operands[1] for i in kernel.code if "mma_async" in i.op]
        self.products = set(re.findall(r"%r\d+", " ".join(of_products)))
        for name in _SPECIAL:
            self.row(name, 32)
        tables = {name: np.array([kernel.labels[x] for x in labels]) for name, labels in kernel.tables.items()}
        parameters = {name: MAPS + number for number, name in enumerate(kernel.parameters)}
        self.names = {**kernel.labels, **tables, **parameters, kernel.shared: SHARED, "_": None}
        machine.steps[:] = [self.step(i) for i in kernel.code]

    def row(self, name: str, width: int) -> Row:
        if name not in self.rows:
            number = self.machine.registers[width] = self.machine.registers.get(width, 0) + 1
            self.rows[name] = Row(width, number - 1)
        return self.rows[name]

    def step(self, i: Instruction) -> Step:
        used = [{self.resolve(r).number for r in re.findall(r"%r\d+", o) if r in self.products} for o in i.operands]
        results = 0 if i.op.partition(".")[0] in _NO_RESULT else 1
        reads = [] if i.op.startswith("wgmma") else used[results:]
        return Step(self.find(i), i.place, frozenset().union(*reads), frozenset().union(*used[:results]))

    def find(self, i: Instruction) -> Callable[[Strand], bool | None]:
        args, guard = [self.resolve(o) for o in i.operands], i.guard and (self.resolve(i.guard), i.negated == "!")
        for pattern, function, *takes in INSTRUCTIONS:
            if match := re.fullmatch(pattern, i.op):
                run = functools.partial(function, **match.groupdict())
                return functools.partial(_guarded, args=args, run=run, takes=takes, guard=guard)
        operation = TABLE.get((i.op, len(args) - 1))
        if operation is None or guard:
            raise Unknown(f"{self.kernel.name}, {i.place}")
        return functools.partial(compute, args=args, operation=operation)

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
        if text in self.names:
            return self.names[text]
        if re.fullmatch(r"-?\d+|0[xfF][0-9a-fA-F]+U?", text):
            return int(re.sub("^0[fF]", "0x", text).rstrip("U"), 0)
        raise Unknown(f"{kernel.name}: operand {text}")


def _guarded(s: Strand, args: list[Any], run: Any, takes: list[str], guard: Any) -> bool | None:
    lanes = s.lanes if guard is None else np.flatnonzero(s.get(guard[0], "pred") ^ guard[1])
    if takes == ["each"]:
        for lane in lanes:
            run(s, args, lane)
    elif len(lanes):
        s.expect(takes or len(lanes) == len(s.lanes), "all lanes or none")
        return run(s, args, lanes) if takes else run(s, args)
    return None


def compute(s: Strand, args: list[Any], operation: Operation) -> None:
    values = [s.get(x, t) for x, t in zip(args[1:], operation.sources, strict=True)]
    s.put(args[0], operation.result, operation.compute(*values))


def pack(s: Strand, args: Any, width: str) -> None:
    """Parts of a register; or a register as it is."""
    into, source = ([x] if not isinstance(x, list) else x for x in args)
    words = np.stack([s.get(x, f"b{int(width) // len(source)}") for x in source], 1)
    parts = words.view(TYPES[f"b{int(width) // len(into)}"]).T
    for x, part in zip(into, parts, strict=True):
        if x is not None:
            s.put(x, f"b{int(width) // len(into)}", part)


def compare_halves(s: Strand, args: Any) -> None:
    halves = [s.get(x, "b32").copy().view(np.float16).reshape(-1, 2) for x in args[1:]]
    for into, result in zip(args[0], TABLE["setp.nan.f16", 2].compute(*halves).T, strict=True):
        s.put(into, "pred", result)


def elect(s: Strand, args: Any) -> None:
    s.put(args[0][0], "b32", 0)
    s.put(args[0][1], "pred", s.lanes % 32 == 0)


def branch(s: Strand, args: Any, lanes: Array) -> None:
    targets = np.full(len(s.lanes), s.pc)
    targets[lanes] = args[0]
    s.part(targets.reshape(-1, 32))


def leave(s: Strand, args: Any) -> None:
    if any(s.groups["bulk"]):
        s.report("store", "ends while a bulk store may still read shared memory")
    if any(s.groups["product"]):
        s.report("registers", "ends while a product runs")
    s.end("bulk", 0, ())
    s.done = True


def give_registers(s: Strand, args: Any, way: str) -> bool:
    """More than the program has left are waited for."""
    before, after = s.program.maxnreg, s.program.maxnreg.copy()
    after[s.first : s.last] = args[0]
    s.expect((after >= before if way == "inc" else after <= before).all(), "no fewer registers by inc, no more by dec")
    s.waiting = f"{args[0]} registers a thread"
    if after.sum() > s.machine.maxnreg * s.machine.warps:
        return True
    s.program.maxnreg = after
    return False


def let_in(s: Strand, args: list[Any]) -> None:
    """The next launch may begin, and must not meet the one before."""
    if not s.clock[:, 0, GRID].all():
        s.judge.report("dependent", s.place, "lets the next launch in before griddepcontrol.wait")


def meet(s: Strand, args: Any) -> bool:
    if s.storing:
        s.report("race", "comes to a barrier while it may still store to tensor memory")
    number, threads = (*args, 32 * s.machine.warps)[:2]
    s.expect(isinstance(number, int) and isinstance(threads, int), "a barrier and a count that are in the text")
    barrier = s.program.barriers.get(number) or s.program.barrier(number, f"barrier {number}", threads // 32)
    if s.target is None:
        s.target = barrier.current
        if threads != 32 * barrier.count:
            s.report("count", f"comes to {barrier.name} of {32 * barrier.count} threads with {threads}")
        for clock, own in zip(s.clock, s.own(), strict=True):
            barrier.arrive(clock, int(own), s.place)
    if s.target == barrier.current:
        s.waiting = barrier.lack()
        return True
    learn(s.clock, barrier.phases[s.target].clock)
    s.target = None
    return False


def locate(s: Strand, address: Address, lanes: Array, space: str) -> tuple[Any, Array]:
    """The memory of some lanes' addresses, and their places in it."""
    at = s.get(address.base, "u32" if space == "shared" else "u64")[lanes].astype(np.int64) + address.offset
    if space == "shared":
        return s.program.shared, at
    region = (int(at[0]) >> REGION_BITS) - 1 if len(at) else 0
    if not 0 <= region < len(s.machine.regions):
        s.report("bounds", "an address in no tensor")
        region, at = 0, np.full(len(at), -1)
    return s.machine.regions[region], at - s.machine.regions[region].base


def move(s: Strand, args: Any, lanes: Array, way: str, space: str, t: str) -> None:
    address, values = args if way == "st" else reversed(args)
    rows = values if isinstance(values, list) else [values]
    memory, at = locate(s, address, lanes, space)
    size = np.dtype(TYPES[t]).itemsize * len(rows)
    if way == "st":
        data, same = np.stack([s.get(row, t) for row in rows], 1).view(np.uint8)[lanes], None
        if space == "shared":
            there = np.clip(at, 0, len(memory.bytes) - size)[:, None] + np.arange(size)
            same = (memory.bytes[there] == data).all(1)
        inside = memory.access(s.agent(lanes), at, size, "writes", same)
        memory.bytes[at[inside, None] + np.arange(size)] = data[inside]
    else:
        inside = memory.access(s.agent(lanes), at, size, "reads")
        places, lanes = at[inside, None] + np.arange(size), lanes[inside]
        for row, column in zip(rows, memory.bytes[places].view(TYPES[t]).T, strict=True):
            s.put(row, t, column, lanes)


def add_atomically(s: Strand, args: Any, lane: int) -> None:
    """Acquires what was known at the updates before, and releases what is known here."""
    into, address, by = args
    memory, at = locate(s, address, np.array([lane]), "global")
    clock, own = s.clock[lane // 32], int(s.own()[lane // 32])
    known = s.machine.updates.setdefault(int(at[0]) + memory.base, np.zeros_like(clock))
    learn(clock, known)
    if not memory.access(s.agent(np.array([lane])), at, 4, "updates").all():
        return
    learn(known, clock)
    clock[0, own] += 1
    word = memory.bytes[int(at[0]) : int(at[0]) + 4].view(np.uint32)
    s.put(into, "u32", word.copy(), [lane])
    word += s.get(by, "u32")[lane]


def move_matrices(s: Strand, args: Any, way: str, count: str, turned: str | None) -> None:
    """8x8 matrices of 16-bit values: lane 8j + r has the address of row r of matrix j, and two values of each."""
    address, rows = args if way == "st" else reversed(args)
    lanes = np.flatnonzero(s.lanes % 32 < 8 * int(count))
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


def copy(s: Strand, args: Any, lanes: Array) -> None:
    """Some bytes for each lane, zeros where it is to read none."""
    into, source, size, *rest = args
    length = s.get(rest[0] if rest else size, "u32")
    s.expect(np.isin(length[lanes], (0, size)).all(), "a copy of all bytes or none")
    shared, at = locate(s, into, lanes, "shared")
    inside = shared.access(s.agent(lanes, "copy"), at, size, "copies into")
    data, reads = np.zeros((len(s.lanes), size), np.uint8), lanes[length[lanes] > 0]
    memory, places = locate(s, source, reads, "global")
    there = memory.access(s.agent(reads, "copy"), places, size, "reads")
    data[reads[there]] = memory.bytes[places[there, None] + np.arange(size)]
    at, data = at[inside, None] + np.arange(size), data[lanes[inside]]
    s.issue("copy", Work(lambda: shared.bytes.__setitem__(at, data)))


def shared_at(s: Strand, address: Address, lane: int) -> int:
    return int(s.get(address.base, "u32")[lane]) + address.offset


def barrier_at(s: Strand, at: int, w: int, verb: str) -> Barrier:
    """The barrier at an address, made before this warp comes to it. A load ends there in the async proxy."""
    s.expect(at in s.program.barriers, f"a barrier at {at - SHARED:+d}")
    agent = s.agent(np.array([32 * w]))._replace(proxy=int(verb == "ends at"))
    s.program.shared.access(agent, np.array([at]), 8, verb)
    return s.program.barriers[at]


def make_barrier(s: Strand, args: Any, lane: int) -> None:
    at = shared_at(s, args[0], lane)
    s.expect(at not in s.program.barriers, f"no barrier at {at - SHARED:+d}")
    s.program.barrier(at, f"the barrier at {at - SHARED:+d}", int(s.get(args[1], "u32")[lane]))
    barrier_at(s, at, lane // 32, "writes")


def end_barrier(s: Strand, args: Any, lane: int) -> None:
    at = shared_at(s, args[0], lane)
    barrier_at(s, at, lane // 32, "writes")
    del s.program.barriers[at]


def arrive(s: Strand, args: Any, lane: int, expect: str | None) -> None:
    w, value = lane // 32, int(s.get(args[2], "u32")[lane]) if len(args) > 2 else 1
    barrier = barrier_at(s, shared_at(s, args[1], lane), w, "arrives")
    barrier.arrive(s.clock[w], int(s.own()[w]), s.place, *((value, 1) if expect else (0, value)))


def wait(s: Strand, args: Any) -> bool:
    at, parity = s.uniform(args[1].base, "u32") + args[1].offset, s.uniform(args[2], "u32")
    s.expect(parity in (0, 1), f"a parity, not {parity}")
    barrier = barrier_at(s, at, 0, "waits")
    targets = [barrier.target(clock, parity) for clock in s.clock]
    if max(targets) >= barrier.current:
        s.waiting = barrier.lack()
        return True
    for clock, own, target in zip(s.clock, s.own(), targets, strict=True):
        barrier.wait(clock, int(own), target, s.place)
    s.put(args[0], "pred", True)
    return False


def copy_box(s: Strand, args: Any, lane: int, store: str | None = None) -> None:
    """Between a tensor and shared memory: a load completes on a barrier, a store in a group of the warp's."""
    tensor, into = args[:2] if store else args[1::-1]
    map_, w, shared = s.machine.maps.get(int(s.get(tensor.base, "u64")[lane])), lane // 32, s.program.shared
    coordinates = [int(s.get(x, "s32")[lane]) for x in reversed(tensor.coordinates)]
    s.expect(map_ and len(map_.box) == len(coordinates), f"a tensor map of rank {len(coordinates)}")
    start = shared_at(s, into, lane)
    s.expect(start % 128 == 0, f"a box at a multiple of 128, not at {start - SHARED:+d}")
    places, inside = map_.place(coordinates)
    if store:
        here, there = (s.agent(np.array([lane]), kind)._replace(proxy=1) for kind in ("bulk read", "bulk store"))
    else:
        barrier = barrier_at(s, shared_at(s, args[2], lane), w, "ends at")
        number = barrier.issue(s.clock[w], map_.bytes, s.place)
        epochs = [((barrier.loads,), barrier.base + number + 1)]
        here = there = Agent(s.clock[w][None], epochs, s.place, proxy=1)
    chunks = np.arange(start, start + map_.bytes, 16)
    if not shared.access(here, chunks, 16, "stores" if store else "loads into").all():
        return
    if inside.any():
        map_.memory.access(there, places[inside], map_.size, "stores into" if store else "loads")

    def land() -> None:
        map_.load(shared.bytes, start, places, inside)
        barrier.land(number, map_.bytes)

    if store:
        s.issue("bulk", Work(functools.partial(map_.store, shared.bytes, start, places, inside)))
    elif s.machine.rng is None:
        land()
    else:
        s.program.loads.append(land)


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


def multiply(s: Strand, args: Any, shape: str, n: str, kind: str) -> None:
    sums, a, b, use, *rest = args
    in_registers, size = isinstance(a, list), words_of(kind)[0]
    major = [*([0] * in_registers), *rest[2:]] if len(rest) > 2 else [0, 0]
    s.expect(rest[:2] == [1, 1] and s.first % 4 == s.warps % 4 == 0, "a sum of products of whole groups of warps")
    numbers_of = [row.number for row in sums]
    factors = frozenset(row.number for row in a) if in_registers else frozenset()
    _judge_registers(s, frozenset(numbers_of), factors, shape + kind)
    work = []
    for first in range(0, s.warps, 4):
        lanes, clock = slice(32 * first, 32 * first + 128), s.clock[first : first + 4]
        sides = [(b, int(n), major[1])] if in_registers else [(a, 64, major[0]), (b, int(n), major[1])]
        keys = [(s.uniform(x, "u64", lanes), extent, size, turned) for x, extent, turned in sides]
        epoch = tuple(map(int, s.own("product")[first : first + 4])), s.closed["product"] + 1
        agent = Agent(clock.min(0)[None], [epoch], s.place, proxy=1)
        for key in keys:
            s.program.shared.access(agent, _chunks(*key), 16, "multiplies")
        work.append((s.v["f32"][:, lanes], s.v["u32"][:, lanes], keys, s.uniform(use, "pred", lanes)))

    def finish() -> None:
        for v, words, keys, add in work:
            memory = s.program.shared.bytes.view(words_of(kind)[1])
            values = [numbers(memory[operand(*key) // size], kind) for key in keys]
            if in_registers:
                values.insert(0, fragments(words, a, kind).reshape(64, -1))
            total = (values[0] @ values[1].T)[_sums(int(n))]
            v[numbers_of] = total + v[numbers_of] if add else total

    s.issue("product", Work(finish, frozenset(numbers_of), factors, shape + kind))
    s.sums.update(numbers_of)
    s.factors |= factors


def _judge_registers(s: Strand, sums: frozenset[int], factors: frozenset[int], shape: str) -> None:
    if not s.sums.isdisjoint(factors):
        s.report("registers", "multiplies sums of a product that may still run")
    for other in (work for group in s.groups["product"] for work in group):
        alike = (other.sums, other.shape) == (sums, shape)
        if not (alike or other.sums.isdisjoint(sums)) or not other.factors.isdisjoint(sums):
            s.report("registers", "adds to registers of a product that may still run")
    if not s.unfenced.isdisjoint(sums | factors):
        s.report("fence", "multiplies registers that were written since the last wgmma.fence")


def multiply_at_once(s: Strand, args: Any, kind: str) -> None:
    d, a, b, c = args
    left, right = (fragments(s.v["u32"], rows, kind) for rows in (a, b))
    total = left @ right.transpose(0, 2, 1)
    for into, old, row, column in zip(d, c, *_sums(8), strict=True):
        s.put(into, "f32", total[:, row[:32], column[:32]].reshape(-1) + s.get(old, "f32"))


def commit_products(s: Strand, args: Any, lane: int) -> None:
    tensor_memory.commit(s, barrier_at(s, shared_at(s, args[0], lane), lane // 32, "arrives"), lane)


_KIND = r"(?P<kind>f16|bf16|tf32)\.(?P=kind)"
INSTRUCTIONS: list[Any] = [
    # The lanes that a guard lets through, or "each" of them in turn; the others act as a whole or not at all.
    (r"mov\.b(?P<width>32|64)", pack),
    (r"setp\.nan\.f16x2", compare_halves),
    (r"elect\.sync", elect),
    (r"bra(\.uni)?", branch, "lanes"),
    (r"brx\.idx", lambda s, args: s.part(args[1][s.get(args[0], "u32")].reshape(-1, 32))),
    (r"ret", leave),
    (r"setmaxnreg\.(?P<way>inc|dec)\.sync\.aligned\.u32", give_registers),
    (r"bar\.warp\.sync", lambda s, args: None),  # lanes of a warp are in lockstep
    (r"griddepcontrol\.launch_dependents", let_in),
    (r"griddepcontrol\.wait", lambda s, args: s.clock[:, :, GRID].fill(1)),
    (r"fence\.proxy\.async(\.shared|\.global)?", lambda s, args: learn(s.clock[:, 1], s.clock[:, 0])),
    (r"(bar|barrier)\.sync", meet),
    (r"ld\.param\.(?P<t>\w+)", lambda s, args, t: s.put(args[0], t, s.get(s.machine.values[args[1].base - MAPS], t))),
    (r"(?P<way>ld|st)\.(?P<space>shared|global)(\.cg)?(\.v[248])?\.(?P<t>[busf]\d+)", move, "lanes"),
    (r"atom\.global\.gpu\.acq_rel\.add\.[us]32", add_atomically, "each"),
    (r"(?P<way>ld|st)matrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<turned>\.trans)?\.shared\.b16", move_matrices),
    (r"cp\.async\.c[ag]\.shared\.global", copy, "lanes"),
    (r"cp\.async\.commit_group", lambda s, args: s.close("copy")),
    (r"cp\.async\.wait_group", lambda s, args: s.end("copy", args[0], ["copy"])),
    (r"cp\.async\.bulk\.commit_group", lambda s, args: s.close("bulk")),
    (r"cp\.async\.bulk\.wait_group\.read", lambda s, args: s.end("bulk", args[0], ["bulk read"])),
    (r"cp\.async\.bulk\.wait_group", lambda s, args: s.end("bulk", args[0], ["bulk read", "bulk store"])),
    (r"mbarrier\.init\.shared\.b64", make_barrier, "each"),
    (r"mbarrier\.inval\.shared\.b64", end_barrier, "each"),
    (r"mbarrier\.arrive(?P<expect>\.expect_tx)?\.shared\.b64", arrive, "each"),
    (r"mbarrier\.try_wait\.parity\.shared\.b64", wait),
    (r"cp\.async\.bulk\.tensor\.\dd\.shared(::cluster)?\.global\.mbarrier::complete_tx::bytes", copy_box, "each"),
    (r"cp\.async\.bulk\.tensor\.\dd\.(?P<store>global)\.shared\.bulk_group", copy_box, "each"),
    (r"wgmma\.fence\.sync\.aligned", lambda s, args: s.unfenced.clear()),
    (r"wgmma\.commit_group\.sync\.aligned", lambda s, args: s.close("product")),
    (r"wgmma\.wait_group\.sync\.aligned", lambda s, args: s.end("product", args[0], ["product"])),
    (rf"wgmma\.mma_async\.sync\.aligned\.(?P<shape>m64n(?P<n>\d+)k\d+\.f32)\.{_KIND}", multiply),
    (rf"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.{_KIND}\.f32", multiply_at_once),
    (r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared\.b32", tensor_memory.allocate, "lanes"),
    (r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned", lambda s, args, lanes: None, "lanes"),
    (r"tcgen05\.wait::ld\.sync\.aligned", lambda s, args: None),
    (r"tcgen05\.wait::st\.sync\.aligned", lambda s, args: setattr(s, "storing", False)),
    (r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32", tensor_memory.free, "lanes"),
    (r"tcgen05\.(?P<way>ld|st)\.sync\.aligned\.(32x32b|(?P<halves>16x32bx2))\.x\d+\.b32", tensor_memory.move, "lanes"),
    (r"tcgen05\.mma\.cta_group::1\.kind::(?P<kind>f16|tf32)", tensor_memory.multiply, "each"),
    (r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64", commit_products, "each"),
]
