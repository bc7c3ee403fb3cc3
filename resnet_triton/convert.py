"""Turn a torchvision ResNet into ours and back, run it as it was, and say what runs where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from . import compiled, config, converted, copies, filters, models
from .compiled import Compiled
from .copies import Model
from .fusion import fuse
from .graphs import runner
from .graphs.replay import CudaGraph, check_mode
from .ops import ConvBnRelu, dispatch, original, specialised
from .ops.dispatch import Kernels
from .ops.trace import Call, compile_calls, trace
from .support.processes import cores

_MODES = ("kernels", "batch_invariant", "cuda_graph", "frozen")
_OURS = tuple(converted.OURS.values())


def optimize(
    model: Model,
    *,
    kernels: Kernels = "auto",
    cuda_graph: CudaGraph = "auto",
    freeze: bool = False,
    batch_invariant: bool = False,
    inplace: bool = True,
) -> Model:
    """Make a model with convolutions run on our kernels where they apply. Returns `model`.

    It stays the model that it is, as with `.half()`: same parameters, buffers, hooks and names, and still an instance
    of its class. `revert(model)` undoes it, and within `with disabled(model):` it runs as before, so that answers can
    be compared. What changes:

    * The code of torchvision's ResNets and blocks, wherever they are in `model`, and the memory format of their
      filters, which move to channels_last unless they lie in memory that others use, as FSDP does.
    * A subclass with code of its own, and a model that has no ResNets, or no batch norm in them any more, run through
      our backend of torch.compile, which takes whatever that takes. The first call compiles. Calls that want gradients,
      in training mode, or that a tracer sees run as the model was written. The first compiled call moves its filters,
      too, unless its code would notice; `train()` moves them back. Else each call copies them, until
      `model.to(memory_format=torch.channels_last)`.

    Of a model that was optimized before only the modes change.

    With `inplace=False` the result is a deep copy that shares nothing with `model`, which stays as it is.

    `cuda_graph="auto"` captures the inference of a whole ResNet, or of a compiled model, on a GPU as a CUDA graph when
    an input shape comes the second time, and replays it afterwards; True captures at the first call and warns where
    that cannot be; False never captures. What is done to the model shows at the next call all the same.

    `freeze=True` spares later calls the search for changes: the first inference call after `optimize`, `refresh` or a
    move to another device or dtype takes a snapshot of the batch norms. Filters and classifier are still read where
    they are; anything else that is done to the model shows after `refresh`.

    A ResNet that was converted has `normalize`, as `ResNet` says; for any other model it is an attribute like all.

    `batch_invariant=True` makes an image's logits the same, bit for bit, in any batch, at any place and beside any
    neighbours, as `functional` says, for each whole ResNet in `model`; what surrounds it computes as ever. Where that
    cannot be promised (training mode, hooks, layers of another kind, which run module by module) a call raises
    NotImplementedError.

    Raises ValueError if a mode is unknown, there is nothing to optimize, or `freeze=True` or `batch_invariant=True`
    finds no whole ResNet, or `cuda_graph=True` nothing but blocks; TypeError if `model` is no module, or for
    `inplace=False` if it holds something that cannot be copied.
    """
    _check_module(model)
    dispatch.check_mode(kernels)
    check_mode(cuda_graph)
    for name, value in (("freeze", freeze), ("batch_invariant", batch_invariant), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}, expected True or False")
    chosen = _chosen(model)
    if not chosen:
        _check_compilable(model)
    whole = any(isinstance(m, models.ResNet) or type(m).__name__ == "ResNet" for m in chosen)
    blocks = bool(chosen) and not any(map(converted.is_derived, model.modules()))
    if not whole and (asked := _only_whole(cuda_graph is True and blocks, freeze, batch_invariant)):
        other = ', or torch.compile(model, backend="resnet_triton", options={"batch_invariant": True})'
        raise ValueError(
            f"{_qualified(model)} contains no whole ResNet of torchvision's or ours, which {asked} is for; leave it out"
            f"{other if batch_invariant else ''}"
        )
    if not inplace:
        for module in model.modules():
            compiled.forget(module)  # which a copy cannot take along
        model = copies.independent(model)
        chosen = _chosen(model)
    for module in chosen if not filters.sharded(model) else ():
        filters.move(module, _filters(module))  # before anything else, as memory may run out
    for module in filter(converted.is_derived, model.modules()) if chosen else (model,):
        compiled.compile_in_place(module, kernels, cuda_graph)
    for module in chosen:
        if converted.is_torchvision(module):
            _convert(module)
        module.kernels, module.batch_invariant = kernels, batch_invariant  # type: ignore[assignment]
        if isinstance(module, models.ResNet):
            module.cuda_graph, module.frozen = cuda_graph, freeze
            runner.forget(module)
    _warn_of_coverage(chosen)
    return model


def _warn_of_coverage(modules: list[nn.Module]) -> None:
    """Of most convolutions on a GPU left to PyTorch for what they are, which no call changes."""
    found = [
        fuse(conv, norm)
        for module in modules
        for _, conv, norm in _convolutions(module)
        if any(map(dispatch.is_on_gpu, conv.parameters()))
    ]
    left = [why for why in found if isinstance(why, str) and why != "training mode"]
    dispatch.warn_of_coverage(left, len(found))


def _chosen(model: nn.Module) -> list[nn.Module]:
    """Ours, and those of torchvision's that become ours: none without a batch norm, where the backend can do more."""
    modules = list(model.modules())
    fusable = any(isinstance(m, nn.BatchNorm2d) or type(m).__name__ == "FrozenBatchNorm2d" for m in modules)
    return [m for m in modules if isinstance(m, _OURS) or (fusable and converted.is_torchvision(m))]


def _check_compilable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is compiled by TorchScript; optimize the module that it was made of")
    if isinstance(model, nn.ModuleList | nn.ModuleDict) and type(model).forward is nn.Module.forward:
        raise ValueError(f"{type(model).__name__} is never called itself; optimize the modules in it")
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} contains no Conv2d to optimize")


def _convert(module: nn.Module) -> None:
    taken = {name: vars(module).pop(name) for name in _MODES if name in vars(module)}  # names that were the user's
    module.__class__ = getattr(converted, type(module).__name__)
    vars(module)["_before"] = taken


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def _qualified(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _of_a_call(shape: tuple[Any, ...] | Tensor) -> tuple[Any, ...]:
    if isinstance(shape, Tensor):
        return (shape,)
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape is a {type(shape).__name__}, expected a tuple of sizes, as (1, 3, 224, 224)")
    return tuple(shape)


def _only_whole(cuda_graph: CudaGraph, freeze: bool, batch_invariant: bool) -> str:
    """Those of the modes asked for that only a whole ResNet has."""
    asked = {"cuda_graph=True": cuda_graph is True, "freeze=True": freeze, "batch_invariant=True": batch_invariant}
    return ", ".join(mode for mode, wanted in asked.items() if wanted)


def revert(model: Model) -> Model:
    """Undo `optimize` in place: the classes and the memory formats that were there before. Returns `model`.

    The classes of its modules change, so no call may be under way in another thread. Raises ValueError for a model
    that `optimize` did not convert.
    """
    _check_module(model)
    found = [m for m in model.modules() if converted.origin(m) or compiled.origin(m)]
    if not found:
        raise ValueError(f"{type(model).__name__} was not converted by optimize, so there is nothing to revert")
    for module in found:
        its = vars(module)
        if isinstance(module, Compiled):
            compiled.put_back(module)
            compiled.forget(module)
            del its["_triton_options"]
        else:
            filters.move_back(module, ((name, conv) for name, conv, _ in _convolutions(module)))
            runner.forget(module)
            for name in (*_MODES, "_normalize"):
                its.pop(name, None)
            its.update(its.pop("_before", {}))
        module.__class__ = _without_ours(type(module))
    return model


def _without_ours(cls: Any) -> Any:
    """The class that ours was made of; of one that a library derived from ours, the same derived from that."""
    if not issubclass(cls, (*_OURS, Compiled)):
        return cls
    if (written := vars(cls).get("torchvision_class") or vars(cls).get("written_class")) is not None:
        return written
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(map(_without_ours, cls.__bases__)), members)


def refresh(model: Model) -> Model:
    """Drop what was captured, frozen and compiled: the next call sees `model` as it is then. Returns `model`.

    A frozen model needs it after an edit. One that runs through torch.compile needs it after a method was replaced on
    an object that is no module, after a first call that computed what is kept, as YOLO's anchors, and once it was
    changed so often that it is compiled no more (docs/models.md has all cases). Others see by themselves what was done
    to them. Raises ValueError if `model` contains no ResNet of ours and nothing that was compiled.
    """
    _check_module(model)
    ours = [m for m in model.modules() if isinstance(m, models.ResNet | Compiled)]
    if not ours:
        raise ValueError(
            f"{_qualified(model)} contains no ResNet of ours and nothing compiled, so there is nothing to refresh; "
            "call optimize(model) first"
        )
    for module in ours:
        runner.forget(module)
        compiled.forget(module)
    return model


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """In `with disabled(model):` calls of `model` run the code that it came with, without kernels and graphs.

    For comparisons: one model, so nothing has to be kept equal. `model` may also contain what was optimized, or be one
    of ours. It nests, and other threads are not affected, except in code made by torch.compile, which cannot tell
    threads apart. Tracers see torchvision's code, too: a feature extractor made here finds all of its nodes. Filters
    stay in channels_last memory, so answers may differ by a rounding from those before `optimize`.

    Raises ValueError if `model` contains nothing of ours, TypeError if it is no module.
    """
    _check_module(model)
    ours = [m for m in model.modules() if isinstance(m, (*_OURS, Compiled))]
    if not ours:
        raise ValueError(f"{type(model).__name__} contains nothing of ours to disable, expected what optimize returned")
    return original.disable(ours)


@dataclass(frozen=True)
class Report:
    """What runs where. `calls` in execution order; `counted`, the operator calls this process has made so far (one that
    a graph repeats is not made again); `graphs`, for each whole ResNet and compiled model by name, what its graphs have
    done; `replaced`, by name, modules with code that is not torchvision's, PyTorch's or ours, which therefore run as
    they are; `untuned`, one line if convolutions run on kernels, on a GPU on which no tile was ever timed; `limit`, one
    if torch.compile will not compile the model again."""

    calls: list[Call]
    counted: dict[tuple[str, str], int]
    graphs: dict[str, str]
    replaced: dict[str, str]
    untuned: str | None = None
    limit: str | None = None

    def __str__(self) -> str:
        rows = [("layer", "operator", "runs on", "why, or how")]
        rows += [(c.name or "-", c.operator, _name(c.backend), _detail(c)) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        counted = (f"{op} {n} on {_name(backend)}" for (op, backend), n in sorted(self.counted.items()))
        counts = ", ".join(counted) or "none"
        graphs = [f"{name + ': ' if name else ''}{line}" for name, line in self.graphs.items()]
        where: dict[str, list[str]] = {}
        for name, why in self.replaced.items():
            where.setdefault(why, []).append(name or "the model")
        runs = [f"{why}, so what is there now runs: {_some(names)}" for why, names in where.items()]
        said = [line for line in (self.untuned, self.limit) if line]
        return "\n".join([*lines, *said, *graphs, *runs, f"calls so far in this process: {counts}"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def report(model: nn.Module, shape: tuple[Any, ...] | Tensor = (1, 3, 224, 224)) -> Report:
    """Which layer of `model` runs on what, and why, for an input of `shape`, as inference would run now.

    `shape` may also be the tuple of a call's arguments, or its one tensor. If all that was
    optimized is torchvision's own, nothing is computed: the model is traced on fake tensors. Any other model, and one
    that torch.compile was given, is compiled again for this, with our backend, and called once, on zeros; what it
    writes into its buffers, as batch norms do in training mode, is undone. TypeError if `model` is no module or `shape`
    no tuple, ValueError if it cannot be called so.
    """
    _check_module(model)
    shape = _of_a_call(shape)
    if isinstance(model, nn.DataParallel):
        model = model.module
    whole = compiled.is_whole(model)
    by_compiler = whole or not _chosen(model) or any(isinstance(m, Compiled) for m in model.modules())
    limit = compiled.limit(model) if by_compiler else None
    model = getattr(model, "_orig_mod", model)  # of what torch.compile returned
    graphs = {name: runner.describe(m) for name, m in model.named_modules() if isinstance(m, models.ResNet)}
    graphs |= {name: compiled.describe(m) for name, m in model.named_modules() if isinstance(m, Compiled)}
    replaced = {name: why for name, m in model.named_modules() if (why := original.replaced(m)) is not None}
    try:
        with compiled.undone(model) if by_compiler else nullcontext():
            found = compiled.trace(model, shape, whole) if by_compiler else trace(model, shape)
    except NotImplementedError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        said = f"{type(model).__name__} cannot be traced, for what it does depends on values ({error.func})"
        raise ValueError(f"{said}; report a module in it, as a detector's backbone") from error
    except Exception as error:
        given, other = "these arguments", ""
        if all(isinstance(size, int) for size in shape):
            given, other = f"zeros of {shape}", "another size, as report(model, (1, 3, 96, 96)), or "
        said = f"{type(model).__name__} does not take {given}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{said}; give {other}all arguments of a call, or report a module in it") from error
    calls = [_explained(call, replaced, _left(model)) for call in found]
    tiled = [call.device for call in calls if call.backend == "triton" and call.tiled]
    untuned = config.untuned(specialised.facts(tiled[0])) if tiled else None
    return Report(calls, dict(dispatch.calls), graphs, replaced, untuned, limit)


def precompile(model: nn.Module, shape: tuple[Any, ...] | Tensor = (1, 3, 224, 224)) -> None:
    """Compile the kernels that `model` would run now for an input of `shape` in its dtype, side by side on all cores.

    A first call finds them then; by itself it compiles one after another. What is in Triton's cache is only loaded, and
    a kernel that does not compile is left to the call. Runs nothing: the model is traced on fake tensors. TypeError if
    `model` is no module or `shape` no tuple, ValueError if it contains no ResNet or block of one.
    """
    _check_module(model)
    shape = _of_a_call(shape)
    if not _chosen(model):
        said = f"{_qualified(model)} contains no ResNet of torchvision's or ours to precompile"
        raise ValueError(f"{said}; leave it out, for the first call compiles")
    compile_calls(trace(model, shape), cores())


def _left(model: nn.Module) -> str:
    """Why modules run as they are that nothing of ours has called."""
    ours = [m for m in model.modules() if isinstance(m, (*_OURS, Compiled))]
    if not ours:
        return "not optimized: call optimize(model)"
    if original.anywhere and all(map(original.is_disabled, ours)):
        return "disabled"
    return "outside what optimize takes: torch.compile(model, backend='resnet_triton') reaches it, too"


def _explained(call: Call, replaced: dict[str, str], left: str) -> Call:
    """A call that nothing of ours has made says why: its module's code was replaced, or `left`."""
    if call.operation is not None or call.reason:
        return call
    inside = [name for name in replaced if f"{call.name}.".startswith(f"{name}." if name else "")] if call.name else []
    if not inside:
        return replace(call, reason=left)
    name = max(inside, key=len)
    return replace(call, reason=f"{name or 'the model'}: {replaced[name]}")


def _name(backend: str) -> str:
    return {"triton": "Triton", "torch": "PyTorch"}[backend]


def _detail(call: Call) -> str:
    weight = getattr(call.operation, "weight", None)
    moved = weight is None or weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    copied = (
        ""
        if moved or call.backend != "triton"
        else "each call copies its filters, which are not in channels_last memory"
    )
    if call.backend != "triton" or not call.tiled:
        convolution = call.operation if call.backend == "triton" else None
        path = ""
        if isinstance(convolution, ConvBnRelu):
            path = "depthwise path" if convolution.depthwise else "grouped path"
        return ", ".join(filter(None, (path, call.reason, copied)))
    here = specialised.facts(call.device)
    chosen = config.invariant(call.shape, here) if call.ours.modes.batch_invariant else config.lookup(call.shape, here)
    shared = f"shared by {chosen.split_k} programs" if chosen.split_k > 1 else ""
    how = [f"{chosen.path} path", f"tile {chosen.block_m}x{chosen.block_k}", shared, call.reason, copied]
    return ", ".join(filter(None, how))


def _convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.Module | None]]:
    """Those that a ResNet or a block computes itself, by name, and the norm behind each."""
    children = list(module.named_children())
    for (name, child), (_, behind) in zip(children, [*children[1:], ("", None)], strict=True):
        if isinstance(child, nn.Sequential) and name == "downsample":
            yield from ((f"{name}.{inner}", conv, norm) for inner, conv, norm in _convolutions(child))
        elif isinstance(child, nn.Conv2d) and (name.startswith("conv") or isinstance(module, nn.Sequential)):
            yield name, child, behind


def _filters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, conv, _ in _convolutions(module):
        weight = conv._parameters.get("weight") if type(conv) is nn.Conv2d else None  # else it is computed
        if weight is not None:
            yield name, weight
