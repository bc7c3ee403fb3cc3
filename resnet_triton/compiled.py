"""Any module with convolutions, run through our backend of torch.compile, in place.

`optimize` gives such a module a class of its own, a subclass of the one that it has: the same parameters, hooks, names
and pickles. A call goes to a function made by torch.compile. That does not notice a hook or a replaced method of an
inner module, so this does (`Watch`), and lets the module be compiled anew. What neither notices is a method replaced on
the class of some object that is no module.

`Compiled.__call__` says which calls run as the module was written. For the others `Programs` keeps a `Program`, the
compiled function, for each mode, and makes another when code or hooks have changed. A program's first call has the
module for itself: it moves filters to channels_last memory, and where the module's code stumbles over that, `_again`
puts them back and calls once more.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from . import filters
from .graphs.fingerprint import Watch
from .graphs.function import GraphedFunction
from .graphs.replay import CudaGraph
from .ops import dispatch, original
from .ops.dispatch import Kernels
from .ops.trace import Call, arguments, recorded

_traced: ContextVar[Callable[..., Any] | None] = ContextVar("traced", default=None)
"""Set while a model around compiled modules is traced: it runs these, and takes down what they call."""


class Compiled(nn.Module):
    """First base of what a module becomes; the second is the class that it was."""

    _triton_options: dict[str, Any]
    """The backend's: kernels and cuda_graph."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: what the other base does for its subclasses is not for this one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._uncompiled_reason(args, kwargs) is not None:
            if not torch.compiler.is_compiling() and (traced := _traced.get()) is not None:
                return traced(self, args, kwargs)
            return super().__call__(*args, **kwargs)
        programs = _programs(self)
        program = programs.ready(self)
        if program is not None:
            return program.run(self, args, kwargs)
        with programs.first:
            program = programs.ready(self) or programs.make(self)
            if program is not None:
                result = program.run(self, args, kwargs)
                program.called = True
                return result
        return super().__call__(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With `assign=True` the filters are others afterwards."""
        loaded = super().load_state_dict(*args, **kwargs)
        if "_triton_programs" in vars(self):
            _move(self)
        return loaded

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """After `.to()`, `.half()` and the like, CUDA graphs for the memory that the model has left are of no use."""
        before = _addresses(self)
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before != _addresses(self):
            for program in _made(self):
                for function in program.functions():
                    function.drop()
        return self

    def train(self, mode: bool = True) -> Any:
        """In training mode filters lie as they did, for code that only training runs may count on it."""
        trained = super().train(mode)
        if mode:
            put_back(self)
        elif "_triton_programs" in vars(self):
            _move(self)
        return trained

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


def compile_in_place(module: nn.Module, kernels: Kernels, cuda_graph: CudaGraph) -> None:
    """Make `module` a `Compiled` one, in these modes."""
    vars(module)["_triton_options"] = {"kernels": kernels, "cuda_graph": cuda_graph}  # before a thread can ask for it
    if not isinstance(module, Compiled):
        cls: Any = type(module)
        module.__class__ = _joined(cls)


@functools.cache
def _joined(cls: Any) -> type[nn.Module]:
    """A subclass of `cls` whose calls are compiled, under the same name."""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "written_class": cls}
    return type(cls.__name__, (Compiled, cls), members)


def _new(cls: Any, *arguments: Any) -> Any:
    made: Any = _joined(cls)
    return made.__new__(made, *arguments)


def _wants_gradients(module: nn.Module, args: Any, kwargs: Any) -> bool:
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return any(t.requires_grad for t in chain(module.parameters(), tensors))


# --- compiled functions ----------------------------------------------------------------------------------------------


class Program:
    """The compiled function of one module in one grad mode, for as long as its code and hooks stay what they are."""

    called = False
    """Whether it has been called without an error."""
    raised = 0
    """How many calls in a row have raised one. A call that raises none resets it, but not from `_LIMIT` on."""

    def __init__(self, module: Compiled, replicas: bool) -> None:
        self.owner = weakref.ref(module)
        self.options = module._triton_options
        self.watch = Watch(module)
        self._functions: list[weakref.ref[GraphedFunction]] = []
        options = {**self.options, "cuda_graph": False} if replicas else self.options  # their parameters are new ones
        backend = _backend(options=options, functions=self._functions, moved=_moved(module))
        written: Any = original.origin(module)
        call = _call if written.__call__ is nn.Module.__call__ else _call_by_class
        function: Any = _fresh(call, written.__name__)
        self.code = function.__code__
        self.function: Callable[..., Any] = torch.compile(function, backend=backend)
        weakref.finalize(self, _forget_code, self.code).atexit = False

    def functions(self) -> list[GraphedFunction]:
        """What CUDA graphs repeat of it."""
        return [function for ref in self._functions if (function := ref()) is not None]

    def holds(self, module: Compiled) -> bool:
        return self.owner() is module and self.options == module._triton_options and self.watch.holds()

    def run(self, module: Compiled, args: Any, kwargs: Any) -> Any:
        try:
            result = self._run(module, args, kwargs)
        except Exception as error:
            self._count_error()
            of_compiler = type(error).__name__ == "TorchRuntimeError"
            if not of_compiler or self.options["kernels"] == "triton" or self._has_begun(error):
                raise
        else:
            if self.raised < _LIMIT:
                self.raised = 0
            return result
        return super(Compiled, module).__call__(*args, **kwargs)  # whose error is one line

    def _has_begun(self, error: Exception) -> bool:
        """Whether `error` was raised behind a graph break: what the call has done before must not be done twice."""
        ours = self.code.co_filename, self.code.co_name
        codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        return any((code.co_filename, code.co_name) == ours for code in codes)

    def _count_error(self) -> None:
        """By itself torch.compile compiles nothing more for a function that has raised: have it go on. But not where
        `_LIMIT` calls in a row have raised, of which each waits for a compiler."""
        from torch._C._dynamo import eval_frame  # not above: it is torch.compile's to import what it needs first

        self.raised += 1
        given_up = self.raised >= _LIMIT and self.options["kernels"] != "triton"
        action = eval_frame._FrameAction.RUN_ONLY if given_up else eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(self.code, eval_frame._FrameExecStrategy(action, action))
        if given_up and self.raised == _LIMIT:
            warnings.warn(
                f"{_LIMIT} calls of {self.function.__name__} in a row have raised or did not compile, so what is not "
                "compiled yet runs as it was written from now on; resnet_triton.refresh lets it be compiled again",
                RuntimeWarning,
                stacklevel=4,
            )

    def _run(self, module: Compiled, args: Any, kwargs: Any) -> Any:
        stay = _programs(module).stay
        try:
            return self.function(module, args, kwargs)
        except RuntimeError as error:
            if "using FX to symbolically trace" in str(error):  # in another thread, for `_uncompiled_reason` saw none
                return super(Compiled, module).__call__(*args, **kwargs)
            return _again(error, module, self.function, args, kwargs, stay)


def _forget_code(code: types.CodeType) -> None:
    """Have Dynamo drop what it has compiled, with its CUDA graphs. It would keep that, and `code`, for good."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(code)


_LIMIT = 16
"""How often a module is compiled because its code or hooks have changed, or calls in a row have raised. Who changes
them at each call, or raises at each call, would wait for a compiler at each call."""


class Programs:
    """The programs of one module, and its replicas. A first call has the module for itself: it compiles, which others
    would do again, and moves filters, which it may have to put back."""

    def __init__(self) -> None:
        self.first, self.process = threading.RLock(), os.getpid()
        self.by_mode: dict[tuple[bool, ...], Program] = {}
        self.made = 0
        self.stay = False
        """Whether filters have turned out to stay where they lie."""

    def __reduce__(self) -> Any:
        """None yet, in copies and pickles: a copy of the module has its own."""
        return type(self), ()

    def ready(self, module: Compiled) -> Program | None:
        """What a call runs, if it has been called before."""
        program = self.by_mode.get(_mode(module))
        return program if program is not None and program.called and program.holds(_original(module)) else None

    def make(self, module: Compiled) -> Program | None:
        """What a call runs that is none of these; None if the module has changed too often."""
        key, replica, module = _mode(module), module, _original(module)
        program = self.by_mode.get(key)
        if program is not None and program.holds(module):  # but its first call has failed
            return program
        self.made += 1
        if self.made > _LIMIT:
            if self.made == _LIMIT + 1:
                warnings.warn(
                    f"{type(module).__name__} runs as it was written from now on, for its hooks, methods or modules "
                    f"were changed {_LIMIT} times; resnet_triton.refresh lets it be compiled again",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return None
        if replica is module:
            _move(module)
        self.by_mode[key] = program = Program(module, replica is not module)
        return program


def _programs(module: nn.Module) -> Programs:
    """The programs of a module, which has some from its first compiled call on."""
    its = vars(_original(module))
    found: Programs | None = its.get("_triton_programs")
    if found is None or found.process != os.getpid():  # a fork has locks that nobody releases
        if found is not None:
            del its["_triton_programs"]
        found = its.setdefault("_triton_programs", Programs())
    return found


def _original(module: Any) -> Any:
    """The module that this is a replica of, or itself."""
    return vars(module).get("_triton_original", module)


def _mode(module: nn.Module) -> tuple[bool, ...]:
    """The mode that a call is made in: each has a program of its own."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), "_triton_original" in vars(module)


def _backend(**settings: Any) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        from .backend import resnet_triton  # not above: importing Dynamo takes two seconds

        return resnet_triton(graph, inputs, **settings)

    return backend


def _fresh(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function, with a code object of its own: by that, Dynamo keeps what it compiled, and only so much."""
    return types.FunctionType(function.__code__.replace(), globals(), name)


def _call(module: Any, args: Any, kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _call_by_class(module: Any, args: Any, kwargs: Any) -> Any:
    cls: Any = original.origin(module)
    return cls.__call__(module, *args, **kwargs)


def forget(module: nn.Module) -> None:
    """Drop what was compiled."""
    vars(module).pop("_triton_programs", None)


# --- filters ---------------------------------------------------------------------------------------------------------

# Kernels read filters in channels_last memory, and else each call copies them. So compiled calls move them there, and
# values lie as if they had not. Where torch.compile fails by that, on a view of what a convolution returns, they stay.


def _filters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, child in module.named_modules():
        weight = child._parameters.get("weight") if isinstance(child, nn.Conv2d) else None
        if weight is not None and not is_lazy(weight):
            yield name, weight


def _moved(module: nn.Module) -> Callable[[], Iterator[nn.Parameter]]:
    owner: Any = weakref.ref(module)
    return lambda: filters.moved(owner(), _filters(owner()))


def _move(module: Compiled) -> None:
    if not (module.training or _programs(module).stay or filters.sharded(module)):
        kernels = module._triton_options["kernels"]
        filters.move(module, ((name, w) for name, w in _filters(module) if dispatch.meant(kernels, w)))


def put_back(module: nn.Module) -> None:
    """Lay the filters of a `Compiled` module out as they were."""
    filters.move_back(module, ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d)))


_OF_LAYOUT = re.compile(r"\bviews?\b|strid|contiguous|memory.format|lie in memory", re.IGNORECASE)
"""What an error says that other filters may mend: ours of `layouts`, PyTorch's, or one of somebody's operator."""


def _again(error: RuntimeError, module: Any, function: Any, args: Any, kwargs: Any, stay: bool) -> Any:
    """A call that has failed, with filters as they were: if that mends it, they stay so. When it began, they did or did
    not `stay`."""
    if not _OF_LAYOUT.search(str(error)):
        raise error
    programs = _programs(module)
    with programs.first:
        if not vars(module).get("_triton_moved") and programs.stay == stay:  # or another thread has just put them back
            raise error  # the module's own: what it has done before must not be done twice
        put_back(module)
        try:
            result = function(module, args, kwargs)
        except Exception:
            _move(module)
            raise
        programs.stay = True
        return result


# --- what `report` asks ----------------------------------------------------------------------------------------------


def is_whole(model: nn.Module) -> bool:
    """Whether `model` itself is compiled, by `optimize` or by torch.compile, and not only what is in it."""
    return isinstance(model, Compiled) or hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


def trace(model: nn.Module, shape: tuple[Any, ...], whole: bool) -> list[Call]:
    """The calls of our operators, and every sizeable one of PyTorch's, in `model(*arguments(shape))` once compiled: the
    `whole` model, or the modules in it that `optimize` has compiled, if there are any."""
    args = tree_map_only(Tensor, torch.clone, arguments(model, shape))  # for a model may write its inputs
    parts = {id(m): name for name, m in model.named_modules() if isinstance(m, Compiled)}
    if whole or not parts or any(is_whole(m) and not isinstance(m, Compiled) for m in model.modules()):
        return _trace(model, args, {})[0]

    def traced(module: Compiled, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            if module._uncompiled_reason(args, kwargs) is None:
                found, result = _trace(module, args, kwargs)
                prefix = parts.get(id(module), "")  # a module in a plain list has no name
                calls.extend(replace(call, name=f"{prefix}.{call.name}".strip(".")) for call in found)
                return result
        return super(Compiled, module).__call__(*args, **kwargs)

    with torch.no_grad(), recorded(model) as calls:
        token = _traced.set(traced)
        try:
            model(*args)
        finally:
            _traced.reset(token)
    return calls


def _trace(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[Call], Any]:
    """The calls of a compiled call, and its result."""
    found: list[Call] = []
    options: dict[str, Any] = {"kernels": "auto", "cuda_graph": False}  # a replay would record nothing
    names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    settings: dict[str, Any] = {"options": options, "names": names}
    if isinstance(model, Compiled):
        options["kernels"], settings["moved"] = model._triton_options["kernels"], _moved(model)
    apart: Any = {"isolate_recompiles": True} if _ISOLATES else {}
    backend = _backend(record=found, **settings)
    function: Any = torch.compile(_fresh(_call, "report"), backend=backend, dynamic=False, **apart)
    token = dispatch.tracer.set(lambda reason: None)  # these calls do not count
    with torch.no_grad():
        try:
            if not isinstance(model, Compiled):
                return found, function(model, args, kwargs)
            programs = _programs(model)
            with programs.first:
                stay = programs.stay
                _move(model)
                try:
                    result = function(model, args, kwargs)
                except RuntimeError as error:
                    found.clear()
                    result = _again(error, model, function, args, kwargs, stay)
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
    for table, own in tables:
        table.update({name: copies.get(id(t), t) for name, t in own.items()})
    devices = {t.device.index for t in chain(model.parameters(), model.buffers()) if t.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for table, own in tables:
            table.update({name: t for name, t in own.items() if table.get(name) is copies.get(id(t), t)})


def _copy(t: Tensor) -> Tensor:
    with torch.inference_mode(t.is_inference()), torch.no_grad():
        return t.clone()


def _addresses(module: nn.Module) -> list[int]:
    return [p.data_ptr() for p in module.parameters() if filters.is_plain(p)]


def _made(module: nn.Module) -> list[Program]:
    programs: Programs | None = vars(module).get("_triton_programs")
    return [] if programs is None else list(programs.by_mode.values())


def describe(module: Compiled) -> str:
    """What CUDA graphs have done for its calls, for `report`."""
    said = [function.describe() for program in _made(module) for function in program.functions()]
    return f"cuda_graph={module._triton_options['cuda_graph']!r}; {'; '.join(said) or 'graphs: none'}"


def limit(model: nn.Module) -> str | None:
    """Whether torch.compile has compiled `model` as often as it does, for `report`."""
    if "torch._dynamo" not in sys.modules:  # which it imports first, in an order of its own
        return None
    from torch._dynamo import config, eval_frame  # not above: importing Dynamo takes two seconds

    from .backend.compile import at_limit

    codes = [program.code for program in _made(model)]
    if not isinstance(model, Compiled):  # a module that somebody has compiled, or what torch.compile returned
        written: Any = getattr(model, "_orig_mod", model)
        called: Any = getattr(model.forward, "_torchdynamo_orig_callable", model.forward)
        codes = [f.__code__ for f in (type(written).forward, called) if hasattr(f, "__code__")]
    full = any(len(eval_frame._debug_get_cache_entry_list(code)) >= config.recompile_limit for code in codes)
    return at_limit("the model") if full else None
