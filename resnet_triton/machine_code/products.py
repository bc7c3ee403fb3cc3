"""Registers of asynchronous matrix products (wgmma), followed through Hopper's machine code until they are waited for.

The instruction only starts a product. Until a wait has covered its group, the registers that it reads must not be
written and those that it adds to must not be touched. A breach shows in results only if some cycles fall badly, the
interpreter knows no registers, and ptxas can make one of sound PTX. So each product is followed along every path of
the machine code, by itself: a wait that leaves n groups running covers it once n groups have been closed after its own.

Only the first register of a vector is looked at. A vector is aligned to its length, and a product's registers start at
a multiple of four and are multiples of four, so nothing that a product has a part of starts outside it.

A call is followed into the subroutine and past it, if it says that it returns to the instruction after it. Threads that
part and meet again (BSSY, BSYNC) are followed if they meet at the instruction after.

Not seen here: shared memory that is overwritten while a product reads it, and a product that starts too early.
`ordering.py` asks that a wait stands on every path between the two, not that it is for the right slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .flow import Flow, sass

# In these, the first operand that is no predicate is the result, if it is a register.
_WRITE = {
    "CS2R", "F2F", "F2FP", "F2I", "FADD", "FFMA", "FMNMX", "FMUL", "FSEL", "HADD2", "HFMA2", "I2F", "IABS", "IADD3",
    "IMAD", "LDC", "LDG", "LDL", "LDS", "LDSM", "LEA", "LOP3", "MOV", "MUFU", "P2R", "POPC", "PRMT", "S2R", "SEL",
    "SGXT", "SHF", "SHFL", "SYNCS", "VIADD", "VIMNMX",
}  # fmt: skip
# In these, no register is a result.
_READ = {
    "BAR", "BRA", "BSSY", "DEPBAR", "ELECT", "EXIT", "FCHK", "FENCE", "FSETP", "ISETP", "LDGDEPBAR", "LDGSTS",
    "MEMBAR", "NOP", "PLOP3", "R2UR", "S2UR", "STG", "STL", "STS", "STSM", "VOTEU", "WARPGROUP",
}  # fmt: skip
_MAX_PENDING = 7  # groups that a wait can leave running
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_PRODUCT = re.compile(r"[A-Z]GMMA\b")
_SHAPE = re.compile(r"[HQIB]GMMA\.64x(\d+)x\d+\.[FS]32\b")
_PREDICATE = re.compile(r"!?U?P[\dTR]$")
_WAIT = "WARPGROUP.DEPBAR.LE"


class Followed(NamedTuple):
    """How many products there are, and a line for everything that may go wrong with one of them."""

    products: int
    hazards: tuple[str, ...]


class _Instruction(NamedTuple):
    address: str
    maybe: bool  # only if a predicate holds
    name: str
    operands: list[str]

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    def known(self) -> bool:
        """Whether it is known what this writes. U... works on registers that are a warp's, not a thread's.

        USETMAXREG gives a thread's registers away.
        """
        warps = self.base.startswith("U") and self.base != "USETMAXREG"
        return self.base in _WRITE or self.base in _READ or warps

    def writes(self) -> int | None:
        """The first register of the result."""
        if self.base not in _WRITE:
            return None
        return _register(next((o for o in self.operands if not _PREDICATE.match(o)), ""))

    def touches(self) -> list[int]:
        """The first registers of all operands."""
        return [int(number) for o in self.operands for number in re.findall(r"\bR(\d+)", o)]


class _Product(NamedTuple):
    """Registers that a product reads (none: from shared memory) and adds to, and whether it closes its group."""

    reads: range
    sums: range
    closes: bool


def follow(text: str, *, expected: bool) -> Followed:
    """Follow every product in machine code as nvdisasm writes it. To find none where some are expected is a hazard."""
    flow = sass(text)
    code = [_instruction(line) for line in flow.lines]
    products = {i: _product(found) for i, found in enumerate(code) if found and _PRODUCT.match(found.name)}
    onward = {*_calls(code), *_meetings(flow, code)}
    hazards = [line for i in products for line in _hazards(i, flow, code, products, onward)]
    if expected and not products:
        hazards = ["no product to follow in the machine code, expected those of the PTX"]
    return Followed(len(products), tuple(dict.fromkeys(hazards)))


def _hazards(
    start: int,
    flow: Flow,
    code: Sequence[_Instruction | None],
    products: dict[int, _Product | None],
    onward: set[int],
) -> Iterator[str]:
    """What may go wrong with one product, on any path from it to a wait that covers it.

    `onward` has the calls and meetings after which it goes on at the next line. What comes after a call is followed
    from there, so a return ends a path, if there was one.
    """
    own, ours = code[start], products[start]
    assert own is not None
    if ours is None:
        yield f"{own.name} at {own.address} is a product of an unknown form"
        return
    what = f"{own.name} at {own.address}"
    # By line, the fewest groups closed since, -1 with its own still open: whatever covers it then covers it with more.
    fewest: dict[tuple[int, bool], int] = {}
    todo = [(to, 0 if ours.closes else -1, False) for to in flow.next[start]]
    while todo:
        i, closed, called = todo.pop()
        if i == len(code) or fewest.get((i, called), _MAX_PENDING + 1) <= closed:
            continue
        fewest[i, called] = closed
        found, other = code[i], products.get(i)
        if found is None or i in onward or (found.base == "RET" and called):
            pass
        elif found.name == _WAIT:
            if not found.maybe and closed >= int(found.operands[-1], 16):
                continue
        elif other is not None:
            if _overlap(other.sums, ours.reads) or (other.sums != ours.sums and _overlap(other.sums, ours.sums)):
                yield f"{found.name} at {found.address} adds to registers of {what}, which is not waited for"
            if _overlap(other.reads, ours.sums):
                yield f"{found.name} at {found.address} reads the sums of {what}, which is not waited for"
            if other.closes and not found.maybe:
                closed = min(closed + 1, _MAX_PENDING)
        elif not found.known():
            yield f"{found.name} at {found.address} is unknown, and {what} is not waited for"
        elif found.writes() in ours.reads:
            yield f"{found.name} at {found.address} overwrites R{found.writes()} of {what}, which is not waited for"
        elif any(register in ours.sums for register in found.touches()):
            yield f"{found.name} at {found.address} touches the sums of {what}, which is not waited for"
        entered = called or (found is not None and found.base == "CALL")
        todo += [(to, closed, called if to == i + 1 else entered) for to in flow.next[i]]


def _calls(code: Sequence[_Instruction | None]) -> Iterator[int]:
    """The calls that the line before tells to return to the instruction after."""
    for i, (before, call) in enumerate(pairwise(code), start=1):
        if call and call.name == "CALL.REL.NOINC" and before and before.name == "MOV" and not before.maybe:
            after = code[_following(code, i)] if _following(code, i) < len(code) else None
            if after and before.operands[-1] == f"0x{int(after.address, 16):x}":
                yield i


def _meetings(flow: Flow, code: Sequence[_Instruction | None]) -> set[int]:
    """Where threads meet (BSYNC) and go on at the next instruction, as they were told where they parted (BSSY)."""
    met, elsewhere = set(), set()
    for start, parted in enumerate(code):
        if parted is None or parted.base != "BSSY":
            continue
        barrier, label = parted.operands[0], parted.operands[1].strip("`()")
        todo, seen = list(flow.next[start]), set()
        while todo:
            i = todo.pop()
            if i in seen or i == len(code):
                continue
            seen.add(i)
            found = code[i]
            if found is None or found.base not in ("BSSY", "BSYNC") or found.operands[0] != barrier:
                todo += flow.next[i]
            elif found.base == "BSYNC":
                met.add(i)
                if f"{label}:" not in map(str.strip, flow.lines[i + 1 : _following(code, i)]):
                    elsewhere.add(i)
    return met - elsewhere


def _following(code: Sequence[_Instruction | None], i: int) -> int:
    """The line of the next instruction."""
    return next((n for n in range(i + 1, len(code)) if code[n]), len(code))


def _instruction(line: str) -> _Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        address = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+\S", line)
        return _Instruction(address[1], True, "an instruction of another form", []) if address else None
    if re.match(r"BRA|CALL", found[3]) and "`(" not in found[4]:
        return _Instruction(found[1], True, "a jump to an unknown place", [])
    return _Instruction(found[1], bool(found[2]), found[3], [o.strip() for o in found[4].split(",")])


def _product(found: _Instruction) -> _Product | None:
    """64 rows by n columns in fp32 (or int32) are n / 2 sums a thread; 64 rows of 32 bytes are 4 registers."""
    shape, sums = _SHAPE.match(found.name), _register(found.operands[0])
    if shape is None or sums is None or sums % 4:
        return None
    reads = _register(found.operands[1])
    if reads is None and not found.operands[1].startswith("gdesc"):
        return None
    if reads is not None and reads % 4:
        return None
    if found.operands[2 if reads is None else 3] not in (found.operands[0], "RZ"):
        return None
    fragment = range(0) if reads is None else range(reads, reads + 4)
    return _Product(fragment, range(sums, sums + int(shape[1]) // 2), "gsb0" in found.operands)


def _register(operand: str) -> int | None:
    found = re.match(r"R(\d+)\b", operand)
    return int(found[1]) if found else None


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)
