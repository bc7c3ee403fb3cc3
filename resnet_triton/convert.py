"""Turn a torchvision ResNet into ours and back, and run it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from . import compiled, converted, copies, filters, models, programs
from .compiled import Compiled
from .copies import Model
from .fusion import fuse, is_frozen_norm
from .graphs import runner
from .graphs.replay import CudaGraph, check_cuda_graph
from .ops import dispatch, original
from .ops.dispatch import Kernels

_MODES = ("kernels", "batch_invariant", "cuda_graph", "frozen")
_TORCHVISION = {"_forward_impl", "_make_layer", "expansion"}  # names of its classes, by which ours mean the same
OURS = tuple(converted.OURS.values())


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

    With `inplace=False` the result is a deep copy with parameters and buffers of its own, and `model` stays as it is. A
    function among its attributes or hooks is not copied: what it refers to it still does.

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

    Raises ValueError if a mode is unknown, there is nothing to optimize, `freeze=True` or `batch_invariant=True` finds
    no whole ResNet, `cuda_graph=True` finds nothing but blocks, or something in a ResNet of torchvision's has a name of
    ours, as a part called `kernels` or anything called `normalize`; TypeError if `model` is no module, if its class
    allows no subclass, or for `inplace=False` if it cannot be copied or its copy shares a parameter or buffer.
    """
    check_module(model)
    dispatch.check_kernels(kernels)
    check_cuda_graph(cuda_graph)
    for name, value in (("freeze", freeze), ("batch_invariant", batch_invariant), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}, expected True or False")
    chosen = convertible(model)
    if not chosen:
        _check_compilable(model)
    whole = any(isinstance(m, models.ResNet) or type(m).__name__ == "ResNet" for m in chosen)
    blocks = bool(chosen) and not any(map(converted.is_derived, model.modules()))
    if not whole and (asked := _only_whole(cuda_graph is True and blocks, freeze, batch_invariant)):
        other = ', or torch.compile(model, backend="resnet_triton", options={"batch_invariant": True})'
        raise ValueError(
            f"{qualified(model)} contains no whole ResNet of torchvision's or ours, which {asked} is for; leave it out"
            f"{other if batch_invariant else ''}"
        )
    for module in filter(converted.is_torchvision, chosen):
        _check_names(module)
    if not inplace:
        model = copies.independent(model)
        chosen = convertible(model)
    users = filters.users_of(model)
    for module in chosen if not filters.sharded(model) else ():
        filters.move(module, _filters(module), users)  # before anything else, as memory may run out
    parts = list(filter(converted.is_derived, model.modules())) if chosen else [model]
    users = filters.users_of(model)  # anew, for some have moved
    for module in parts:
        compiled.compile_in_place(module, kernels, cuda_graph, programs.shared(module, users))
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
    """Warn of most convolutions on a GPU left to PyTorch for what they are, which no call changes."""
    found = [
        fuse(conv, norm)
        for module in modules
        for _, conv, norm in _convolutions(module)
        if any(p.is_cuda for p in conv.parameters())
    ]
    left = [why for why in found if isinstance(why, str) and why != dispatch.TRAINING]
    dispatch.warn_of_coverage(left, len(found))


def convertible(model: nn.Module) -> list[nn.Module]:
    """Ours, and those of torchvision's that become ours: none without a batch norm, where the backend can do more."""
    modules = list(model.modules())
    fusable = any(isinstance(m, nn.BatchNorm2d) or is_frozen_norm(type(m)) for m in modules)
    return [m for m in modules if isinstance(m, OURS) or (fusable and converted.is_torchvision(m))]


def _check_compilable(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is compiled by TorchScript; optimize the module that it was made of")
    if isinstance(model, nn.ModuleList | nn.ModuleDict) and type(model).forward is nn.Module.forward:
        raise ValueError(f"{type(model).__name__} is never called itself; optimize the modules in it")
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        other = "where its code calls conv2d itself, torch.compile(model, backend='resnet_triton') takes it"
        raise ValueError(f"{type(model).__name__} contains no Conv2d to optimize; {other}")


def _convert(module: nn.Module) -> None:
    taken = {name: vars(module).pop(name) for name in _MODES if name in vars(module)}  # names that were the user's
    module.__class__ = getattr(converted, type(module).__name__)
    vars(module)["_before"] = taken


def _check_names(module: nn.Module) -> None:
    """ValueError if something of a module's own has a name that, once it is converted, is ours."""
    ours = set(dir(converted.OURS[type(module).__name__])) - set(dir(nn.Module)) - _TORCHVISION
    for name in sorted(ours - (vars(module).keys() & set(_MODES))):  # for those `_convert` has a place
        if not name.startswith("__") and hasattr(module, name):
            raise ValueError(f"{type(module).__name__} has {name!r} already, which is a name of ours; rename it first")


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def qualified(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _only_whole(cuda_graph: CudaGraph, freeze: bool, batch_invariant: bool) -> str:
    """The modes asked for that only a whole ResNet has."""
    asked = {"cuda_graph=True": cuda_graph is True, "freeze=True": freeze, "batch_invariant=True": batch_invariant}
    return ", ".join(mode for mode, wanted in asked.items() if wanted)


def revert(model: Model) -> Model:
    """Undo `optimize` in place: the classes and the memory formats that were there before. Returns `model`.

    The classes of its modules change, so no call may be under way in another thread. Raises ValueError for a model
    that `optimize` did not convert.
    """
    check_module(model)
    found = [m for m in model.modules() if original.origin(m)]
    if not found:
        said = f"{type(model).__name__} was not converted by optimize, so there is nothing to revert"
        own = "; for filters as torch lays them out, call model.to(memory_format=torch.contiguous_format)"
        raise ValueError(said + own if isinstance(model, OURS) else said)
    users = filters.users_of(model)
    for module in found:
        its = vars(module)
        if isinstance(module, Compiled):
            programs.put_back(module, users)
            programs.forget(module)
            del its["_triton_options"], its["_triton_shared"]
        else:
            filters.move_back(module, ((name, conv) for name, conv, _ in _convolutions(module)), users)
            runner.forget(module)
            for name in (*_MODES, "_triton_frozen", "_triton_normalize"):
                its.pop(name, None)
            its.update(its.pop("_before", {}))
        module.__class__ = _without_ours(type(module))
    return model


def _without_ours(cls: Any) -> Any:
    """The class that ours was made of; of one that a library derived from ours, the same derived from that."""
    if not issubclass(cls, (*OURS, Compiled)):
        return cls
    if (written := vars(cls).get("written_class")) is not None:
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
    check_module(model)
    ours = [m for m in model.modules() if isinstance(m, models.ResNet | Compiled)]
    if not ours:
        raise ValueError(
            f"{qualified(model)} contains no ResNet of ours and nothing compiled, so there is nothing to refresh; "
            "call optimize(model) first"
        )
    for module in ours:
        runner.forget(module)
        programs.forget(module)
    return model


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """In `with disabled(model):` calls of `model` run the code that it came with, without kernels and graphs.

    For comparisons: one model, so nothing has to be kept equal. `model` may also contain what was optimized, or be one
    of ours. It nests, and other threads are not affected, except in code made by torch.compile, which cannot tell
    threads apart. Tracers see torchvision's code, too: a feature extractor made here finds all of its nodes. Filters
    stay in channels_last memory, so answers may differ by a rounding from those before `optimize`.

    Raises ValueError if `model` contains nothing of ours, TypeError if it is no module.
    """
    check_module(model)
    ours = [m for m in model.modules() if isinstance(m, (*OURS, Compiled))]
    if not ours:
        raise ValueError(f"{type(model).__name__} contains nothing of ours to disable, expected what optimize returned")
    return original.disable(ours)


def _convolutions(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.Module | None]]:
    """The convolutions that a ResNet or a block computes itself, by name, and the norm behind each."""
    children = list(module.named_children())
    for (name, child), (_, behind) in zip(children, [*children[1:], ("", None)], strict=False):  # there may be none
        if isinstance(child, nn.Sequential) and name == "downsample":
            yield from ((f"{name}.{inner}", conv, norm) for inner, conv, norm in _convolutions(child))
        elif isinstance(child, nn.Conv2d) and (name.startswith("conv") or isinstance(module, nn.Sequential)):
            yield name, child, behind


def _filters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, conv, _ in _convolutions(module):
        weight = conv._parameters.get("weight") if type(conv) is nn.Conv2d else None  # else it is computed
        if weight is not None:
            yield name, weight
