"""Turn a torchvision ResNet into ours and back, and say what runs where."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from . import config, models
from .config.device import facts
from .graphs import runner
from .graphs.runner import CudaGraph
from .ops import dispatch
from .ops.dispatch import Kernels
from .ops.trace import Call, trace

_OURS: dict[str, type[nn.Module]] = {
    "ResNet": models.ResNet, "BasicBlock": models.BasicBlock, "Bottleneck": models.Bottleneck,
}  # fmt: skip


def optimize(
    model: nn.Module,
    *,
    kernels: Kernels = "auto",
    cuda_graph: CudaGraph = "auto",
    freeze: bool = False,
    batch_invariant: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Make a torchvision ResNet, or a model that contains one or its blocks, run on our kernels.

    Returns a new module tree that shares every parameter and buffer with `model` (`inplace=True`: `model` itself).
    Instances get our class, so names, hooks and state_dict stay; classes are never patched. The shared convolution
    weights move to channels_last memory in place; `revert` moves them back. Subclasses with code of their own are left
    alone, but not their blocks. A model of ours only has its modes changed.

    `cuda_graph="auto"` captures the inference of a whole ResNet on a GPU as a CUDA graph when an input shape comes the
    second time, and replays it afterwards; True captures at the first call and warns where that cannot be; False never
    captures. What is done to the model shows at the next call all the same (`runner.py` says how).

    `freeze=True` spares later calls the search for changes: the first inference call after `optimize`, `refresh` or a
    move to another device or dtype takes a snapshot of the batch norms. Filters and classifier are still read where
    they are; anything else that is done to the model shows after `refresh`.

    `batch_invariant=True` makes an image's logits the same, bit for bit, in any batch, at any place and beside any
    neighbours, as `functional` says, for each whole ResNet in `model`; what surrounds it computes as ever. Where that
    cannot be promised (training mode, hooks, layers of another kind, which run module by module) a call raises
    NotImplementedError.

    Raises ValueError if a mode is unknown, there is nothing to optimize, or `cuda_graph=True`, `freeze=True` or
    `batch_invariant=True` finds no whole ResNet.
    """
    dispatch.check_mode(kernels)
    runner.check_mode(cuda_graph)
    kinds = {cls for m in model.modules() for cls in [_our_class(m)] if cls is not None}
    if not kinds:
        raise ValueError(f"{type(model).__name__} contains no torchvision ResNet, BasicBlock or Bottleneck to optimize")
    if models.ResNet not in kinds and (asked := _only_whole(cuda_graph, freeze, batch_invariant)):
        raise ValueError(f"{type(model).__name__} contains no whole ResNet for {asked}")
    if not inplace:
        shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, shared)
    for module in model.modules():
        if _is_torchvision(module):
            module._torchvision_class = type(module)  # type: ignore[assignment]
            module.__class__ = _OURS[type(module).__name__]
        if isinstance(module, tuple(_OURS.values())):
            module.kernels, module.batch_invariant = kernels, batch_invariant  # type: ignore[assignment]
        if isinstance(module, models.ResNet):
            module.cuda_graph, module.frozen = cuda_graph, freeze
            runner.forget(module)
    already = {n for n, p in _filters(model) if p.is_contiguous(memory_format=torch.channels_last)}
    vars(model).setdefault("_channels_last_before", already)
    for _, parameter in _filters(model):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _only_whole(cuda_graph: CudaGraph, freeze: bool, batch_invariant: bool) -> str:
    """Those of the modes asked for that only a whole ResNet has."""
    asked = {"cuda_graph=True": cuda_graph is True, "freeze=True": freeze, "batch_invariant=True": batch_invariant}
    return ", ".join(mode for mode, wanted in asked.items() if wanted)


def revert(model: nn.Module) -> nn.Module:
    """Undo `optimize` in place: torchvision's classes, weights in the memory format they came in. Returns `model`.

    The classes of its modules change, so no call may be under way in another thread. Raises ValueError for a model
    that `optimize` did not convert.
    """
    converted = [m for m in model.modules() if "_torchvision_class" in vars(m)]
    if not converted:
        raise ValueError(f"{type(model).__name__} was not converted by optimize, so there is nothing to revert")
    for module in converted:
        module.__class__ = vars(module).pop("_torchvision_class")
        for name in ("kernels", "batch_invariant", "cuda_graph", "frozen", "_runner"):
            vars(module).pop(name, None)
    already = vars(model).pop("_channels_last_before", set())
    for name, parameter in _filters(model):
        if name not in already:
            parameter.data = parameter.data.contiguous()
    return model


def refresh(model: nn.Module) -> nn.Module:
    """Drop the graphs and snapshots of `model`: the next call sees it as it is then. Returns `model`.

    Only a frozen model needs it; others see what was done to them by themselves. Raises ValueError if `model` contains
    no ResNet of ours.
    """
    ours = [m for m in model.modules() if isinstance(m, models.ResNet)]
    if not ours:
        raise ValueError(f"{type(model).__name__} contains no ResNet of ours, so there is nothing to refresh")
    for module in ours:
        runner.forget(module)
    return model


@dataclass(frozen=True)
class Report:
    """What runs where. `calls` in execution order; `counted`, the operator calls this process has made so far (one that
    a graph repeats is not made again); `graphs`, for each whole ResNet by name, what its graphs have done."""

    calls: list[Call]
    counted: dict[tuple[str, str], int]
    graphs: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "operator", "runs on", "why, or how")]
        rows += [(c.name or "-", c.operator, _backend(c), _detail(c)) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        counts = ", ".join(f"{op} {n} on {backend}" for (op, backend), n in sorted(self.counted.items())) or "none"
        graphs = [f"{name + ': ' if name else ''}{line}" for name, line in self.graphs.items()]
        return "\n".join([*lines, *graphs, f"calls so far in this process: {counts}"])


def report(model: nn.Module, shape: tuple[int, ...] = (1, 3, 224, 224)) -> Report:
    """Which layer of `model` runs on what, and why, for an input of `shape`, as inference would run now.

    Computes nothing: the model is traced on fake tensors.
    """
    graphs = {name: runner.describe(m) for name, m in model.named_modules() if isinstance(m, models.ResNet)}
    return Report(trace(model, shape), dict(dispatch.calls), graphs)


def _backend(call: Call) -> str:
    return "Triton kernel" if call.backend == "triton" else "PyTorch"


def _detail(call: Call) -> str:
    if call.backend != "triton" or call.operator != "conv_bn_relu":
        return call.reason
    here = facts(call.device)
    chosen = config.invariant(call.shape, here) if call.ours.modes.batch_invariant else config.lookup(call.shape, here)
    shared = f"shared by {chosen.split_k} programs" if chosen.split_k > 1 else ""
    how = [f"{chosen.path} path", f"tile {chosen.block_m}x{chosen.block_k}", shared, call.reason]
    return ", ".join(filter(None, how))


def _our_class(module: nn.Module) -> type[nn.Module] | None:
    """What `optimize` makes of a module: our class, or None if it leaves it alone."""
    if _is_torchvision(module):
        return _OURS[type(module).__name__]
    return next((ours for ours in _OURS.values() if isinstance(module, ours)), None)


def _is_torchvision(module: nn.Module) -> bool:
    """Exactly one of torchvision's own ResNet classes; a subclass may have overridden anything."""
    cls = type(module)
    return cls.__module__ == "torchvision.models.resnet" and cls.__name__ in _OURS


def _filters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.dim() == 4)
