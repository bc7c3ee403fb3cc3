"""The functions that torch.compile makes of a `Compiled` module.

Such a function does not notice a hook or a replaced method of an inner module, so `Watch` does, and lets the module be
compiled anew. What neither notices is a method replaced on the class of some object that is no module.

`Programs` keeps a `Program` for each mode, and makes another when code or hooks have changed. A program's first call
has the module for itself: it moves filters to channels_last memory, and where the module's code stumbles over that,
`again` puts them back and calls once more.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import traceback
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import filters
from .graphs.cuda_graph import capturing
from .graphs.fingerprint import Watch
from .graphs.function import GraphedFunction
from .ops import dispatch, original


class Program:
    """The compiled function of one module in one grad mode, for as long as its code and hooks stay what they are."""

    called = False
    """Whether it has been called without an error."""
    raised = 0
    """How many calls in a row have raised one. A call that raises none resets it, but not from `_LIMIT` on."""

    def __init__(self, module: Any, replicas: bool) -> None:
        self.owner: Any = weakref.ref(module)
        self.options = module._triton_options
        self.watch = Watch(module)
        self._functions: list[weakref.ref[GraphedFunction]] = []
        options = {**self.options, "cuda_graph": False} if replicas else self.options  # their parameters are new ones
        ours = backend(options=options, functions=self._functions, moved=moved(module))
        written: Any = original.origin(module)
        usual = written.__call__ is nn.Module.__call__
        function: Any = fresh(call if usual else _as_written, written.__name__)
        self.code = function.__code__
        self.function: Callable[..., Any] = torch.compile(function, backend=ours)
        weakref.finalize(self, _forget_code, self.code).atexit = False

    def functions(self) -> list[GraphedFunction]:
        """What CUDA graphs repeat of it."""
        return [function for ref in self._functions if (function := ref()) is not None]

    def holds(self, module: Any) -> bool:
        return self.owner() is module and self.options == module._triton_options and self.watch.holds()

    def run(self, module: Any, args: Any, kwargs: Any) -> Any:
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
        return _as_written(module, args, kwargs)  # whose error is one line

    def _has_begun(self, error: Exception) -> bool:
        """Whether `error` was raised behind a graph break: what the call has done before must not be done twice."""
        ours = self.code.co_filename, self.code.co_name
        codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        return any((code.co_filename, code.co_name) == ours for code in codes)

    def is_given_up(self) -> bool:
        """Whether it compiles nothing more, for too many calls in a row have raised. Where kernels are required, it
        goes on."""
        return self.raised >= _LIMIT and self.options["kernels"] != "triton"

    def _count_error(self) -> None:
        """By itself torch.compile compiles nothing more for a function that has raised: have it go on. But not where
        `_LIMIT` calls in a row have raised, of which each waits for a compiler."""
        from torch._C._dynamo import eval_frame  # not above: it is torch.compile's to import what it needs first

        self.raised += 1
        action = eval_frame._FrameAction.RUN_ONLY if self.is_given_up() else eval_frame._FrameAction.DEFAULT
        eval_frame.set_code_exec_strategy(self.code, eval_frame._FrameExecStrategy(action, action))
        if self.is_given_up() and self.raised == _LIMIT:
            warnings.warn(
                f"{_LIMIT} calls of {self.function.__name__} in a row have raised or did not compile, so what is not "
                "compiled yet runs as it was written from now on; resnet_triton.refresh lets it be compiled again",
                RuntimeWarning,
                stacklevel=4,
            )

    def _run(self, module: Any, args: Any, kwargs: Any) -> Any:
        stay = of(module).stay
        try:
            return self.function(module, args, kwargs)
        except RuntimeError as error:
            if "using FX to symbolically trace" in str(error):  # in another thread, for `_uncompiled_reason` saw none
                return _as_written(module, args, kwargs)
            return again(error, module, self.function, args, kwargs, stay)


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

    def ready(self, module: Any) -> Program | None:
        """What a call runs, if it has been called before."""
        program = self.by_mode.get(_mode(module))
        return program if program is not None and program.called and program.holds(_original(module)) else None

    def given_up(self) -> str | None:
        """Why nothing more is compiled."""
        if self.made <= _LIMIT:
            return None
        changed = f"its hooks, methods or modules were changed {_LIMIT} times"
        return f"{changed}; resnet_triton.refresh lets it be compiled again"

    def make(self, module: Any) -> Program | None:
        """What a call runs that is none of these; None if the module has changed too often."""
        key, replica, module = _mode(module), module, _original(module)
        program = self.by_mode.get(key)
        if program is not None and program.holds(module):  # but its first call has failed
            return program
        self.made += 1
        if (reason := self.given_up()) is not None:
            dispatch.raise_if_required(module._triton_options["kernels"], reason)
            if self.made == _LIMIT + 1:
                said = f"{type(module).__name__} runs as it was written from now on, for {reason}"
                warnings.warn(said, RuntimeWarning, stacklevel=4)
            return None
        if replica is module:
            move(module)
        self.by_mode[key] = program = Program(module, replica is not module)
        return program


def of(module: nn.Module) -> Programs:
    """The programs of a module, which has some from its first compiled call on."""
    its = vars(_original(module))
    found: Programs | None = its.get("_triton_programs")
    if found is None or found.process != os.getpid():  # a fork has locks that nobody releases
        if found is not None:
            del its["_triton_programs"]
        found = its.setdefault("_triton_programs", Programs())
    return found


def captured(module: Any) -> bool:
    """Whether somebody captures the stream that a call would run on. Warns: nothing is compiled in a capture."""
    first = next(filter(filters.is_plain, module.parameters()), None)
    if first is None or not capturing(first):
        return False
    name: Any = type(module).__name__
    said = "has not been called like this before it is captured; call it once, and then capture"
    dispatch.raise_if_required(module._triton_options["kernels"], f"{name} {said}")
    warnings.warn(f"{name} is captured as it was written, for it {said}", RuntimeWarning, stacklevel=3)
    return True


def _original(module: Any) -> Any:
    """The module that this is a replica of, or itself."""
    return vars(module).get("_triton_original", module)


def _mode(module: nn.Module) -> tuple[bool, ...]:
    """The mode that a call is made in: each has a program of its own."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), "_triton_original" in vars(module)


def backend(**settings: Any) -> Callable[..., Any]:
    """Our backend of torch.compile, with `settings`."""

    def compiled(graph: Any, inputs: Any) -> Any:
        from .backend.compile import compile_graph  # not above: importing Dynamo takes two seconds

        return compile_graph(graph, inputs, **settings)

    return compiled


def fresh(function: Any, name: str) -> Callable[..., Any]:
    """A copy of a function, with code of its own: by that, Dynamo keeps what it compiled, and only so much.

    And by the code's name which sizes have changed: those of another model would make this one's dynamic at once.
    """
    return types.FunctionType(function.__code__.replace(co_name=f"{name}_{next(_numbers)}"), globals(), name)


_numbers = itertools.count()


def call(module: Any, args: Any, kwargs: Any) -> Any:
    """What torch.compile sees of a call: hooks and `forward`."""
    return module._call_impl(*args, **kwargs)


def _as_written(module: Any, args: Any, kwargs: Any) -> Any:
    """A call as the module's class was written."""
    cls: Any = original.origin(module)
    return cls.__call__(module, *args, **kwargs)


def made(module: nn.Module) -> list[Program]:
    """The programs of a module so far."""
    its: Programs | None = vars(module).get("_triton_programs")
    return [] if its is None else list(its.by_mode.values())


def functions(module: nn.Module) -> list[GraphedFunction]:
    """What CUDA graphs repeat of a module."""
    return [function for program in made(module) for function in program.functions()]


def forget(module: nn.Module) -> None:
    """Drop what was compiled."""
    vars(module).pop("_triton_programs", None)


def describe(module: Any) -> str:
    """What CUDA graphs have done for its calls, for `report`."""
    alike = Counter(function.describe() for function in functions(module))
    said = [line if n == 1 else f"{line} ({n} functions)" for line, n in alike.items()]
    its: Programs | None = vars(module).get("_triton_programs")
    if its is not None and (reason := its.given_up()) is not None:
        said.append(f"new calls run as written, for {reason}")
    if any(program.is_given_up() for program in made(module)):
        said.append(f"what is not compiled yet runs as written, for {_LIMIT} calls in a row have raised")
    return f"cuda_graph={module._triton_options['cuda_graph']!r}; {'; '.join(said) or 'graphs: none'}"


# --- filters ---------------------------------------------------------------------------------------------------------

# Kernels read filters in channels_last memory, and else each call copies them. So compiled calls move them there, and
# values lie as if they had not. Where torch.compile fails by that, on a view of what a convolution returns, they stay.


def shared(module: nn.Module, users: filters.Users) -> frozenset[str]:
    """The filters in whose memory are others of a model's `users` than this module's, by their convolutions' names."""
    outside, plain = users - filters.users_of(module), filter(lambda item: filters.is_plain(item[1]), _filters(module))
    return frozenset(name for name, w in plain if w.untyped_storage()._cdata in outside)


def _filters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, child in module.named_modules():
        weight = child._parameters.get("weight") if isinstance(child, nn.Conv2d) else None
        if weight is not None and not is_lazy(weight):
            yield name, weight


def moved(module: nn.Module) -> Callable[[], Iterator[nn.Parameter]]:
    """What gives the filters that `move` has moved."""
    owner: Any = weakref.ref(module)
    return lambda: filters.moved(owner(), _filters(owner()))


def move(module: Any) -> None:
    """Lay the filters out as kernels read them, but where they have to stay."""
    if not (module.training or of(module).stay or filters.sharded(module)):
        kernels = module._triton_options["kernels"]
        own = ((name, w) for name, w in _filters(module) if name not in module._triton_shared)
        ours = ((name, w) for name, w in own if dispatch.meant(kernels, w))
        filters.move(module, ours, filters.users_of(module))


def put_back(module: nn.Module, users: filters.Users | None = None) -> None:
    """Lay the filters of a `Compiled` module out as they were, but where others of the `users` are in their memory."""
    convolutions = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Conv2d))
    filters.move_back(module, convolutions, filters.users_of(module) if users is None else users)


_OF_LAYOUT = re.compile(r"\bviews?\b|strid|contiguous|memory.format|lie in memory", re.IGNORECASE)
"""What an error says that other filters may mend: ours of `layouts`, PyTorch's, or one of somebody's operator."""


def again(error: RuntimeError, module: Any, function: Any, args: Any, kwargs: Any, stay: bool) -> Any:
    """A call that has failed, with filters as they were: if that mends it, they stay so. When it began, they did or did
    not `stay`."""
    if not _OF_LAYOUT.search(str(error)):
        raise error
    programs = of(module)
    with programs.first:
        if next(moved(module)(), None) is None and programs.stay == stay:  # or another thread has just put them back
            raise error  # the module's own: what it has done before must not be done twice
        put_back(module)
        try:
            result = function(module, args, kwargs)
        except Exception:
            move(module)
            raise
        programs.stay = True
        return result
