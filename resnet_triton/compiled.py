"""Any module with convolutions, run through our backend of torch.compile, in place.

`optimize` gives such a module a class of its own, a subclass of the one that it has: the same parameters, hooks, names
and pickles. `Compiled.__call__` says which calls run as the module was written. The others go to a function made by
torch.compile, a `Program` (`programs.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import filters, programs
from .graphs.replay import CudaGraph
from .ops import dispatch, original
from .ops.dispatch import Kernels

traced: ContextVar[Callable[..., Any] | None] = ContextVar("traced", default=None)
"""Set while a model around compiled modules is traced: it runs these, and takes down what they call."""


class Compiled(nn.Module):
    """Comes first in what a module becomes, before the class that it was."""

    _triton_options: dict[str, Any]
    """The backend's: kernels and cuda_graph."""
    _triton_shared: frozenset[str]
    """Filters whose memory something outside of this module is in, by the names of their convolutions."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: what the other base does for its subclasses is not for this one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._uncompiled_reason(args, kwargs) is not None:
            if not torch.compiler.is_compiling() and (instead := traced.get()) is not None:
                return instead(self, args, kwargs)
            return super().__call__(*args, **kwargs)
        its = programs.of(self)
        program = its.ready(self)
        if program is not None:
            return program.run(self, args, kwargs)
        if programs.captured(self):
            return super().__call__(*args, **kwargs)
        with its.first:
            program = its.ready(self) or its.make(self)
            if program is not None:
                result = program.run(self, args, kwargs)
                program.called = True
                return result
        return super().__call__(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With `assign=True` the filters are others afterwards."""
        loaded = super().load_state_dict(*args, **kwargs)
        if "_triton_programs" in vars(self):
            programs.move(self)
        return loaded

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """After `.to()`, `.half()` and the like, CUDA graphs for the memory that the model has left are of no use."""
        before = _addresses(self)
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before != _addresses(self):
            for function in programs.functions(self):
                function.drop()
        return self

    def train(self, mode: bool = True) -> Any:
        """In training mode filters lie as they did, for code that only training runs may count on it."""
        trained = super().train(mode)
        if mode:
            programs.put_back(self)
        elif "_triton_programs" in vars(self):
            programs.move(self)
        return trained

    def __del__(self) -> None:
        """What was compiled ends with it at once, though that leads back to its attributes, and so to itself."""
        vars(self).pop("_triton_programs", None)
        if (theirs := getattr(super(), "__del__", None)) is not None:
            theirs()

    def _uncompiled_reason(self, args: Any, kwargs: Any) -> str | None:
        """Why a call runs as the module was written; None if it runs compiled."""
        if torch.compiler.is_compiling() or dispatch.transformed():
            return "a compiler, a tracer or a transform sees every operator"
        if original.anywhere and original.is_disabled(self):
            return "disabled"
        if self.training:
            return "training mode"
        if torch.is_grad_enabled() and ("_triton_original" in vars(self) or _wants_gradients(self, args, kwargs)):
            return "grad mode is on"
        return "a hook on all modules" if _has_any_global_hook() else None

    def _replicate_for_data_parallel(self) -> Any:
        """One of DataParallel's replicas, which are others at each call: what is compiled for them is kept here."""
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        vars(replica)["_triton_original"] = self
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle or a copy names the class that the module was, and is optimized in turn."""
        reduced: Any = super().__reduce_ex__(protocol)
        own = "written_class" in vars(type(self))
        ordinary = own and isinstance(reduced, tuple) and reduced[0] is _NEW and reduced[1][0] is type(self)
        if not ordinary:
            return reduced  # the class makes its own, and knows nothing of ours
        _, (_, *arguments), state, *rest = reduced
        kept = {k: v for k, v in state.items() if k != "_triton_programs"} if type(state) is dict else state
        return _new, (original.origin(self), *arguments), kept, *rest

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"torch.jit.script cannot compile an optimized {type(self).__name__}; use torch.jit.trace or torch.export, "
            "or resnet_triton.revert it"
        )


_NEW: Any = object().__reduce_ex__(2)[0]
"""What an ordinary object's pickle calls: `copyreg.__newobj__`."""


def compile_in_place(module: nn.Module, kernels: Kernels, cuda_graph: CudaGraph, shared: frozenset[str]) -> None:
    """Make `module` a `Compiled` one, in these modes, whose `shared` filters stay where they are."""
    cls: Any = type(module)
    joined = cls if isinstance(module, Compiled) else _joined(cls)
    options = {"kernels": kernels, "cuda_graph": cuda_graph}
    vars(module).update(_triton_options=options, _triton_shared=shared)  # before a thread can ask for it
    module.__class__ = joined


_made: WeakValueDictionary[type, type[nn.Module]] = WeakValueDictionary()
"""Classes that `_joined` has made, by what they were made of, while something is of them."""


def _joined(cls: Any) -> type[nn.Module]:
    """A subclass of `cls` whose calls are compiled, under the same name."""
    known = _made.get(cls)
    return _made.setdefault(cls, _join(cls)) if known is None else known  # another thread may have been faster


def _join(cls: Any) -> type[nn.Module]:
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "written_class": cls}
    if issubclass(cls, fx.GraphModule):
        members["recompile"] = _recompile
    base = cls
    while base not in (nn.Module, object):
        base = base.__base__
    try:
        if base is nn.Module:
            return type(cls.__name__, (Compiled, cls), members)
        return _ordered(type(cls))(cls.__name__, (cls, Compiled), members)
    except TypeError as error:
        raise TypeError(f"{cls.__name__} has no subclasses ({error}), expected a class that may have one") from error


def _ordered(metaclass: Any) -> Any:
    """A metaclass for subclasses of what lies in memory in its own way, as what inherits from `abc.ABC` first.

    An object takes another class only if that lies in memory alike, which goes by the first base: it has to be the
    object's own class. But methods must be looked up in `Compiled` first. So the bases are (cls, Compiled), and `mro`
    says (itself, Compiled, cls, ...), which is what (Compiled, cls) would give.
    """

    class Ordered(metaclass):  # type: ignore[misc]
        def mro(cls) -> Any:
            ours = "written_class" in vars(cls)
            return [cls, Compiled, *vars(cls)["written_class"].__mro__] if ours else super().mro()

    return Ordered


def _recompile(module: Any) -> Any:
    """`torch.fx.GraphModule.recompile`, which writes its code to the module's class: to the one that it was."""
    ours, written = type(module), original.origin(module)
    module.__class__ = written
    try:
        return module.recompile()
    finally:
        module.__class__ = ours
        programs.forget(module)


def _new(cls: Any, *arguments: Any) -> Any:
    made: Any = _joined(cls)
    return made.__new__(made, *arguments)


def _addresses(module: nn.Module) -> list[int]:
    return [p.data_ptr() for p in module.parameters() if filters.is_plain(p)]


def _wants_gradients(module: nn.Module, args: Any, kwargs: Any) -> bool:
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return any(t.requires_grad for t in chain(module.parameters(), tensors))
