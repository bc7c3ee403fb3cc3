"""A mutant in its function's place, in this process or in a copy of the package."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import linecache
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from .places import ROOT, Mutant, change, functions, path_of


@contextlib.contextmanager
def planted(file: str, function: str, old: str, new: str, nth: int = 0) -> Iterator[None]:
    """An interpreted function of `kernels/` with the fault of `places.change`, whoever calls it."""
    undo = install(change(file, function, old, new, nth))
    try:
        yield
    finally:
        undo()


def install(mutant: Mutant) -> Callable[[], None]:
    """Turn the function into the mutant: whoever holds it holds the mutant, until the result is called."""
    module = importlib.import_module(_module(path_of(mutant.file)))
    name = f"{mutant.file}.mutant.py"  # Triton reads a kernel's source by the name of its file
    linecache.cache[name] = (len(mutant.source), None, mutant.source.splitlines(keepends=True), name)
    definition = ast.Module([dict(functions(ast.parse(mutant.source)))[mutant.function]], type_ignores=[])
    found: dict[str, Any] = {}
    exec(compile(definition, name, "exec", flags=annotations.compiler_flag), vars(module), found)
    old: Any = module
    for part in mutant.function.split("."):
        old = getattr(old, part)
    (new,) = found.values()
    _forget()  # what was computed without the mutant
    if isinstance(old, functools._lru_cache_wrapper):
        old, new = old.__wrapped__, new.__wrapped__
    if isinstance(old, FunctionType):
        code, old.__code__ = old.__code__, new.__code__

        def undo() -> None:
            old.__code__ = code
            _forget()

        return undo
    state = dict(vars(old))  # Triton's

    def become(other: dict[str, Any]) -> None:
        vars(old).clear()
        vars(old).update(other)

    become(vars(new))
    _forget()
    return lambda: become(state)


def _forget() -> None:
    """Empty the caches of functions that compute a launch, and the hashes of sources that are compiled."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("resnet_triton.kernels.", "resnet_triton.config.", "resnet_triton.ops.conv")):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
                if hasattr(value, "is_gluon"):
                    value.hash = None


def _module(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(("resnet_triton", *parts) if parts[0] == "kernels" else parts)


def write_package(mutant: Mutant, folder: Path) -> None:
    """A copy of the package with the mutant in it."""
    shutil.copytree(ROOT / "resnet_triton", folder / "resnet_triton", symlinks=True)
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    (folder / path_of(mutant.file)).write_text(mutant.source, encoding="utf-8")
