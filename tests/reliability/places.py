"""Where a fault is, and what becomes of it: found in the syntax tree of a function, whatever its layout.

A pattern is an expression or a statement. `...` in it stands for any one expression, and in what takes its place for
the same one again.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """A file with one fault in one function: its part `before` is `after` now.

    The part is the smallest that is the only one of its kind in the function, or else number `nth` of several.
    """

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    nth: int
    source: str

    @property
    def where(self) -> str:
        """The function by its full name: two files may have one of a name."""
        return f"{self.file}:{self.function}"

    def __str__(self) -> str:
        number = f"  (number {self.nth})" if self.nth else ""
        return f"{self.file}:{self.line} {self.function} [{self.kind}]{number}\n  - {self.before}\n  + {self.after}"


class Source:
    """The text of a file and the functions in it."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.data = file, text.encode()
        self.functions = dict(functions(ast.parse(text)))
        self._starts = [0, *accumulate(len(line) for line in self.data.splitlines(keepends=True))]
        self._parts: dict[str, tuple[dict[ast.AST, ast.AST], dict[tuple[bool, str], list[ast.AST]]]] = {}

    def change(self, function: str, old: str, new: str, nth: int = 0) -> Mutant:
        """The function with `new` for `old`, number `nth` of several; ValueError if that is nowhere, or anywhere."""
        if function not in self.functions:
            raise ValueError(f"{self.file} has no function {function}")
        before, after = _parsed(old), _parsed(new)
        if isinstance(before, ast.expr) and isinstance(after, ast.stmt):
            before = ast.Expr(before)
        found = list(_find(self.functions[function], before))
        if not (0 < nth <= len(found) or (nth == 0 and len(found) == 1)):
            expected = f"at least {nth} times" if nth else "once"
            raise ValueError(f"{self.file}: {old!r} stands {len(found)} times in {function}, expected {expected}")
        node, held = found[max(nth - 1, 0)]
        return self.mutant(function, "planted", node, _Filled(held).visit(after))

    def mutant(self, function: str, kind: str, old: ast.AST, new: ast.AST) -> Mutant:
        """The file with `new` in the place of `old`, a node of this function."""
        old, new = _difference(old, new)
        first = self._starts[old.lineno - 1] + old.col_offset
        end = self._starts[old.end_lineno - 1] + old.end_col_offset
        text = ast.unparse(new).replace("\n", "\n" + " " * old.col_offset)
        if isinstance(new, ast.expr) and not isinstance(new, ast.Name | ast.Constant | ast.Call | ast.Tuple):
            text = f"({text})"
        source = (self.data[:first] + text.encode() + self.data[end:]).decode()
        return Mutant(self.file, function, old.lineno, kind, *self._named(function, old, new), source)

    def _named(self, function: str, old: ast.AST, new: ast.AST) -> tuple[str, str, int]:
        if function not in self._parts:
            self._parts[function] = _index(self.functions[function])
        parents, alike = self._parts[function]
        part = old
        while len(same := alike[_key(part)]) > 1 and isinstance(part, ast.expr) and _is_short(parents[part]):
            part = parents[part]
        after = copy.deepcopy(part, {id(old): new})
        return ast.unparse(part), ast.unparse(after), same.index(part) + 1 if len(same) > 1 else 0


@functools.cache
def source_of(file: str) -> Source:
    """Of a file in the repository: in `kernels/` unless it says where."""
    return Source(file, ROOT.joinpath(path_of(file)).read_text(encoding="utf-8"))


def path_of(file: str) -> str:
    return file if "/" in file else f"kernels/{file}"


def change(file: str, function: str, old: str, new: str, nth: int = 0) -> Mutant:
    """See `Source.change`."""
    return source_of(file).change(function, old, new, nth)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods by their names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{each.name}", each) for each in node.body if isinstance(each, ast.FunctionDef))


def _parsed(text: str) -> ast.expr | ast.stmt:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a node, in order; of an f-string, whose parts have no place in Python 3.10, nothing."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.JoinedStr):
            yield from _walk(child)


def _find(function: ast.FunctionDef, pattern: ast.AST) -> Iterator[tuple[ast.AST, list[ast.expr]]]:
    """Where the pattern is, and what `...` stands for."""
    for node in _walk(function):
        held: list[ast.expr] = []
        if _same(pattern, node, held):
            yield node, held


def _same(pattern: Any, node: Any, held: list[ast.expr]) -> bool:
    if isinstance(pattern, ast.Constant) and pattern.value is ...:
        held.append(node)
        return isinstance(node, ast.expr)
    if type(pattern) is not type(node):
        return False
    if not isinstance(pattern, ast.AST):
        return bool(pattern == node)
    ours, theirs = _fields(pattern), _fields(node)
    return len(ours) == len(theirs) and all(_same(a, b, held) for a, b in zip(ours, theirs, strict=True))


def _fields(node: ast.AST) -> list[Any]:
    """Lists flat, their lengths before them; not whether a name is loaded or stored."""
    fields: list[Any] = []
    for name, value in ast.iter_fields(node):
        if name not in ("ctx", "kind", "type_comment"):
            fields += [len(value), *value] if isinstance(value, list) else [value]
    return fields


def _difference(old: ast.AST, new: ast.AST) -> tuple[ast.AST, ast.AST]:
    """The smallest expression or statement in which two trees differ."""
    smallest = old, new
    while type(old) is type(new):
        pairs = zip(_fields(old), _fields(new), strict=False)
        differing = [(a, b) for a, b in pairs if not _same(a, b, [])]
        if len(differing) != 1 or not all(isinstance(each, ast.AST) for each in differing[0]):
            break
        old, new = differing[0]
        if isinstance(old, ast.expr | ast.stmt):
            smallest = old, new
    return smallest


def _index(function: ast.FunctionDef) -> tuple[dict[ast.AST, ast.AST], dict[tuple[bool, str], list[ast.AST]]]:
    """The expression or statement around each expression, and the parts that read alike."""
    parents: dict[ast.AST, ast.AST] = {}
    alike: dict[tuple[bool, str], list[ast.AST]] = defaultdict(list)
    whole = [node for node in _walk(function) if isinstance(node, ast.expr | ast.stmt)]
    for node in whole:
        alike[_key(node)].append(node)
    for node in (function, *whole):
        waiting = list(ast.iter_child_nodes(node))
        for child in waiting:
            if isinstance(child, ast.expr | ast.stmt):
                parents[child] = node
            else:
                waiting += ast.iter_child_nodes(child)
    return parents, alike


def _key(node: ast.AST) -> tuple[bool, str]:
    return isinstance(node, ast.stmt), ast.unparse(node)


def _is_short(node: ast.AST) -> bool:
    """Nor a statement that holds others."""
    return (isinstance(node, ast.expr) or not hasattr(node, "body")) and len(ast.unparse(node)) < 100


class _Filled(ast.NodeTransformer):
    """Puts what `...` stood for in its place again."""

    def __init__(self, held: list[ast.expr]) -> None:
        self.held = iter(held)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return next(self.held) if node.value is ... else node
