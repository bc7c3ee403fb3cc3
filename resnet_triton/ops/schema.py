"""An operator's schema, read off the fields of its class: one statement, so names are the same everywhere.

A field of several values (`BatchNorm`, `Geometry`, ...) stands for its own fields. If it may be None, their names start
with its name, and None stands for all of them. A keyword-only field is no argument, and goes lost on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from .dispatch import Kernels

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    Kernels: "str",
    tuple[int, int]: "int[2]",
    tuple[float, ...]: "float[]",
}


class Argument(NamedTuple):
    """One argument of a schema: its name, where its value is (`shortcut.batch_norm.eps`), and its type."""

    name: str
    path: str
    type: str


class Field(NamedTuple):
    """One field of a class, `kind` without its None."""

    name: str
    kind: Any
    optional: bool


@functools.cache
def fields(cls: Any) -> list[Field]:
    """The fields of a dataclass or NamedTuple."""
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if not f.kw_only] if dataclasses.is_dataclass(cls) else cls._fields
    found = []
    for name in names:
        kind = hints[name]
        options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        (inner,) = (option for option in options if option is not type(None))
        found.append(Field(name, inner, len(options) > 1))
    return found


def arguments(cls: Any, path: str = "", prefix: str = "", optional: bool = False) -> Iterator[Argument]:
    """What the fields of `cls` are in a schema, in order."""
    for name, kind, may_be_none in fields(cls):
        if hasattr(kind, "_fields"):
            inner = f"{prefix}{name}_" if may_be_none else prefix
            yield from arguments(kind, f"{path}{name}.", inner, optional or may_be_none)
        else:
            yield Argument(prefix + name, path + name, _TYPES[kind] + ("?" if may_be_none or optional else ""))


def check_tensor(name: str, x: object) -> None:
    """TypeError unless `x` is a tensor or a tracer's proxy of one."""
    if not isinstance(x, Tensor) and not hasattr(type(x), "__torch_function__"):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a torch.Tensor")


class Schema:
    """What the class of an operator is for `torch.library`: the text, and the way there and back."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.arguments = list(arguments(cls))
        self.text = "(" + ", ".join(f"{a.type} {a.name}" for a in self.arguments) + ") -> Tensor"
        self._paths = [tuple(a.path.split(".")) for a in self.arguments]
        classes: dict[str, Any] = {}
        expression, names = _construction(cls, classes)
        self._build = eval(f"lambda {', '.join(names)}: {expression}", classes)  # as dataclasses make their __init__
        self._absent = next((f.name for f in fields(cls) if f.optional and hasattr(f.kind, "_fields")), "")
        tensors = [a.path for a in self.arguments if a.type.startswith("Tensor")]
        self._tensors = _getter(tensors)
        self._present_tensors = _getter([path for path in tensors if not path.startswith(f"{self._absent}.")])

    def flatten(self, operation: Any) -> tuple[Any, ...]:
        """The values of an operation's arguments, in the order of the schema."""
        values = []
        for path in self._paths:  # in Python that torch.compile can trace
            value = operation
            for name in path:
                value = None if value is None else getattr(value, name)
            values.append(value)
        return tuple(values)

    def tensors(self, operation: Any) -> list[Tensor]:
        """The arguments that are tensors. Asked before each launch, so in C."""
        absent = self._absent and getattr(operation, self._absent) is None
        found = self._present_tensors(operation) if absent else self._tensors(operation)
        return [t for t in found if t is not None]

    def check(self, operation: Any) -> None:
        """TypeError, naming it, for an argument that should be a tensor and is none."""
        for argument, value in zip(self.arguments, self.flatten(operation), strict=True):
            if argument.type == "Tensor" or (argument.type == "Tensor?" and value is not None):
                check_tensor(argument.name, value)

    def with_tensors(self, operation: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
        """The operation with each of its tensors changed, by the name of the argument."""
        known = zip(self.arguments, self.flatten(operation), strict=True)
        return self.build([change(a.name, value) if isinstance(value, Tensor) else value for a, value in known])

    def build(self, values: Any) -> Any:
        """The operation with these arguments. One expression, for compiled models do so at each call."""
        return self._build(*values)


def _getter(paths: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    get = attrgetter(*paths)
    return get if len(paths) > 1 else lambda operation: (get(operation),)


def _construction(cls: Any, classes: dict[str, Any], prefix: str = "") -> tuple[str, list[str]]:
    """An expression that makes a `cls` of arguments by their names in a schema, and these; it names `classes`."""
    classes[cls.__name__] = cls
    parts, names = [], []
    for name, kind, optional in fields(cls):
        if not hasattr(kind, "_fields"):
            at = prefix + name
            part, inner = (
                (f"tuple({at}) if isinstance({at}, list) else {at}" if get_origin(kind) is tuple else at),
                [at],
            )
        else:
            part, inner = _construction(kind, classes, f"{prefix}{name}_" if optional else prefix)
            if optional:
                part = f"None if {' is '.join(inner)} is None else {part}"
        parts.append(part)
        names += inner
    return f"{cls.__name__}({', '.join(parts)})", names
