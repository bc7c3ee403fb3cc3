"""Which groups of warps run which part of a kernel's PTX, and the barriers at which all of one group meet.

A warp-specialised kernel begins with its first warps. The others read their number's byte in a table that the first
ones stored in shared memory, and a switch leads them to their part. The number of a byte's value in the table is that
of the warps that go there. A group meets at a numbered barrier of its own; a warp alone, at its own convergence.
"""

from __future__ import annotations

import re
from itertools import groupby

from . import flow as flows
from .flow import Flow

TOGETHER = "bar.sync 0;"
"""How a line is written that all warps of the group that runs it wait at."""
_WARP = 32
_BARRIER = re.compile(r"\s*bar(?:rier)?\.(?:cta\.)?sync(?:\.aligned)?\s+(\w+)\s*(?:,\s*(\w+)\s*)?;")
_ALONE = re.compile(r"\s*bar\.warp\.sync\s+(?:-1|0xffffffff)\s*;")
_SWITCH = re.compile(r"\bbrx\.idx")
_BYTES = re.compile(r"\s*st\.shared\.(?:v\d\.)?b(\d+)\s+\[global_smem[^]]*\],\s*\{?((?:\s*-?\d+,?)+)\s*\}?;")


def threads(text: str) -> int:
    """How many threads a program has, as PTX says; 0 if it does not."""
    found = re.search(r"^\s*\.reqntid\s+(\d+)\s*(?:,\s*1\s*)*$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def ptx(text: str) -> Flow:
    """The flow of PTX, with every barrier that all warps of the group that runs it wait at written as TOGETHER.

    A barrier of fewer or more warps, and one whose number another group uses as well, stays as it was.
    """
    flow = flows.ptx(text)
    total = threads(text)
    sizes, runs = _groups(flow, total)
    users: dict[str, set[int]] = {}
    partial: list[tuple[int, str, str]] = []
    for i, line in enumerate(flow.lines):
        if not (barrier := _BARRIER.match(line)):
            if _ALONE.match(line) and _size(i, sizes, runs) == _WARP:
                flow.lines[i] = TOGETHER
        elif barrier[2] is None or barrier[2] == str(total):
            flow.lines[i] = TOGETHER
        else:
            partial.append((i, barrier[1], barrier[2]))
            users.setdefault(barrier[1], set()).update(group for group, lines in runs.items() if i in lines)
    for i, number, count in partial:
        if len(users[number]) == 1 and count == str(_size(i, sizes, runs)):
            flow.lines[i] = TOGETHER
    return flow


def _size(line: int, sizes: dict[int, int], runs: dict[int, set[int]]) -> int:
    """Threads of the group that runs a line; 0 if it is not known, or not one."""
    there = [group for group, lines in runs.items() if line in lines]
    return sizes[there[0]] if len(there) == 1 else 0


def _groups(flow: Flow, total: int) -> tuple[dict[int, int], dict[int, set[int]]]:
    """By its first line, each group's threads (0: not known) and the lines that it runs."""
    at = {i for i, line in enumerate(flow.lines) if _SWITCH.search(line)}
    switches = [flow.next[i] for i in at]
    tables = _tables(flow) if switches else []
    sizes = {0: total - _WARP * len(tables[0]) if tables else 0 if switches else total}
    for places in switches:
        for to in places:
            counts = {sum(places[value] == to for value in table if value < len(places)) for table in tables} - {0}
            sizes[to] = _WARP * counts.pop() if len(counts) == 1 else 0
    if len(set(map(len, tables))) > 1:
        sizes = dict.fromkeys(sizes, 0)
    return sizes, {start: {start} | flow.after({start}, at) for start in sizes}


def _tables(flow: Flow) -> list[bytes]:
    """The tables of the switch: constants that are stored in shared memory one after another."""
    tables = []
    for stored, lines in groupby(flow.lines, key=lambda line: bool(_BYTES.match(line))):
        if stored:
            table = b""
            for found in map(_BYTES.match, lines):
                assert found is not None
                size = int(found[1])
                for value in re.findall(r"-?\d+", found[2]):
                    table += (int(value) % (1 << size)).to_bytes(size // 8, "little")
            tables.append(table)
    return tables
