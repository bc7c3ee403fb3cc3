"""PTX as text, read once: parameters, labels, branch tables, registers and a flat list of instructions."""

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Unknown(Exception):
    """PTX that the simulator has no meaning for. It guesses nothing: teach it, in the file that raises this."""


class Instruction(NamedTuple):
    place: str
    negated: str  # "!" if it is done where its guard is false
    guard: str | None
    op: str
    operands: list[str]


@dataclass
class Kernel:
    """One entry function."""

    name: str
    threads: int
    maxnreg: int  # registers that a thread begins with, where it says so
    shared: str  # what its shared memory is called
    parameters: list[str]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # types of declared names, `<n>` left off: {"%r": "b32"}


_ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)[^{]*\.reqntid\s+([\d, ]+)[^{]*\{")
_STATEMENT = re.compile(r"(\.(?:loc|file)\b[^\n]*)|([{}])|([$\w]+):(?!:)|([^\s;{}][^;{}]*(?:\{[^{}]*\}[^;{}]*)*);|\S")
_GUARDED = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_NAME = re.compile(r"[%$\w]+")
_OPERAND = re.compile(r"\s*((?:\[[^\]]*\]|\{[^}]*\}|[^,{\[])+)\s*(?:,|$)")


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Kernel:
    """The entry function of a PTX text. Raises Unknown if there is not exactly one, or where it makes no sense."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(_ENTRY.finditer(text))
    shared = re.findall(r"\.extern\s+\.shared\s[^;]*?([$\w]+)\[\]\s*;", text)
    if len(entries) != 1 or len(shared) > 1:
        raise Unknown(f"{len(entries)} entry functions with .reqntid and {len(shared)} shared memories, expected one")
    name, parameters, threads = entries[0].groups()
    names = re.findall(r"([$\w]+)(?:\[\d+\])?\s*(?:,|$)", parameters)
    maxnreg = int("".join(re.findall(r"\.maxnreg\s+(\d+)", entries[0][0])) or 0)
    kernel = Kernel(name, math.prod(map(int, threads.split(","))), maxnreg, "".join(shared), names)
    for line, statement in _statements(kernel, text, entries[0].end()):
        place = f"line {line}, {' '.join(statement.split()):.90}"
        negated, guard, op, operands = _GUARDED.fullmatch(statement).groups()
        op, split = op.replace("shared::cta", "shared"), [x.strip() for x in _OPERAND.findall(operands)]
        kernel.code.append(Instruction(place, negated, guard, op, split))
    return kernel


def _renamed(text: str, names: dict[str, str]) -> str:
    return _NAME.sub(lambda match: names.get(match[0], match[0]), text)


def _statements(kernel: Kernel, text: str, position: int) -> list[tuple[int, str]]:
    """Instructions until the brace that closes the function, with their lines. Names of an inner block are its own."""
    found: list[tuple[int, str]] = []
    blocks: list[tuple[int, list[str]]] = [(0, [])]  # open ones: their first instruction, the names declared in them
    line, label = text.count("\n", 0, position) + 1, ""
    for match in _STATEMENT.finditer(text, position):
        source, brace, name, statement = match.groups()
        line, position = line + text.count("\n", position, match.end()), match.end()
        directive, rest = (*(statement or "").split(None, 1), "", "")[:2]
        declared = [name] * bool(name)
        if brace == "{":
            blocks.append((len(found), []))
        elif brace == "}":
            first, names = blocks.pop()
            if not blocks:
                return found
            own = {name: f"{name}${line}" for name in names}
            found[first:] = [(n, _renamed(text, own)) for n, text in found[first:]]
            for table in (kernel.labels, kernel.registers):
                table.update({own[name]: table.pop(name) for name in names if name in table})
        elif name:
            label = name
            kernel.labels[name] = len(found)
        elif directive == ".reg":
            type_, registers = rest.split(None, 1)
            declared = [register.strip().partition("<")[0] for register in registers.split(",")]
            kernel.registers |= dict.fromkeys(declared, type_[1:])
        elif directive == ".branchtargets":
            kernel.tables[label] = _NAME.findall(rest)
        elif statement and directive[0] != ".":
            found.append((line, statement))
        elif directive != ".pragma" and not source:
            raise Unknown(f"{kernel.name}, line {line}: {match[0]!r}")
        blocks[-1][1].extend(declared)
    raise Unknown(f"{kernel.name}: a function without an end")
