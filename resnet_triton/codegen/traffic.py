"""How many bytes the programs of a launch load, read from the kernel's intermediate code (TTIR).

Every load there names its block's shape and type, and every loop its bounds, so the count follows the kernel as it is
written: what is kept resident or loaded once for several uses counts once, without a formula for each kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod

_BLOCK = r"tensor<((?:\d+x)*)(?:!tt\.ptr<)?(?:bf|f|i)(\d+)"  # bits of an element, whatever their meaning
_LOAD = re.compile(rf"= tt\.load .* : (?:{_BLOCK}|!tt\.ptr<(?:bf|f|i)(\d+))")
_DESCRIPTOR_LOAD = re.compile(rf"= tt\.descriptor_(?:load|gather) .* -> {_BLOCK}")
_FOR = re.compile(r"scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+) ")
_CONSTANT = re.compile(r"(%\S+) = arith\.constant (-?\d+) : ")
_PROGRAM = re.compile(r"(%\S+) = tt\.get_(program_id|num_programs) ([xyz])")
_CAST = re.compile(r"(%\S+) = arith\.(?:extsi|extui|trunci|index_cast) (%\S+) ")
_BINARY = re.compile(r"(%\S+) = arith\.(\w+) (%\S+), (%\S+) : ")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": lambda a, b: a // b, "divui": lambda a, b: a // b, "ceildivsi": lambda a, b: -(-a // b),
    "remsi": lambda a, b: a % b, "minsi": min, "maxsi": max,
}  # fmt: skip


def loaded_bytes(ttir: str, integers: Mapping[str, int], grid: tuple[int, ...], split: int = 1) -> int | None:
    """Bytes that all programs of a `grid` ask for; None if a loop's length cannot be told.

    `integers` are the kernel's arguments by name. With `split` programs to a tile, one of them takes each branch: the
    share that adds the shortcut, the last arriver that sums up. Other branches count as taken and masked elements as
    loaded, so this is an upper bound; elements loaded twice from a first-level cache count twice.
    """
    known = {f"%{name}": value for name, value in integers.items()}
    programs: set[str] = set()  # names of program ids
    times = [1.0]  # how often a program runs the innermost open region
    total = 0.0
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("}"):
            times.pop()
        if line.endswith("{"):
            if (loop := _FOR.search(line)) is not None:
                trips = _trips(loop, known, programs)
                if trips is None:
                    return None
                times.append(times[-1] * trips)
            else:
                times.append(times[-1] / split if "scf.if" in line or "else" in line else times[-1])
        elif line.startswith("cf.cond_br"):  # an early return
            times[-1] /= split
        elif (load := _LOAD.search(line) or _DESCRIPTOR_LOAD.search(line)) is not None:
            shape, *bits = load.groups()
            elements = prod(int(size) for size in (shape or "").split("x") if size)
            total += times[-1] * elements * int(bits[0] or bits[1]) / 8
        else:
            _learn(line, known, programs, grid)
    return round(total * prod(grid))


def _trips(loop: re.Match[str], known: Mapping[str, int], programs: set[str]) -> float | None:
    """How often a loop runs, on the average of all programs; None if that cannot be told."""
    start, stop, step = loop.groups()
    if stop not in known or step not in known:
        return None
    if start in programs:  # each starts at its own number: they share one range evenly
        return known[stop] / known[step]
    return max(-(-(known[stop] - known[start]) // known[step]), 0) if start in known else None


def _learn(line: str, known: dict[str, int], programs: set[str], grid: tuple[int, ...]) -> None:
    """Note the value a line computes, if it is an integer that loops may depend on."""
    if (found := _CONSTANT.match(line)) is not None:
        known[found[1]] = int(found[2])
    elif (found := _PROGRAM.match(line)) is not None:
        axis = "xyz".index(found[3])
        if found[2] == "num_programs":
            known[found[1]] = grid[axis] if axis < len(grid) else 1
        else:
            programs.add(found[1])
    elif (found := _CAST.match(line)) is not None and found[2] in known:
        known[found[1]] = known[found[2]]
    elif (found := _BINARY.match(line)) is not None and found[3] in known and found[4] in known:
        operation = _ARITHMETIC.get(found[2])
        if operation is not None:
            known[found[1]] = operation(known[found[3]], known[found[4]])
