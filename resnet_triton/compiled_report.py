"""Which operators a compiled model calls, for `report`: it is compiled again for this, and called once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from . import compiled, filters, programs
from .compiled import Compiled
from .entry_point import BACKEND
from .ops import dispatch
from .ops.trace import Call, arguments, recorded


def by_torch(model: nn.Module) -> bool:
    """Whether `model` itself, and not only what is in it, was given to torch.compile, and not to `optimize`."""
    given = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    return given and not isinstance(model, Compiled)


def other_backend(model: nn.Module) -> str | None:
    """The name of the backend by which torch.compile has `model`, if it can be known and is not ours."""
    if not by_torch(model):
        return None
    from torch._dynamo import list_backends  # not above: importing Dynamo takes two seconds

    backend: Any = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    name = getattr(backend, "compiler_name", None)
    if getattr(model._compiled_call_impl, "get_compiler_config", lambda: None)() is not None:  # compiled in place
        name = "inductor"  # which alone has one
    return name if name in list_backends(()) and name != BACKEND else None


def trace(model: nn.Module, shape: tuple[Any, ...], outer: bool) -> list[Call]:
    """The calls of our operators, and every sizeable one of PyTorch's, in `model(*arguments(shape))` once compiled: the
    whole model, if torch.compile has it (`outer`), or those modules that `optimize` has compiled, if there are any."""
    args = tree_map_only(Tensor, torch.clone, arguments(model, shape))  # for a model may write its inputs
    parts = {id(m): name for name, m in model.named_modules() if isinstance(m, Compiled)}
    if outer or not parts or any(map(by_torch, model.modules())):
        return _trace(model, args, {})[0]

    def traced(module: Compiled, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            reason = module._uncompiled_reason(args, kwargs)
            if reason is None:
                found, result = _trace(module, args, kwargs)
                prefix = parts.get(id(module), "")  # a module in a plain list has no name
                calls.extend(replace(call, name=f"{prefix}.{call.name}".strip(".")) for call in found)
                return result
        before = len(calls)
        result = super(Compiled, module).__call__(*args, **kwargs)
        calls[before:] = [c if c.operation or c.reason else replace(c, reason=reason) for c in calls[before:]]
        return result

    with torch.no_grad(), recorded(model) as calls:
        token = compiled.traced.set(traced)
        try:
            model(*args)
        finally:
            compiled.traced.reset(token)
    return calls


def _trace(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Call], Any]:
    """The calls of a compiled call, and its result."""
    found: list[Call] = []
    options: dict[str, Any] = {"kernels": "auto", "cuda_graph": False}  # a replay would record nothing
    names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    settings: dict[str, Any] = {"options": options, "names": names}
    if isinstance(model, Compiled):
        options["kernels"], settings["moved"] = model._triton_options["kernels"], programs.moved(model)
    apart: Any = {"isolate_recompiles": True} if _ISOLATES else {}
    backend = programs.backend(record=found, **settings)
    function: Any = torch.compile(programs.fresh(programs.call, "report"), backend=backend, dynamic=False, **apart)
    token = dispatch.tracer.set(lambda reason: None)  # these calls do not count
    with torch.no_grad():
        try:
            if not isinstance(model, Compiled):
                return found, function(model, args, kwargs)
            its = programs.of(model)
            with its.first:
                stay = its.stay
                programs.move(model)
                try:
                    result = function(model, args, kwargs)
                except RuntimeError as error:
                    found.clear()
                    result = programs.again(error, model, function, args, kwargs, stay)
                return found, result
        finally:
            dispatch.tracer.reset(token)


_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether this torch can compile without using up how often the methods of a class are compiled at most."""


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """In this block buffers are copies, where nothing else is in their memory, and so is the state that random numbers
    are drawn from. What a call assigns, to a buffer or to another attribute, stays."""
    users, tables = filters.users_of(model), [(m._buffers, dict(m._buffers)) for m in model.modules()]
    plain = filter(filters.is_plain, model.buffers())
    copies = {id(t): _copy(t) for t in plain if users[t.untyped_storage()._cdata] == 1}
    for table, own in tables:  # which are no dicts in TorchScript's modules
        for name, t in own.items():
            table[name] = copies.get(id(t), t)
    devices = {t.device.index for t in chain(model.parameters(), model.buffers()) if t.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for table, own in tables:
            for name, t in own.items():
                if name in table and table[name] is copies.get(id(t), t):
                    table[name] = t


def _copy(t: Tensor) -> Tensor:
    with torch.inference_mode(t.is_inference()), torch.no_grad():
        return t.clone()
