"""What a captured graph has fixed about its model, and whether it still holds.

A graph reads parameters and buffers by address, so edits in place need nothing. What it would miss: a tensor replaced
or moved, a module replaced or given another class, an attribute set (`eps`, `training`, `kernels`, a patched
`forward`), a hook, the code of a class replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import original

_dtype = attrgetter("dtype")


class Fingerprint:
    """Of a model on which no hook is registered.

    Each part of the check is one C loop over a flat list. Two parts ask what is cheap, and compare what they stand for
    only if the answer is no: `_dicts` and `_layouts`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        self._places = original.places({cls for kind in set(self._classes) for cls in kind.__mro__})
        self._code = list(map(getattr, *self._places))
        attributes = [d for m in self._modules for d in (vars(m), m._modules)]
        owners = [d for m in self._modules for d in (m._parameters, m._buffers)]
        hooks = [
            d
            for m in self._modules
            for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._empty: list[Any] = [*hooks, *(d for d in chain(attributes, owners) if not d)]
        self._dicts = _Dicts([d for d in attributes if d], [d for d in owners if d])
        read = [t for t in self._dicts.tensors if t is not None and t.is_floating_point()]
        self._read = tuple({id(t): t for t in read}.values())
        self._layouts = _Layouts(self._read)
        self._addresses = list(map(Tensor.data_ptr, self._read))
        # The memory stays allocated as long as a graph may read it, whatever happens to the parameters.
        self._memory = [t.detach() for t in self._read]

    def holds(self) -> bool:
        """Whether the model is still what it was."""
        return (
            list(map(getattr, *self._places)) == self._code
            and list(map(type, self._modules)) == self._classes
            and not any(self._empty)
            and self._dicts.hold()
            and self._layouts.hold()
            and list(map(Tensor.data_ptr, self._read)) == self._addresses
        )


# --- torch.compile's own means: not documented, so each is tried out first -------------------------------------------


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


def _trusted_version(version: Any) -> Any:
    """`version`, if it grows at every way to write to a dict that is not empty: not on CPython 3.13.0 (gh-125608)."""
    if version is None:
        return None
    box = _Box()
    vars(box).update(value=object(), kept=object())
    for write in _WRITES:
        before = version(vars(box))
        write(box)
        if not version(vars(box)) > before:
            return None
    return version


def _trusted_guards(guards: Any) -> Any:
    """`guards`, if they let a tensor pass as it is, and see what can change and leave the object what it was."""
    changes: tuple[Callable[[Tensor], Tensor], ...] = (lambda t: t.view(torch.int32), lambda t: t[:2], lambda t: t.t())
    try:
        for change in changes:
            t = torch.zeros(4, 4, device="cpu")
            check = _check(guards, [t])
            as_it_was = check(t)
            t.data = change(t.data)
            if not as_it_was or check(t):
                return None
    except Exception:  # whatever another version does with these arguments
        return None
    return guards


def _check(guards: Any, tensors: Sequence[Tensor]) -> Any:
    return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_version = _trusted_version(getattr(_guards, "dict_version", None))
_TensorGuards = _trusted_guards(getattr(_guards, "TensorGuards", None))
"""None where they cannot be trusted: then everything is compared at every call."""


# --- the parts of a fingerprint --------------------------------------------------------------------------------------


class _Dicts:
    """Modules' attributes, which may be replaced by equal values, and their tensors, which may not."""

    def __init__(self, attributes: list[dict[str, Any]], owners: list[dict[str, Any]]) -> None:
        self._attributes, self._owners = attributes, owners
        self._all = attributes + owners
        self._version = self._newest()
        self._values, self.tensors = _values(attributes), _values(owners)

    def hold(self) -> bool:
        version = self._newest()  # before the values: what is written meanwhile shows at the next call
        if version is not None and version == self._version:
            return True
        tensors = _values(self._owners)
        if len(tensors) != len(self.tensors) or not all(map(is_, tensors, self.tensors)):
            return False
        try:
            if _values(self._attributes) != self._values:  # by identity, so nearly always without a call
                return False
        except Exception:  # an array or a tensor was set as an attribute: it has no truth value to compare by
            return False
        self._version = version
        return True

    def _newest(self) -> int | None:
        """A sum that every write changes: versions only grow. They are CPython's up to 3.11, then a watcher's."""
        return None if _version is None else sum(map(_version, self._all))


class _Layouts:
    """Dtypes, sizes and strides: `t.data = ...` changes any of them and leaves the object what it was."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors
        self._known = _layouts(tensors)
        self._check = self._guard()

    def hold(self) -> bool:
        if self._check is not None and self._check(*self._tensors):
            return True
        if _layouts(self._tensors) != self._known:
            return False
        self._check = self._guard()  # the guards also look at what does not matter, such as inference mode
        return True

    def _guard(self) -> Any:
        return None if _TensorGuards is None else _check(_TensorGuards, self._tensors)


def _values(dicts: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _layouts(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    return list(map(_dtype, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))
