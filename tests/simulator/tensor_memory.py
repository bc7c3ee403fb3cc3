"""Tensor memory of compute capability 10.0, 128 lanes x 512 columns of 32 bits, and the products that add to it.

One thread issues products, and those that add to the same sums are done in its order; a commit has them arrive at an
mbarrier when they are. Loads and stores are done at once, but a warp comes to no barrier before it has waited for its
stores. `tcgen05.wait::ld` is not asked for: LLVM moves uses of what is loaded before it, ptxas makes it a NOP, and in
machine code a scoreboard holds back who uses such a register (LDTM, Triton 3.7.1).
"""

from typing import Any

import numpy as np

from .arithmetic import Array
from .judge import NEVER, Barrier, Memory
from .machine import Row, Strand, Work
from .memory import numbers, operand, words_of

LANES, COLUMNS = 128, 512
_KINDS = {("f16", 0): "f16", ("f16", 1): "bf16", ("tf32", 2): "tf32"}
_FORM = 3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24
"""The fields of a product's form: types of sums, rows and columns, which of them are turned, N and M."""


def allocate(s: Strand, args: Any, lanes: Array) -> None:
    """All lanes of the columns asked for; their address goes to shared memory."""
    into, columns = args
    s.expect(len(lanes) == 32 and s.program.tensor is None, "one warp that allocates, once")
    s.expect(columns in (32, 64, 128, 256, 512), "a power of two of columns, 32 at least")
    covered = np.arange(LANES * COLUMNS * 4) // 4 % COLUMNS >= COLUMNS - columns
    data = s.machine.noise.integers(0, 256, len(covered), np.uint8)
    s.program.tensor = Memory(s.judge, "tensor memory", data, 0, 4, covered, NEVER)
    at = s.get(into.base, "u32")[lanes[:1]].astype(np.int64) + into.offset
    s.program.shared.access(s.agent(lanes[:1]), at, 4, "writes")
    s.program.shared.bytes.view(np.uint32)[at // 4] = COLUMNS - columns


def free(s: Strand, args: Any, lanes: Array) -> None:
    address, columns = args
    s.expect((s.get(address, "u32")[lanes] == COLUMNS - columns).all(), "the address of all that was allocated")
    memory = s.program.tensor
    memory.access(s.agent(lanes[:1]), np.flatnonzero(memory.covered[::4]) * 4, 4, "writes")
    memory.covered[:] = False


def _places(rows: Array, columns: Array) -> Array:
    """The first byte of each word of some rows, and of some columns of each; negative if there is no such column."""
    return np.where(columns < COLUMNS, rows.astype(np.int64)[:, None] * COLUMNS + columns, -1) * 4


def move(s: Strand, args: Any, lanes: Array, way: str, halves: str) -> None:
    """Between registers and tensor memory: a column to a register, to each lane of a warp a lane of its quarter.

    With halves 16 lanes, of which the warp's first 16 have some columns and its last 16 others.
    """
    registers, address, *apart = args if way == "ld" else (args[-1], *args[:-1])
    at = s.get(address.base, "u32")[lanes] + address.offset
    s.expect((at.reshape(-1, 32) == at[::32, None]).all(), "whole warps, and one address for the lanes of each")
    thread, first = lanes % 32, at >> 16
    rows = first + (thread % 16 if halves else thread)
    column = (at & 0xFFFF) + (thread // 16 * apart[0] if halves else 0)
    s.expect((rows // 32 == (s.first + lanes // 32) % 4).all(), "lanes of the warp's own quarter")
    places = _places(rows, column[:, None] + np.arange(len(registers)))
    memory, agent = s.program.tensor, s.agent(lanes)
    agent = agent._replace(row=np.repeat(agent.row, len(registers)))
    if not memory.access(agent, places.reshape(-1), 4, "writes" if way == "st" else "reads").all():
        return
    words = memory.bytes.view(np.uint32)
    if way == "st":
        words[places // 4] = np.stack([s.get(r, "b32")[lanes] for r in registers], 1)
        s.storing = True
    else:
        for register, values in zip(registers, words[places // 4].T, strict=True):
            s.put(register, "b32", values, lanes)


def multiply(s: Strand, args: Any, lane: int, kind: str) -> None:
    """Sums += rows x columns: M x N in tensor memory, rows there or in shared memory, columns in shared memory."""
    sums, a, b, form, add = args
    form, adds = int(s.get(form, "u32")[lane]), bool(s.get(add, "pred")[lane])
    code, n, m = form >> 7 & 7, (form >> 17 & 63) * 8, (form >> 24 & 31) * 16
    known = form & ~_FORM == 0 and form >> 4 & 3 == 1 and code == form >> 10 & 7 and m in (64, 128)
    known = known and (kind, code) in _KINDS and 0 < n <= 256 and n % (m // 8) == 0
    s.expect(known and lane == 0, f"a product of the first thread, of a form that is known, not {form:#x}")
    name = _KINDS[kind, code]
    size, word = words_of(name)
    rows = np.arange(m) if m == 128 else np.arange(m) // 16 * 32 + np.arange(m) % 16
    shared, tensor = s.program.shared, s.program.tensor

    agent = s.agent(np.array([lane]), "product")
    ((own,), number), clock = agent.epochs[0], s.clock[:1].copy()
    clock[..., own] = number  # products of a thread are done in its order
    agent = agent._replace(clock=clock, epochs=agent.epochs[:1], row=0)

    def in_tensor(address: Any, width: int) -> Array:
        at = int(s.get(address.base, "u32")[lane]) + address.offset
        return _places(rows + (at >> 16), (at & 0xFFFF) + np.arange(width)).reshape(-1)

    def in_shared(descriptor: Row, extent: int, turned: int) -> Array:
        bits = int(s.get(descriptor, "u64")[lane])
        s.expect(bits >> 46 & 1, "a descriptor of this product's version")
        places = operand(bits & ~(1 << 46), extent, size, bool(turned))
        shared.access(agent._replace(proxy=1), np.unique(places // 16 * 16), 16, "multiplies")
        return places

    right, into = in_shared(b, n, form >> 16 & 1), in_tensor(sums, n)
    used = [("adds to", into)] * adds
    if isinstance(a, Row):
        left, source = in_shared(a, m, form >> 15 & 1), shared
    else:
        words, source = in_tensor(a, 8), tensor
        left = words.reshape(m, 8)[:, :, None] + np.arange(0, 4, size)
        used.append(("multiplies", words))
    if not all(tensor.access(agent, places, 4, verb).all() for verb, places in (*used, ("writes", into))):
        return

    def finish() -> None:
        factors = [numbers(x.bytes.view(word)[at // size], name) for x, at in ((source, left), (shared, right))]
        total = factors[0].reshape(m, -1) @ factors[1].reshape(n, -1).T
        found = tensor.bytes.view(np.float32)
        found[into // 4] = total.reshape(-1) + (found[into // 4] if adds else 0)

    s.issue("product", Work(finish))


def commit(s: Strand, barrier: Barrier, lane: int) -> None:
    """The products so far arrive at a barrier when they are done; whoever waits there knows of them, and of no more."""
    s.expect(lane == 0, "a commit of the first thread")
    s.close("product")
    own, number, place = int(s.own("product")[0]), s.closed["product"], s.place
    clock, knows = s.clock[0].copy(), np.zeros_like(s.clock[0])
    clock[:, own] = knows[:, own] = number

    def land() -> None:
        s.end("product", s.closed["product"] - number, ())
        barrier.arrive(clock, own, place, knows=knows)

    if s.machine.rng is None:
        land()
    else:
        s.program.loads.append(land)
