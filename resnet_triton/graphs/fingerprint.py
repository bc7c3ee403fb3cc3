"""What a captured graph or a compiled function has fixed about its model, and whether it still holds.

A graph reads parameters and buffers by address, so edits in place need nothing. What it would miss: a tensor replaced
or moved, a module replaced or given another class, an attribute set (`eps`, `training`, `kernels`, a patched
`forward`), a hook, the code of a class replaced. torch.compile looks at all of these but hooks and code.

What leaves no trace in a dict is looked at in each call (`look.py`). All else is in dicts, which have versions: only if
one has changed, what is in them is compared. A dict of hooks, modules or tensors may be replaced, too, by one that is
equal as yet: so each has to be the same object.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .look import fastest


class Watch:
    """Of what torch.compile misses: the code of a model's classes, its hooks, and the modules that may have some."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model, self._class, self._own = weakref.ref(model), type(model), vars(model)  # not kept: it has this
        self._modules = modules[1:]
        self._empty: list[Any] = []
        self._full: list[Any] = []
        self._parts: dict[str, Callable[[], bool]] = {}
        self._state: int | None = None
        self._add("tables", map(vars, modules), values=_own_tables)  # first, for the next are found in these
        classes = {cls for kind in set(map(type, modules)) for cls in kind.__mro__} - {object}
        self._add("code", map(_namespace, classes), values=_methods)
        self._add("modules", (d for m in modules for d in (*_children(m), *_hooks(m))))
        self._look_at(())

    def _add(self, name: str, dicts: Iterable[Any], **how: Any) -> list[Any]:
        """Check what is in `dicts`, too, and return it. By `name`, tests leave it out."""
        dicts = list(dicts)
        self._empty += [d for d in dicts if not d]
        part = _Dicts([d for d in dicts if d], **how)
        self._full = list({id(d): d for d in (*self._full, *part.dicts)}.values())
        self._parts[name] = part.hold
        return part.known[1]

    def _look_at(self, tensors: tuple[Tensor, ...]) -> None:
        """Check the modules' classes and `__dict__`, and memory of tensors, too."""
        self._looked_at = self._empty, self._modules, tensors
        self._look = fastest(*self._looked_at)
        self._seen = self._look(*self._looked_at)

    def version(self) -> int | None:
        """A number that every write changes, one that is undone later, too; None if there is none."""
        return _newest(self._empty + self._full)

    def holds(self) -> bool:
        """Whether the model is still what it was."""
        model = self._model()
        if type(model) is not self._class or model.__dict__ is not self._own:
            return False
        seen = self._look(*self._looked_at)
        if seen is None or seen != self._seen:
            return False
        state = _state(self._full)  # before the parts: what is written meanwhile shows at the next call
        if state is None or state != self._state:
            if not all(hold() for hold in self._parts.values()):
                return False
            self._state = state
        return True


class Fingerprint(Watch):
    """Of a model on which no hook is registered: attributes and tensors, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = [model, *self._modules]
        values = self._add("attributes", map(vars, modules), same=_are_equal)
        values = values + self._add("tensors", (d for m in modules for d in _tables(m)))
        read = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
        self._look_at(tuple({id(t): t for t in read}.values()))
        # Kept, or others could get their addresses: classes, and memory, which a graph reads whatever becomes of the
        # parameters. Another thread's edit between these lines shows when the model is looked at next.
        self._classes = list(map(type, self._modules))
        self._memory = [t.detach() for t in read]


def _children(m: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dict of the modules in it. TorchScript has none, and its code stays what it is."""
    return () if isinstance(m, torch.jit.ScriptModule) else (m._modules,)


def _tables(m: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Of its own tensors."""
    return (m._parameters, m._buffers)


def _hooks(m: nn.Module) -> list[dict[Any, Any]]:
    """With how they are called, if there are some."""
    hooks: list[Any] = [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
    how = [m._forward_hooks_with_kwargs, m._forward_hooks_always_called, m._forward_pre_hooks_with_kwargs]
    return hooks + how if any(hooks) else hooks


def _namespace(cls: type) -> dict[str, Any]:
    """The dict behind `vars(cls)`."""
    (namespace,) = gc.get_referents(vars(cls))
    return namespace


# --- torch.compile's versions of dicts: not documented, so they are tried out first ----------------------------------


class _Box:
    value: object = None


def _set_often(box: _Box) -> None:
    for _ in range(100):
        box.value = object()


_WRITES: tuple[Callable[[_Box], object], ...] = (
    lambda box: setattr(box, "value", object()),
    _set_often,  # by then the interpreter writes in another way
    lambda box: vars(box).update(value=object()),
    lambda box: vars(box).__setitem__("value", object()),
    lambda box: vars(box).setdefault("other", object()),
    lambda box: vars(box).pop("other"),
    lambda box: delattr(box, "value"),
    lambda box: vars(box).clear(),
)
_CLASS_WRITES: tuple[Callable[[Any], object], ...] = (
    lambda cls: setattr(cls, "value", object()),
    lambda cls: setattr(cls, "other", object()),
    lambda cls: delattr(cls, "other"),
)


def _trusted_version(version: Any) -> Any:
    """`version`, if every way to write to a dict that is not empty raises its version, and that of what is written
    afterwards once more: not on CPython 3.13.0 (gh-125608)."""
    if version is None:
        return None
    box, clock = _Box(), {"": object()}
    vars(box).update(value=object(), kept=object())
    cases: list[tuple[Any, Any, Any]] = [(vars(box), box, write) for write in _WRITES]
    cases += [(_namespace(_Box), _Box, write) for write in _CLASS_WRITES]
    for written, owner, write in cases:
        before, then = version(written), _tick(clock, version)
        write(owner)
        if not (version(written) > before and _tick(clock, version) > then + 1):
            return None
    return version


def _tick(clock: dict[str, Any], version: Callable[[Any], int]) -> int:
    """The version of a dict after one write to it."""
    clock[""] = object()
    return version(clock)


_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_version = _trusted_version(getattr(_guards, "dict_version", None))
"""None where it cannot be trusted: then everything is compared at every call."""


# --- the parts of a check --------------------------------------------------------------------------------------------

_WATCHED = sys.version_info >= (3, 12)
"""Whether versions count writes to those dicts only whose versions were asked for. Before, CPython counts all."""
_clock: dict[str, Any] = {}
_ticks = itertools.count(1)
_ticking = threading.Lock()


def _state(dicts: list[dict[Any, Any]]) -> int | None:
    """A number that every write to one of `dicts` changes, when their versions have been asked for; None if there is
    none. Versions only grow, and all come from one counter: where that counts little else, it is asked alone."""
    if _version is None or not _WATCHED:
        return _newest(dicts)
    if not _ticking.acquire(blocking=False):  # a fork may have left it taken for good
        return None
    try:
        return _tick(_clock, _version) - next(_ticks)
    finally:
        _ticking.release()


def _newest(dicts: list[dict[Any, Any]]) -> int | None:
    return None if _version is None else sum(map(_version, dicts))


Contents = tuple[list[Any], list[Any]]


def _contents(dicts: Iterable[dict[Any, Any]]) -> Contents:
    """Names and values."""
    dicts = list(dicts)
    return list(map(tuple, dicts)), list(chain.from_iterable(map(dict.values, dicts)))


_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
"""Names of the dicts that PyTorch keeps in each module."""


def _own_tables(attributes: Iterable[dict[str, Any]]) -> Contents:
    return [], [d.get(name) for d in attributes for name in _TABLES]


def _methods(namespaces: Iterable[dict[str, Any]]) -> Contents:
    """Functions, properties and the like: what is called or looked up, and no numbers, which torch.compile looks at."""
    entries = ((d, list(d.items())) for d in namespaces)  # in one step: another thread may patch a class meanwhile
    return _contents({n: v for n, v in own if _is_code(v) and (id(d), n) not in _REPLACED} for d, own in entries)


def _is_code(value: Any) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


_REPLACED = [(id(_namespace(nn.Module)), name) for name in ("__init__", "__setstate__")]
"""What torch.compile itself replaces when it first compiles."""


def _are_identical(a: list[Any], b: list[Any]) -> bool:
    return all(map(is_, a, b))


def _are_equal(a: list[Any], b: list[Any]) -> bool:
    """By identity, so nearly always without a call."""
    try:
        return a == b
    except Exception:  # an array or a tensor was set as an attribute: it has no truth value to compare by
        return False


class _Dicts:
    """Dicts that are not empty, and what is in them."""

    def __init__(
        self,
        dicts: list[dict[Any, Any]],
        values: Callable[[Iterable[Any]], Contents] = _contents,
        same: Callable[[list[Any], list[Any]], bool] = _are_identical,
    ) -> None:
        self.dicts, self._values, self._same = dicts, values, same
        self._version = _newest(dicts)
        self.known = values(dicts)

    def hold(self) -> bool:
        version = _newest(self.dicts)  # before the values, too
        if version is not None and version == self._version:
            return True
        names, values = self._values(self.dicts)
        if names != self.known[0] or not self._same(values, self.known[1]):
            return False
        self._version = version
        return True
