"""What is looked at in each call of a captured model: dicts that were empty, which class and which `__dict__` a module
has, and where tensors lie.

`look.c` does so in a sixth of the time. Triton compiles it, as it does its own launcher, and keeps it in its cache.
PyTorch describes tensors to it by a standard, DLPack's exchange API for C. Where it cannot be compiled, Python does it.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_dtype = attrgetter("dtype")

Look = Callable[[list[dict[Any, Any]], list[nn.Module], tuple[Tensor, ...]], Any]


def look(dicts: list[dict[Any, Any]], modules: list[nn.Module], tensors: tuple[Tensor, ...]) -> Any:
    """A value that changes when a module's class, or the dict that is its `__dict__`, changes, or a tensor's address,
    dtype, size or stride; None if a dict is not empty.

    A lazily negated view of the same memory (`torch._neg_view`) looks alike.
    """
    if any(dicts):
        return None
    layouts = list(map(_dtype, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))
    own = list(map(id, map(vars, modules)))
    return list(map(type, modules)), own, list(map(Tensor.data_ptr, tensors)), layouts


def addresses(values: Sequence[Any], places: tuple[int, ...]) -> Hashable:
    """A value that changes when the address of a tensor, at one of `places` in `values`, changes."""
    compiled = _compiled()
    found = None if compiled is None else compiled.addresses(values, places)  # of what it cannot describe None, slowly
    return tuple(map(Tensor.data_ptr, map(values.__getitem__, places))) if found is None else found


def fastest(*seen: Any) -> Look:
    """`look`, or C's if it can describe all of `seen`."""
    compiled = _compiled()
    return look if compiled is None or compiled.look(*seen) is None else compiled.look


@functools.cache
def _compiled() -> ModuleType | None:
    try:
        return build(Path(__file__).with_suffix(".c").read_text(encoding="utf-8"))
    except Exception:  # no Triton, no C compiler, a cache that cannot be written, ...
        return None


def build(source: str) -> ModuleType:
    """`source` compiled for this Python and this PyTorch."""
    from triton.runtime.build import compile_module_from_src

    python = sysconfig.get_path("include", "posix_prefix")
    if not Path(python, "Python.h").is_file():  # the compiler's own words would go to the terminal
        raise FileNotFoundError(f"{python} has no Python.h")
    include = str(Path(torch.__file__).with_name("include"))
    return compile_module_from_src(f"{source}/* {torch.__version__} */\n", "resnet_triton_look", include_dirs=[include])
