"""What a kernel does before it waits for the launch before it (griddepcontrol, in machine code ACQBULK).

Until then that launch may still write its results and read what this one is to write. So before the wait there is no
store and no atomic; the next launch is not let in, which would meet a third; and what is read is told by the numbers of
the parameters that its addresses come from, for whoever knows what these are. PTX says which. That the assembler has
moved nothing before the wait, the numbers of loads say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

from .flow import Flow, sass

_TENSOR_LOAD = re.compile(r"\bcp\.async\.bulk\.tensor\.[\w.:]*shared[\w.:]*\.global[\w.:]*\s+\[[^]]*\], \[([^]]*)\]")
_LOAD = re.compile(r"\b(?:ld\.(?:\w+\.)*?global|cp\.async\.c[ag])[\w.:]*\s+.*\[([^]]*)\]")
_STORE = re.compile(
    r"\bst\.[\w.:]*global|(?<![\w.])(?:atom|red)\.[\w.:]*global|\bcp\.(?:reduce\.)?async\.bulk[\w.:]*\.global\.shared"
)
_WAIT, _LET_IN = re.compile(r"\bgriddepcontrol\.wait\b"), re.compile(r"\bgriddepcontrol\.launch_dependents\b")
_RESULT = re.compile(r"\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|[^,]*),(.*);")
_MACHINE_LOADS = {"UTMALDG": _TENSOR_LOAD, "LDG": _LOAD, "LDGSTS": _LOAD}
_MACHINE_STORES = re.compile(r"\b(?:STG|ATOMG?|REDG?|UTMASTG|UTMAREDG|UBLKCP)\b")


class Early(NamedTuple):
    """Numbers of the parameters that memory is read through before the wait, and what must not be there."""

    parameters: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()


def follow(ptx: Flow, machine: str) -> Early:
    """What a kernel's PTX and machine code do before the wait; nothing, if it does not wait."""
    waits = {i for i, line in enumerate(ptx.lines) if _WAIT.search(line)}
    if not waits:
        unwaited = any(_LET_IN.search(line) for line in ptx.lines)
        return Early((), ("the next launch is let in, and this one waits for none before",) if unwaited else ())
    entry = {next(i for i, line in enumerate(ptx.lines) if ".entry" in line)}
    early = [ptx.lines[i] for i in sorted(ptx.after(entry, waits) - waits)]
    faults = []
    if any(map(_STORE.search, early)):
        faults.append("a store or an atomic before griddepcontrol.wait")
    if any(map(_LET_IN.search, early)):
        faults.append("griddepcontrol.launch_dependents before griddepcontrol.wait")
    faults += _moved(early, machine)
    return Early(_parameters(early, ptx.lines), tuple(faults))


def _parameters(early: list[str], lines: list[str]) -> tuple[int, ...]:
    """Whatever a register's value may have come from, wherever that was."""
    sources: dict[str, set[str]] = defaultdict(set)
    for _ in range(2):  # the second time for loops
        for line in lines:
            if made := _RESULT.match(line):
                used = re.findall(r"%\w+|\w+_param_\d+", made[2])
                everything = set().union(*(sources[name] | {name} for name in used))
                for result in re.findall(r"%\w+", made[1]):
                    sources[result] |= everything
    negative = {made[1] for line in lines if (made := re.match(r"\s*mov\.[bsu]32\s+(%\w+), -\d+;", line))}
    found = set()
    for line in early:
        if load := _TENSOR_LOAD.search(line) or _LOAD.search(line):
            names = re.findall(r"%\w+", load[1])
            if not negative.intersection(names[1:]):  # a box that begins so far outside fetches a descriptor, no data
                found |= {name for name in sources[names[0]] if "_param_" in name}
    return tuple(sorted(int(name.rpartition("_")[2]) for name in found))


def _moved(early: list[str], machine: str) -> list[str]:
    """What the assembler has put before the wait."""
    flow = sass(machine)
    waits = {i for i, line in enumerate(flow.lines) if re.search(r"\bACQBULK\b", line)}
    if not waits:
        return ["no ACQBULK in the machine code, expected that of griddepcontrol.wait"]
    start = next(i for i, line in enumerate(flow.lines) if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line))
    before = [flow.lines[i] for i in sorted({start} | flow.after({start}, waits))]
    faults = []
    if any(re.search(r"\bPREEXIT\b", line) for line in before):
        faults.append("PREEXIT before ACQBULK")
    if any(map(_MACHINE_STORES.search, before)):
        faults.append("a store or an atomic before ACQBULK")
    for name, pattern in _MACHINE_LOADS.items():
        loads = sum(bool(re.search(rf"\b{name}\b", line)) for line in before)
        known = sum(bool(pattern.search(line)) for line in early)
        if loads > known:
            faults.append(f"{loads} {name} before ACQBULK, expected at most {known}")
    return faults
