"""Which operators a model calls, with which shapes, found without computing anything.

The model runs on fake tensors, so a trace costs milliseconds, needs no GPU and no memory, and follows the model as it
is now: hooks, replaced layers, training mode. Reports, ahead-of-time compilation and benchmarks all start here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..config import ConvConfig, ConvShape
from ..config.device import DeviceFacts
from ..kernels.launch import Launch
from . import OPERATORS, ConvBnRelu, Operation, gluon, interpreter
from .dispatch import tracer
from .in_graph import dependent_launches

_HEAVY = (
    "convolution", "mm", "addmm", "max_pool2d_with_indices", "mean", "add",
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm",
    "native_group_norm", "native_layer_norm",
    "relu", "hardtanh", "leaky_relu", "hardswish", "silu", "gelu",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call in a model: of our `operator`, or `aten.NAME` of PyTorch's.

    `name` is the module whose weight it used ("" for none), `operation` the call itself with meta tensors in place of
    real ones (None for PyTorch's), `backend` "triton" or "torch" on `device`, and `reason` why ("" where it was called
    as any module is).
    """

    name: str
    operator: str
    operation: Operation | None
    device: torch.device
    backend: str
    reason: str

    @property
    def ours(self) -> Operation:
        """The operation, of a call that has one."""
        if self.operation is None:
            raise ValueError(f"{self.operator} is PyTorch's, expected an operator of ours")
        return self.operation

    @property
    def tiled(self) -> bool:
        """Whether our kernels would compute it with a configuration that is looked up."""
        return isinstance(self.operation, ConvBnRelu) and self.operation.tiled

    @property
    def shape(self) -> ConvShape:
        """The configuration key of a convolution."""
        convolution: Any = self.operation
        if not self.tiled:
            raise ValueError(f"{self.operator} has no such key, expected conv_bn_relu of one group")
        return convolution.shape

    def launches(self, facts: DeviceFacts) -> tuple[Launch, ...]:
        """The launches our kernels would make of this call on a device with these facts, in order."""
        with unset_fake_temporarily():  # a compiler's, in which meta tensors would be fake ones
            out = self.ours.output()
            return self.ours.launches(out, facts) if out.numel() else ()

    def kernels(self, facts: DeviceFacts) -> list[str]:
        """The names of the kernels that `launches` would launch."""
        tile = self.tile(facts)
        return [tile.kernel] if tile is not None else [launch.name for launch in self.launches(facts)]

    def tile(self, facts: DeviceFacts) -> ConvConfig | None:
        """The configuration that `launches` would use; None for what is no convolution, and for a depthwise one."""
        if not isinstance(self.operation, ConvBnRelu) or self.operation.depthwise:
            return None
        return self.operation.choose_tile(facts).config


def arguments(model: nn.Module, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The arguments of a call: zeros of a shape, or what is given if that is none."""
    if not all(isinstance(size, int) for size in shape):
        return shape
    parameter = next(model.parameters())
    return (torch.zeros(shape, dtype=dtype or parameter.dtype, device=parameter.device),)


def trace(model: nn.Module, shape: tuple[Any, ...] = (1, 3, 224, 224), dtype: torch.dtype | None = None) -> list[Call]:
    """Every call of our operators, and every sizeable one PyTorch runs itself, in `model(*arguments(model, shape))`.

    By default the model is taken as it is, and other threads may call it meanwhile. `dtype` reads it as if it had been
    converted, which they would notice. Forward hooks run, on fakes.
    """
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    own = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    with FakeTensorMode() as fake:
        tensors = {} if dtype is None else {name: _as(fake.from_tensor(t), dtype) for name, t in named.items()}
        recorder = _Recorder({id(t): name.rpartition(".")[0] for name, t in (tensors or named).items()}, fake)
        args = tree_map_only(Tensor, fake.from_tensor, arguments(model, shape, dtype))
        token = tracer.set(recorder.explain)
        try:
            with torch.no_grad(), recorder:
                functional_call(model, tensors, args)
        finally:
            tracer.reset(token)
            for buffers, before in own:
                if any(isinstance(t, FakeTensor) for t in buffers.values()):  # which the module has set itself
                    buffers.clear()
                    buffers.update(before)
    return list(map(_without_memory, recorder.calls))


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The calls that are made in this block, on real tensors; whole when it ends."""
    named = chain(model.named_parameters(), model.named_buffers())
    recorder = _Recorder({id(t): name.rpartition(".")[0] for name, t in named})
    token = tracer.set(recorder.explain)
    try:
        with recorder:
            yield recorder.calls
    finally:
        tracer.reset(token)
        recorder.calls[:] = map(_without_memory, recorder.calls)


Before = Callable[[fx.Node, dict[fx.Node, Any]], None]
"""What is told of a node before it runs, and of the values that there are by then."""


def trace_graph(graph: fx.GraphModule, names: dict[fx.Node, str], before: Before) -> list[Call]:
    """The calls of a functional graph, which it propagates: `names` are its nodes' modules.

    A node's `meta["reason"]` says why PyTorch runs it. Sizes must be numbers, for where a call runs may depend on them.
    """
    recorder = _Recorder({})

    def enter(node: fx.Node, values: dict[fx.Node, Any]) -> None:
        before(node, values)
        reason = node.meta.get("reason", "none of our operators computes it")
        recorder.here, recorder.reason = names.get(node, ""), reason

    token = tracer.set(recorder.explain)
    try:
        with recorder:
            propagate(graph, enter)
    finally:
        tracer.reset(token)
    return list(map(_without_memory, recorder.calls))


def propagate(graph: fx.GraphModule, before: Before) -> None:
    """Bring the fake tensors in the `meta["val"]` of a graph's nodes up to date."""
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    _Propagation(graph, detect_fake_mode(inputs), before).propagate_dont_convert_inputs(*inputs)


class _Propagation(FakeTensorProp):
    def __init__(self, graph: Any, mode: Any, before: Before) -> None:
        super().__init__(graph, mode)
        self.before = before

    def run_node(self, n: fx.Node) -> Any:
        with self._mode:
            self.before(n, self.env)
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value  # a branch is a graph


def compile_calls(calls: Iterable[Call], jobs: int) -> None:
    """Compile in `jobs` threads what those calls launch that run on our kernels; nothing where these are interpreted.

    By themselves, and in a graph. A kernel that fails is left to fail when it runs.
    """
    launches: dict[torch.device, list[Launch]] = {}
    for call in calls:
        if call.backend == "triton" and not interpreter.active():
            launches.setdefault(call.device, []).extend(_all_launches(call))
    for device, found in launches.items():
        from triton import AsyncCompileMode

        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with here, ThreadPoolExecutor(jobs) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for launch in found:
                launch.compile()


def _all_launches(call: Call) -> Iterator[Launch]:
    facts = gluon.facts(call.device)
    yield from call.launches(facts)
    token = dependent_launches.set(True)
    try:
        yield from (launch for launch in call.launches(facts) if launch.dependent)
    finally:
        dependent_launches.reset(token)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype) if t.is_floating_point() else t


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, names: dict[int, str], fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.fake = names, fake
        self.calls: list[Call] = []
        self.here, self.reason = "", ""

    def explain(self, reason: str) -> None:
        """Take the reason why the operators that follow run module by module."""
        self.reason = reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = next((self.names[id(a)] for a in args if id(a) in self.names), self.here)
        if (fake := self.fake) is not None:  # the model's own tensors stay in it, for other threads
            args, kwargs = tree_map_only(
                Tensor, lambda t: t if isinstance(t, FakeTensor) else fake.from_tensor(t), (args, kwargs)
            )
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.HigherOrderOperator):
            return out  # what its branches do stays unsaid
        operator = func._schema.name.partition("::")[2]
        if func.namespace == "resnet_triton":
            self.reason = ""
            operation = OPERATORS[operator].schema.build(args)
            _, (backend, reason) = operation.choose()
            self.calls.append(Call(name, operator, operation, out.device, backend, reason))
        elif func.namespace == "aten" and operator in _HEAVY:
            self.calls.append(Call(name, f"aten.{operator}", None, args[0].device, "torch", self.reason))
        return out


def _without_memory(call: Call) -> Call:
    """A call with meta tensors in place of real or fake ones."""
    if call.operation is None:
        return call
    return replace(call, operation=call.operation.schema.with_tensors(call.operation, _meta))


def _meta(_: str, t: Tensor) -> Tensor:
    with unset_fake_temporarily():  # of a fake tensor no launch can be made
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
