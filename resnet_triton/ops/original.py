"""Whether modules run the code that PyTorch and torchvision wrote for them, and whether they are asked to.

Our operators stand in for that code. Who replaces a `forward`, on an instance or on a class, wants theirs to run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..support import locks

_NAMES = ("forward", "_forward_impl", "_conv_forward")
_written: dict[type, dict[str, Any]] = {}


def remember(cls: type) -> type:
    """Take note of the code of `cls`. What does not stand in the file of its class has been replaced already."""
    _written[cls] = {name: _if_written(cls, name) for name in _NAMES if hasattr(cls, name)}
    return cls


def remember_once(cls: type) -> None:
    """`remember`, for who asks at each call."""
    if cls not in _written:
        remember(cls)


def _if_written(cls: type, name: str) -> Any:
    owner = next(c for c in cls.__mro__ if name in vars(c))
    code = vars(owner)[name]
    return code if getattr(code, "__globals__", None) is vars(sys.modules[owner.__module__]) else None


def written(cls: type, name: str = "forward") -> Any:
    """`cls.name` as its authors wrote it; None if it had been replaced before `remember`."""
    return _written[cls][name]


LAYERS: dict[type[nn.Module], Any] = {
    cls: written(remember(cls))
    for cls in (
        nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Linear,
        nn.Identity,
    )
}  # fmt: skip
"""The `forward` of each layer that our operators stand in for."""
CONV_FORWARD = written(nn.Conv2d, "_conv_forward")


def replaced(module: nn.Module) -> str | None:
    """Which code of `module` is not what its authors wrote; None if all is."""
    for name in (*_NAMES, "_call_impl"):
        if name in vars(module):
            return f"its {name} was replaced"
    for cls in type(module).__mro__:
        for name, code in _written.get(cls, {}).items():
            if getattr(cls, name) is not code:
                return f"{cls.__module__.partition('.')[0]}'s {cls.__name__}.{name} was replaced"
    return None


def origin(module: nn.Module) -> type[nn.Module] | None:
    """The class of `module` before `optimize`, or None if it has it still."""
    cls: type[nn.Module] | None = getattr(type(module), "written_class", None)
    return cls


# --- disabled modules ------------------------------------------------------------------------------------------------

anywhere: dict[int, int] = {}
"""How often each module, by its id, is disabled at the moment. A call asks this first, for nearly always it is empty;
and what torch.compile makes asks nothing else, as it cannot read a ContextVar."""
_here: ContextVar[frozenset[int]] = ContextVar("disabled", default=frozenset())
_lock = locks.lock()


def is_disabled(module: nn.Module) -> bool:
    """Whether this call of `module`, which is in `anywhere`, shall run the original code."""
    return id(module) in anywhere and (torch.compiler.is_compiling() or id(module) in _here.get())


@contextmanager
def disable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Disable `modules`, which the caller keeps alive, in this thread."""
    ids = frozenset(map(id, modules))
    token = _here.set(_here.get() | ids)
    _count(ids, 1)
    try:
        yield
    finally:
        _count(ids, -1)
        _here.reset(token)


def _count(ids: frozenset[int], step: int) -> None:
    with _lock:
        for i in ids:
            anywhere[i] = anywhere.get(i, 0) + step
            if anywhere[i] == 0:
                del anywhere[i]
