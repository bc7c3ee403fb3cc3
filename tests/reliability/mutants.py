"""Mutants of a kernel file: copies with one small fault each, of the kind that people make."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from .places import Mutant, Source

OPERATORS: dict[type[ast.AST], list[type[Any]]] = {
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Add], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mod],
    ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd], ast.LShift: [ast.RShift],
    ast.And: [ast.Or], ast.Or: [ast.And], ast.BitXor: [ast.BitOr], ast.Pow: [ast.Mult], ast.RShift: [ast.LShift],
}  # fmt: skip
STRINGS = {"inf": "0", "-inf": "0", "acq_rel": "relaxed", "gpu": "cta", ".cg": ""}
OTHER_CALL = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "sqrt_rn": "sqrt", "sqrt": "sqrt_rn",
}  # fmt: skip
DROPPED_CALLS = {"activate", "relu", "abs", "trans", "_inside"}  # f(x, ...) becomes x
DROPPED_METHODS = {"to", "permute", "bit_length"}  # x.f(...) becomes x
INSTEAD = {"cdiv": ast.FloorDiv, "div_rn": ast.Div}  # f(x, y) becomes x // y
COMMUTATIVE = {"minimum", "maximum", "min", "max", "where"}
PARTNERS = {a: b for pair in ("hw", "pq", "PQ", "HW", "rs", "RS", "KC", "kc") for a, b in (pair, pair[::-1])}

Fault = tuple[str, ast.AST, ast.AST]  # kind, a node, what stands there instead


def mutants(source: Source) -> Iterator[Mutant]:
    """Every mutant of every function and method of a file, in the order of its lines."""
    for name, function in source.functions.items():
        seen = {source.data.decode()}
        arguments = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        stored = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for node in _code(function):
            for kind, old, new in [*_faults(node), *_of_names(node, arguments, stored)]:
                mutant = source.mutant(name, kind, old, new)
                if mutant.source not in seen:
                    seen.add(mutant.source)
                    yield mutant


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


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    other = copy.copy(node)
    vars(other).update(fields)
    return other


def _faults(node: ast.AST) -> Iterator[Fault]:
    match node:
        case ast.Compare(ops=[op]):
            yield from (("operator", node, _with(node, ops=[other()])) for other in OPERATORS.get(type(op), ()))
        case ast.BinOp(left=left, op=op, right=right):
            yield from (("operator", node, _with(node, op=other())) for other in OPERATORS.get(type(op), ()))
            if isinstance(op, ast.BitAnd | ast.BitOr):
                yield from (("drop side", node, side) for side in (left, right))
        case ast.BoolOp(op=op, values=values):
            for i in range(1, len(values)):
                sides = [ast.BoolOp(op, side) if len(side) > 1 else side[0] for side in (values[:i], values[i:])]
                yield "operator", node, ast.BoolOp(OPERATORS[type(op)][0](), sides)
            if len(values) == 2:
                yield from (("drop side", node, side) for side in values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "drop sign", node, operand
        case ast.Constant(value=bool(value)):
            yield "flip", node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if value in STRINGS:
            yield "string", node, ast.Constant(STRINGS[value])
        case ast.AugAssign(op=op):
            yield from (("operator", node, _with(node, op=other())) for other in OPERATORS.get(type(op), ()))
            yield "drop statement", node, ast.Pass()
        case ast.Expr(value=ast.Call()) | ast.Return(value=None):
            yield "drop statement", node, ast.Pass()
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "negate", test, ast.UnaryOp(ast.Not(), test)
        case ast.Call():
            yield from _of_call(node)
        case ast.Attribute(attr="T", value=value):
            yield "drop call", node, value
        case ast.List(elts=values) | ast.Tuple(elts=values):
            yield from (("swap", node, _with(node, elts=swapped)) for swapped in _swapped(values))
        case ast.Dict(values=values):
            yield from (("swap", node, _with(node, values=swapped)) for swapped in _swapped(values))


def _swapped(values: list[ast.expr]) -> Iterator[list[ast.expr]]:
    """Neighbours of one kind change places."""
    for i, (a, b) in enumerate(pairwise(values)):
        alike = type(a) is type(b) and ast.unparse(a) != ast.unparse(b)
        if alike and isinstance(a, ast.Name | ast.Subscript | ast.Attribute):
            yield [*values[:i], b, a, *values[i + 2 :]]


def _of_call(node: ast.Call) -> Iterator[Fault]:
    function, arguments = node.func, node.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in OTHER_CALL:
        field = "attr" if isinstance(function, ast.Attribute) else "id"
        yield "call", function, _with(function, **{field: OTHER_CALL[name]})
    if name in DROPPED_CALLS and arguments:
        yield "drop call", node, arguments[0]
    if name in DROPPED_METHODS and isinstance(function, ast.Attribute):
        yield "drop call", node, function.value
    if name == "where":
        yield "swap", node, _with(node, args=[arguments[0], arguments[2], arguments[1]])
    for keyword in node.keywords:
        if keyword.arg == "other" and ast.unparse(keyword.value) == "0.0":
            yield "masked value", keyword.value, ast.parse("float('nan')", mode="eval").body
    if name in INSTEAD:
        yield "call", node, ast.BinOp(arguments[0], INSTEAD[name](), arguments[1])
    if name not in COMMUTATIVE:
        yield from (("swap", node, _with(node, args=swapped)) for swapped in _swapped(arguments))


def _of_names(node: ast.AST, arguments: set[str], stored: list[ast.Name]) -> Iterator[Fault]:
    """Faults that depend on what else the function knows: a name's partner, a value from before."""
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            partner = _partner(name)
            if partner in arguments or any(n.id == partner for n in stored):
                yield "partner", node, ast.Name(partner)
        case ast.Assign(targets=[ast.Name(id=name)]):
            if name in arguments or any(n.id == name and n.lineno < node.lineno for n in stored):
                yield "drop statement", node, ast.Pass()


def _partner(name: str) -> str:
    """The name that one takes by mistake: rows for columns, output for input channels. Empty if there is none."""
    head, _, tail = name.rpartition("_")
    if tail in PARTNERS and head:
        return f"{head}_{PARTNERS[tail]}"
    return PARTNERS[name[0]] + name[1:] if name[:1] in PARTNERS and name[1:] in ("", "0") else ""
