"""A deep copy of a model that shares nothing with it, or what stands in its way."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
_WAY_OUT = "optimize(model, inplace=True) copies nothing"


def independent(model: Model) -> Model:
    """A deep copy with parameters, buffers and attributes of its own, whatever mode the caller is in.

    TypeError, naming the attribute, if something cannot be copied, or if a copy would go on using `model`.
    """
    own = {id(part): part for part in chain(model.modules(), model.parameters(), model.buffers())}
    for path, value in _attributes(model):
        if _goes_back(value, own, set()):
            raise TypeError(f"{path} refers to the model from a function, so a copy would use both; {_WAY_OUT}")
    try:
        with torch.inference_mode(False):  # or the copy could never be trained
            copied = copy.deepcopy(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        path, value, reason = _culprit(model) or ("the model", model, error)
        said = (str(reason).splitlines() or [""])[0]
        raise TypeError(f"{path}, a {type(value).__name__}, cannot be copied ({said}); {_WAY_OUT}") from error
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, module.training)  # torchvision's feature extractors copy themselves without
    for name, part in chain(copied.named_parameters(), copied.named_buffers()):
        if id(part) in own:
            raise TypeError(f"{name} is shared by a deep copy, expected one of its own; {_WAY_OUT}")
    return copied


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        yield from ((f"{name}{suffix}".lstrip("."), part) for suffix, part in _parts(module))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, each part with what leads from the value's name to the part's."""
    if isinstance(value, torch.jit.ScriptModule):
        return  # it copies itself, with all that is in it
    if isinstance(value, nn.Module):
        tables = ("_parameters", "_buffers", "_modules")
        left_out = (*tables, "_runner", "_triton_programs")  # of ours, the last two have a copy start afresh
        entries = [(k, v) for k, v in list(vars(value).items()) if k not in left_out]
        yield from ((f".{k}", v) for k, v in chain(entries, *(list(vars(value)[t].items()) for t in tables)))
    elif isinstance(value, dict):
        yield from ((f"[{k!r}]", v) for k, v in list(value.items()))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        yield from (("()", part) for part in (cells, value.__defaults__, value.__kwdefaults__, vars(value)))
    elif not isinstance(value, type | types.ModuleType | torch.Tensor) and hasattr(value, "__dict__"):
        yield from ((f".{k}", v) for k, v in list(vars(value).items()))


def _goes_back(value: Any, own: dict[int, Any], seen: set[tuple[int, bool]], kept: bool = False) -> bool:
    """Whether a deep copy of `value` would still hold a part of the model: functions and weak references are kept."""
    if (id(value), kept) in seen:
        return False
    seen.add((id(value), kept))
    if id(value) in own:
        return kept
    if isinstance(value, weakref.ref):
        return id(value()) in own
    kept = kept or isinstance(value, types.FunctionType)
    return any(_goes_back(part, own, seen, kept) for _, part in _parts(value))


def _culprit(model: nn.Module) -> tuple[str, Any, Exception] | None:
    """The innermost thing that cannot be copied: its path, itself, and why."""
    copied: dict[int, Any] = {id(m): m for m in model.modules()}  # as if it had been done already

    def look(path: str, value: Any) -> tuple[str, Any, Exception] | None:
        if id(value) in copied:
            return None
        try:
            copy.deepcopy(value, dict(copied))
        except Exception as error:
            copied[id(value)] = value
            inner = (look(path + suffix, part) for suffix, part in _parts(value))
            return next(filter(None, inner), (path, value, error))
        return None

    found = next(filter(None, (look(*attribute) for attribute in _attributes(model))), None)
    for name, module in [] if found else list(model.named_modules())[::-1]:  # one with a __deepcopy__ of its own
        del copied[id(module)]
        found = found or look(name or "the model", module)
        copied[id(module)] = module
    return found
