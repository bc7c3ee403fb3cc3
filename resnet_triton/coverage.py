"""What runs where: each layer of a model on our kernels or on PyTorch, and why; and compiling those kernels ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from . import compiled_report, config, models, programs
from .compiled import Compiled
from .convert import OURS, check_module, convertible, qualified
from .entry_point import BACKEND
from .graphs import runner
from .ops import dispatch, first_run, gluon, original
from .ops.trace import Call, compile_calls, trace
from .support.processes import cores


@dataclass(frozen=True)
class Report:
    """What runs where. `calls` in execution order; `counted`, the operator calls this process has made so far (one that
    a graph repeats is not made again); `graphs`, for each whole ResNet and compiled model by name, what its graphs have
    done; `replaced`, by name, modules with code that is not torchvision's, PyTorch's or ours, which therefore run as
    they are; `compared`, one line on kernels' first results, if a GPU has given any; `untuned`, one if convolutions run
    on kernels, on a GPU on which no tile was ever timed."""

    calls: list[Call]
    counted: dict[tuple[str, str], int]
    graphs: dict[str, str]
    replaced: dict[str, str]
    compared: str | None = None
    untuned: str | None = None

    def __str__(self) -> str:
        rows = [("layer", "operator", "runs on", "why, or how")]
        rows += [(c.name or "-", c.operator, BACKENDS[c.backend], detail(c)) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        counted = (f"{op} {n} on {BACKENDS[backend]}" for (op, backend), n in sorted(self.counted.items()))
        counts = ", ".join(counted) or "none"
        graphs = [f"{name + ': ' if name else ''}{line}" for name, line in self.graphs.items()]
        where: dict[str, list[str]] = {}
        for name, why in self.replaced.items():
            where.setdefault(why, []).append(name or "the model")
        runs = [f"{why}, so what is there now runs: {_some(names)}" for why, names in where.items()]
        said = [line for line in (self.untuned, self.compared) if line]
        return "\n".join([*lines, *said, *graphs, *runs, f"calls so far in this process: {counts}"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def report(model: nn.Module, inputs: tuple[Any, ...] | Tensor = (1, 3, 224, 224)) -> Report:
    """Which layer of `model` runs on what, and why, as inference would run now.

    `inputs` is a tensor, the tuple of a call's arguments, or the shape of one input in the model's dtype. If all that
    was optimized is torchvision's own, nothing is computed: the model is traced on fake tensors. Any other model, and
    one that torch.compile was given, is compiled again for this, with our backend, and called once, of a shape on
    zeros; what it writes into its buffers, as batch norms do in training mode, is undone. Of one that torch.compile was
    given for another backend, what it was written as is reported. TypeError if `model` is no module or `inputs` neither
    tensor nor tuple, ValueError if it cannot be called so.
    """
    check_module(model)
    given = _of_a_call(inputs)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    outer, backend = compiled_report.by_torch(model), compiled_report.other_backend(model)
    by_compiler = outer or not convertible(model) or any(isinstance(m, Compiled) for m in model.modules())
    by_compiler = by_compiler and backend is None
    model = getattr(model, "_orig_mod", model)  # of what torch.compile returned
    graphs = {name: runner.describe(m) for name, m in model.named_modules() if isinstance(m, models.ResNet)}
    graphs |= {name: programs.describe(m) for name, m in model.named_modules() if isinstance(m, Compiled)}
    replaced = {name: why for name, m in model.named_modules() if (why := original.replaced(m)) is not None}
    try:
        with compiled_report.undone(model) if by_compiler else nullcontext():
            found = compiled_report.trace(model, given, outer) if by_compiler else trace(model, given)
    except NotImplementedError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        said = f"{type(model).__name__} cannot be traced, for what it does depends on values ({error.func})"
        raise ValueError(f"{said}; report a module in it, as a detector's backbone") from error
    except Exception as error:
        what, other = "these arguments", ""
        if all(isinstance(size, int) for size in given):
            what, other = f"zeros of {given}", "another size, as report(model, (1, 3, 96, 96)), or "
        said = f"{type(model).__name__} does not take {what}: {str(_of_the_model(error)).partition(chr(10))[0]}"
        raise ValueError(f"{said}; give {other}all arguments of a call, or report a module in it") from error
    left = _left(model) if backend is None else f"compiled by the backend {backend!r}: ours is backend={BACKEND!r}"
    calls = [_explained(call, replaced, left) for call in found]
    tiled = [call.device for call in calls if call.backend == "triton" and call.tiled]
    untuned = config.untuned(gluon.facts(tiled[0])) if tiled else None
    return Report(calls, dict(dispatch.calls), graphs, replaced, first_run.describe(), untuned)


def _of_the_model(error: BaseException) -> BaseException:
    """What the model raised, of which an error of torch.compile's says little in its first line."""
    while (inner := error.__cause__ or error.__context__) and _is_of_dynamo(error):
        error = inner
    return error


def _is_of_dynamo(error: BaseException) -> bool:
    """torch 2.15 wraps what was raised in a RuntimeError of its own, too."""
    return type(error).__module__.startswith("torch._dynamo") or str(error).startswith("Dynamo failed to run")


def precompile(model: nn.Module, inputs: tuple[Any, ...] | Tensor = (1, 3, 224, 224)) -> None:
    """Compile the kernels that `model` would run now for `inputs`, as `report` takes them, side by side on all cores.

    A first call, and the capture of a graph, find them then; by themselves they compile one after another. What is in
    Triton's cache is only loaded, and a kernel that does not compile is left to the call. Runs nothing: the model is
    traced on fake tensors. TypeError if `model` is no module or `inputs` neither tensor nor tuple, ValueError if it
    contains no ResNet or block of one, or none that runs on our operators.
    """
    check_module(model)
    given = _of_a_call(inputs)
    if not convertible(model):
        said = f"{qualified(model)} contains no ResNet of torchvision's or ours to precompile"
        raise ValueError(f"{said}; leave it out, for the first call compiles")
    calls = trace(model, given)
    if all(call.operation is None for call in calls):
        why = next((call.reason for call in calls if call.reason), _left(model))
        if any(isinstance(m, Compiled) or compiled_report.by_torch(m) for m in model.modules()):
            why = "torch.compile has it; leave it out, for the first call compiles"
        raise ValueError(f"{qualified(getattr(model, '_orig_mod', model))} has nothing to precompile: {why}")
    compile_calls(calls, cores())


def _of_a_call(inputs: tuple[Any, ...] | Tensor) -> tuple[Any, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple | list):
        raise TypeError(f"inputs is a {type(inputs).__name__}, expected a tensor, or a tuple as (1, 3, 224, 224)")
    return tuple(inputs)


def _left(model: nn.Module) -> str:
    """Why modules run as they are that nothing of ours has called."""
    ours = [m for m in model.modules() if isinstance(m, (*OURS, Compiled))]
    if not ours:
        return "not optimized: call optimize(model)"
    traced = [m for m in ours if not isinstance(m, Compiled)]  # the others say why their calls run as written
    if original.anywhere and traced and all(map(original.is_disabled, traced)):
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


BACKENDS = {"triton": "Triton", "torch": "PyTorch"}
"""What people call them."""


def detail(call: Call) -> str:
    """How our kernels compute a call, or why they do not."""
    if call.backend != "triton":
        return call.reason
    weight = getattr(call.operation, "weight", None)
    moved = weight is None or weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    copied = "" if moved else "each call copies its filters, which are not in channels_last memory"
    return ", ".join(filter(None, (*_how(call), call.reason, copied)))


def _how(call: Call) -> Iterator[str]:
    facts = gluon.facts(call.device)
    yield " + ".join(call.kernels(facts))
    if (tile := call.tile(facts)) is not None:
        yield f"tile {tile.block_m}x{tile.block_k}"
        if tile.split_k > 1:
            yield f"shared by {tile.split_k} programs"
