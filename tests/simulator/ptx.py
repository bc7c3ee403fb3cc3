"""PTX as text, read once: parameters, labels, branch tables, registers and a flat list of instructions."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Unknown(Exception):
    """PTX that the simulator has no meaning for. It guesses nothing: teach it, in the file that raises this."""


class Instruction(NamedTuple):
    line: int
    """In the PTX text, from 1."""
    negated: bool
    guard: str | None
    op: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        text = f"{guard}{self.op} {', '.join(self.operands)}"
        return text if len(text) <= 90 else text[:87] + "..."


@dataclass
class Kernel:
    """One entry function."""

    name: str
    threads: int
    shared: str
    """What its shared memory is called."""
    parameters: dict[str, int]
    """Sizes in bytes."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    """Types of declared names, a `<n>` left off: {"%r": "b32"}."""


_STATEMENT = re.compile(r"\s*(?:\.(?:loc|file)\b[^\n]*|([{}])|([$\w]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
_GUARDED = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_NAME = re.compile(r"[%$\w]+")
_OPERAND = re.compile(r"\s*((?:\[[^\]]*\]|\{[^}]*\}|[^,{\[])+)\s*(?:,|$)")


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Kernel:
    """The entry function of a PTX text. Raises Unknown if there is not exactly one, or where it makes no sense."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)[^{]*\.reqntid\s+([\d, ]+)[^{]*\{", text))
    shared = re.findall(r"\.extern\s+\.shared\s[^;]*?([$\w]+)\[\]\s*;", text)
    if len(entries) != 1 or len(shared) > 1:
        raise Unknown(f"{len(entries)} entry functions with .reqntid and {len(shared)} shared memories, expected one")
    (entry,) = entries
    kernel = Kernel(entry[1], math.prod(map(int, entry[3].split(","))), "".join(shared), {})
    for parameter in filter(str.strip, entry[2].split(",")):
        bits, name, count = re.search(r"\.[busf](\d+)\s.*?([$\w]+)(?:\[(\d+)\])?\s*$", parameter.strip()).groups()
        kernel.parameters[name] = int(bits) // 8 * int(count or 1)
    _read_body(kernel, text, entry.end())
    return kernel


def _read_body(kernel: Kernel, text: str, position: int) -> None:
    """Statements until the brace that closes the function. Names declared in an inner block are its own."""
    scopes, opened, label, line = [""], 0, "", text.count("\n", 0, position) + 1
    names: dict[str, set[str]] = {"": set()}
    found: list[tuple[tuple[str, ...], int, str]] = []  # not yet read: a block's labels may stand behind their use
    while scopes:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise Unknown(f"{kernel.name}: no statement: {text[position : position + 60].strip()!r}")
        line += text.count("\n", position, match.end())
        position = match.end()
        brace, name, statement = match.groups()
        if brace == "{":
            opened += 1
            scopes.append(f"${opened}")
            names[scopes[-1]] = set()
        elif brace == "}":
            scopes.pop()
        elif name is not None:
            names[scopes[-1]].add(name)
            label = name + scopes[-1]
            kernel.labels[label] = len(found)
        elif statement is not None:
            directive = statement.split()[0]
            if directive == ".reg":
                _, type_, registers = statement.split(None, 2)
                for register in registers.split(","):
                    register = register.strip().partition("<")[0]
                    names[scopes[-1]].add(register)
                    kernel.registers[register + scopes[-1]] = type_[1:]
            elif directive == ".branchtargets":
                kernel.tables[label] = _NAME.findall(statement.partition(directive)[2])
            elif directive.startswith(".") and directive != ".pragma":
                raise Unknown(f"{kernel.name}: directive {statement.strip()!r}")
            elif directive != ".pragma":
                found.append((tuple(scopes), line, statement.strip()))
    for scope, line, statement in found:

        def inner(match: re.Match[str], scope: tuple[str, ...] = scope) -> str:
            return match[0] + next(s for s in reversed(scope) if s == "" or match[0] in names[s])

        negated, guard, op, operands = _GUARDED.fullmatch(_NAME.sub(inner, statement)).groups()
        split = tuple(operand.strip() for operand in _OPERAND.findall(operands))
        kernel.code.append(Instruction(line, bool(negated), guard, op.replace("shared::cta", "shared"), split))
