"""PTX as text, read once: parameters, labels, branch tables, registers and a flat list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Unknown(Exception):
    """PTX that the simulator has no meaning for. It guesses nothing: teach it, in the file that raises this."""


class Instruction(NamedTuple):
    line: int
    """In the PTX text, from 1."""
    guard: str | None
    negated: bool
    op: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' * self.negated}{self.guard} "
        text = f"{guard}{self.op} {', '.join(self.operands)}"
        return text if len(text) <= 90 else text[:87] + "..."


@dataclass
class Kernel:
    """One entry function."""

    name: str
    parameters: list[tuple[str, int]] = field(default_factory=list)
    """Names, and sizes in bytes."""
    threads: int = 0
    shared: list[str] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    """The type of each declared name, a `<n>` left off: {"%r": "b32"}."""

    def type_of(self, register: str) -> str:
        name = register if register in self.registers else register.rstrip("0123456789")
        if name not in self.registers:
            raise Unknown(f"{self.name} declares no register {register}")
        return self.registers[name]


_SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
_SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}
_STATEMENT = re.compile(r"\s*(?:\.(?:loc|file)\b[^\n]*|([{}])|([$\w]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
_GUARDED = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_NAME = re.compile(r"[%$\w]+")


def parse(text: str) -> Kernel:
    """The entry function of a PTX text. Raises Unknown if there is not exactly one, or if it reads no sense in it."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), re.sub(r"//[^\n]*", "", text), flags=re.S)
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(entries) != 1:
        raise Unknown(f"{len(entries)} entry functions, expected one")
    (entry,) = entries
    kernel = Kernel(entry[1])
    for parameter in filter(str.strip, entry[2].split(",")):
        words = parameter.split()
        name, _, count = words[-1].partition("[")
        size = next(_SIZES[word[1:]] for word in words if word[1:] in _SIZES)
        kernel.parameters.append((name, size * int(count.rstrip("]") or 1)))
    threads = re.search(r"\.reqntid\s+(\d+(?:\s*,\s*\d+)*)", entry[3])
    if threads is None:
        raise Unknown(f"{kernel.name} has no .reqntid, which says how many threads a program has")
    kernel.threads = 1
    for side in threads[1].split(","):
        kernel.threads *= int(side)
    kernel.shared = re.findall(r"\.extern\s+\.shared\s[^;]*?([$\w]+)\[\]\s*;", text)
    _body(kernel, text, entry.end())
    return kernel


def _body(kernel: Kernel, text: str, position: int) -> None:
    """Statements until the brace that closes the function. Names declared in an inner block are its own."""
    scopes, opened, label = [""], 0, ""
    pending: list[tuple[tuple[str, ...], int, str]] = []  # statements, for a block's labels may stand behind their use
    names: dict[str, set[str]] = {"": set()}
    while scopes:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise Unknown(f"{kernel.name}: no statement: {text[position : position + 60].strip()!r}")
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
            kernel.labels[label] = len(pending)
        elif statement is not None:
            words = statement.split(None, 2)
            if words[0] == ".reg":
                for register in words[2].split(","):
                    register = register.strip().partition("<")[0]
                    names[scopes[-1]].add(register)
                    kernel.registers[register + scopes[-1]] = words[1][1:]
            elif words[0] == ".branchtargets":
                kernel.tables[label] = _NAME.findall(statement.partition(words[0])[2])
            elif words[0] == ".pragma":
                continue
            elif words[0].startswith("."):
                raise Unknown(f"{kernel.name}: directive {statement.strip()!r}")
            else:
                pending.append((tuple(scopes), text.count("\n", 0, position) + 1, statement.strip()))
    for scope, line, statement in pending:
        inner = scope[1:]

        def own(match: re.Match[str], inner: tuple[str, ...] = inner) -> str:
            return match[0] + next((s for s in reversed(inner) if match[0] in names[s]), "")

        match = _GUARDED.fullmatch(_NAME.sub(own, statement) if inner else statement)
        if match is None:
            raise Unknown(f"{kernel.name}, line {line}: {statement!r}")
        negated, guard, op, operands = match.groups()
        kernel.code.append(Instruction(line, guard, bool(negated), op, tuple(_split(operands))))


def _split(operands: str) -> list[str]:
    """Operands, with commas within braces and brackets left alone."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*parts, last] if last else parts
