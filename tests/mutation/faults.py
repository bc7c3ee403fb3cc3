"""Mutants of a kernel file: copies with one small fault each, of the kind that people make."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

SYMBOLS = {
    ast.Lt: ["<=", ">="], ast.LtE: ["<", ">"], ast.Gt: [">=", "<="], ast.GtE: [">", "<"], ast.Eq: ["!="],
    ast.NotEq: ["=="], ast.Is: ["is not"], ast.IsNot: ["is"],
    ast.Add: ["-"], ast.Sub: ["+"], ast.Mult: ["+"], ast.Div: ["*"], ast.FloorDiv: ["%"], ast.Mod: ["//"],
    ast.BitAnd: ["|"], ast.BitOr: ["&"], ast.LShift: [">>"], ast.And: ["or"], ast.Or: ["and"],
}  # fmt: skip
WRITTEN = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%",
    ast.BitAnd: "&", ast.BitOr: "|", ast.LShift: "<<", ast.And: "and", ast.Or: "or",
}  # fmt: skip
STRINGS = {"inf": "0", "-inf": "0", "acq_rel": "relaxed", "gpu": "cta", ".cg": ""}
OTHER_CALL = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "sqrt_rn": "sqrt", "sqrt": "sqrt_rn",
}  # fmt: skip
DROPPED_CALLS = {"relu", "abs", "trans", "_inside"}  # f(x, ...) becomes x
DROPPED_METHODS = {"to", "permute", "bit_length"}  # x.f(...) becomes x
COMMUTATIVE = {"minimum", "maximum", "min", "max", "where"}
PARTNERS = {a: b for pair in ("hw", "pq", "PQ", "HW", "rs", "RS", "KC", "kc") for a, b in (pair, pair[::-1])}

Fault = tuple[str, int, int, str]  # kind, first byte, byte after the last, what stands there instead


@dataclass(frozen=True)
class Mutant:
    """One function with one fault. `before` and `after` are the lines it changes, joined."""

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    source: str

    @property
    def where(self) -> str:
        """The function by its full name: two files may have one of a name."""
        return f"{self.file}:{self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function} [{self.kind}]\n  - {self.before}\n  + {self.after}"


class Source:
    """A file's text and where its nodes stand in it."""

    def __init__(self, text: str) -> None:
        self.data = text.encode()
        self.starts = [0, *accumulate(len(line) for line in self.data.splitlines(keepends=True))]

    def span(self, node: ast.AST) -> tuple[int, int]:
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        first, end = self.span(node)
        return self.data[first:end].decode()

    def inner(self, node: ast.AST) -> str:
        """The text of an operand that will stand elsewhere."""
        return self.text(node) if isinstance(node, ast.Name | ast.Call | ast.Subscript) else f"({self.text(node)})"

    def replaced(self, first: int, end: int, new: str) -> str:
        return (self.data[:first] + new.encode() + self.data[end:]).decode()

    def lines(self, first: int, end: int) -> tuple[int, int]:
        """The whole lines around these bytes."""
        start = self.data.rfind(b"\n", 0, first) + 1
        stop = self.data.find(b"\n", end)
        return start, len(self.data) if stop < 0 else stop


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of every function and method of a file, in the order of its lines."""
    text = path.read_text(encoding="utf-8")
    return [mutant for name, node in functions(ast.parse(text)) for mutant in _of(Source(text), path.name, name, node)]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{inner.name}", inner) for inner in node.body if isinstance(inner, ast.FunctionDef)
            )


def _of(source: Source, file: str, name: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
    names |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    first_line = min(node.lineno for node in (function, *function.decorator_list))
    head, tail = source.starts[first_line - 1], len(source.data) - source.span(function)[1]
    seen = {source.data.decode()}
    for node in _code(function):
        for kind, first, end, new in [*_faults(source, node), *_of_names(source, node, names, function)]:
            mutated = source.replaced(first, end, new)
            if mutated in seen:
                continue
            seen.add(mutated)
            data = mutated.encode()
            if not _is_python(data[head : len(data) - tail].decode()):
                continue
            start, stop = source.lines(first, end)
            before, after = source.data[start:stop], data[start : stop + len(data) - len(source.data)]
            yield Mutant(file, name, node.lineno, kind, _one_line(before), _one_line(after), mutated)


def _one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


def _is_python(function: str) -> bool:
    try:
        ast.parse(textwrap.dedent(function))
    except SyntaxError:
        return False
    return True


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body that are evaluated: not its signature, annotations, f-strings or keys.

    Nor a cast of what is stored: the store casts anyway. `other=0.0` has a fault of its own.
    """
    skipped: list[ast.AST | None] = []
    hidden: ast.AST | None = None
    match node:
        case ast.Call(func=ast.Attribute(attr="store"), args=[_, ast.Call(func=ast.Attribute(attr="to")) as hidden]):
            pass
        case ast.keyword(arg="other", value=ast.Constant(value=0.0)):
            return
        case ast.FunctionDef():
            skipped = [node.args, node.returns, *node.decorator_list]
        case ast.AnnAssign():
            skipped = [node.annotation]
        case ast.Dict():
            skipped = [*node.keys]
        case ast.JoinedStr():
            return
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            if child is not hidden:
                yield child
            yield from _code(child)


def _faults(source: Source, node: ast.AST) -> Iterator[Fault]:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            yield from _symbols(source, op, left, right)
        case ast.BinOp(left=left, op=op, right=right):
            yield from _symbols(source, op, left, right)
            if isinstance(op, ast.BitAnd | ast.BitOr):
                yield from (("drop side", *source.span(node), source.inner(side)) for side in (left, right))
        case ast.BoolOp(op=op, values=values):
            for left, right in pairwise(values):
                yield from _symbols(source, op, left, right)
            if len(values) == 2:
                yield from (("drop side", *source.span(node), source.inner(side)) for side in values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "drop sign", *source.span(node), source.inner(operand)
        case ast.Constant(value=bool(value)):
            yield "flip", *source.span(node), str(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", *source.span(node), str(value + 1)
        case ast.Constant(value=str(value)) if value in STRINGS:
            yield "string", *source.span(node), f'"{STRINGS[value]}"'
        case ast.AugAssign(target=target, op=op, value=value):
            yield from _symbols(source, op, target, value)
            yield "drop statement", *source.span(node), "pass"
        case ast.Expr(value=ast.Call()) | ast.Return(value=None):
            yield "drop statement", *source.span(node), "pass"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "negate", *source.span(test), f"not {source.inner(test)}"
        case ast.Call():
            yield from _of_call(source, node)
        case ast.Attribute(attr="T", value=value):
            yield "drop call", *source.span(node), source.inner(value)
        case ast.List(elts=values) | ast.Tuple(elts=values) | ast.Dict(values=values):
            yield from _swapped(source, values)


def _symbols(source: Source, op: ast.AST, left: ast.AST, right: ast.AST) -> Iterator[Fault]:
    first, end = source.span(left)[1], source.span(right)[0]
    gap = source.data[first:end].decode()
    for symbol in SYMBOLS[type(op)]:
        yield "operator", first, end, gap.replace(WRITTEN[type(op)], symbol, 1)


def _swapped(source: Source, values: list[ast.expr]) -> Iterator[Fault]:
    """Neighbours of one kind change places."""
    for a, b in pairwise(values):
        if type(a) is type(b) and isinstance(a, ast.Name | ast.Subscript | ast.Attribute):
            (first, a_end), (b_first, end) = source.span(a), source.span(b)
            yield "swap", first, end, source.text(b) + source.data[a_end:b_first].decode() + source.text(a)


def _of_call(source: Source, node: ast.Call) -> Iterator[Fault]:
    function, arguments = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in OTHER_CALL:
        first, end = source.span(function)
        yield "call", end - len(name), end, OTHER_CALL[name]
    if name in DROPPED_CALLS and arguments:
        yield "drop call", *source.span(node), source.inner(arguments[0])
    if name in DROPPED_METHODS and isinstance(function, ast.Attribute):
        yield "drop call", *source.span(node), source.inner(function.value)
    if name == "where":
        (first, middle), (again, end) = source.span(arguments[1]), source.span(arguments[2])
        between = source.data[middle:again].decode()
        yield "swap", first, end, source.text(arguments[2]) + between + source.text(arguments[1])
    for other in [k.value for k in node.keywords if k.arg == "other"]:
        if source.text(other) == "0.0":
            yield "masked value", *source.span(other), 'float("nan")'
    if name in ("cdiv", "div_rn"):
        a, b = map(source.inner, arguments)
        yield "call", *source.span(node), f"({a} {'//' if name == 'cdiv' else '/'} {b})"
    if name not in COMMUTATIVE:
        yield from _swapped(source, arguments)


def _of_names(source: Source, node: ast.AST, names: set[str], function: ast.FunctionDef) -> Iterator[Fault]:
    """Faults that depend on what else the function knows: a name's partner, a value from before."""
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            partner = _partner(name)
            if partner in names:
                yield "partner", *source.span(node), partner
        case ast.Assign(targets=[ast.Name(id=name)]):
            arguments = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
            stored = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            if name in arguments or any(n.id == name and n.lineno < node.lineno for n in stored):
                yield "drop statement", *source.span(node), "pass"


def _partner(name: str) -> str:
    """The name that one takes by mistake: rows for columns, output for input channels. Empty if there is none."""
    head, _, tail = name.rpartition("_")
    if tail in PARTNERS and head:
        return f"{head}_{PARTNERS[tail]}"
    return PARTNERS[name[0]] + name[1:] if name[:1] in PARTNERS and name[1:] in ("", "0") else ""
