"""Where somebody may look at strides, values are laid out as the model would lay them out.

Our operators return channels_last tensors, the model's own may return others. Sums, products and convolutions do not
mind. Somebody who calls `view` does, and so do operators that a compiler has chosen for the strides that it saw.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import grad_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Order = tuple[int, ...]

_INDIFFERENT = {
    "convolution", "cat", "mean", "sum", "amax", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_group_norm", "native_layer_norm",
    "constant_pad_nd", "upsample_nearest2d", "upsample_bilinear2d", "_to_copy", "clone", "mm", "addmm", "bmm",
    "native_batch_norm",
    # views, whose users may mind
    "slice", "select", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "split", "split_with_sizes",
    "unbind", "alias", "detach",
}  # fmt: skip
"""Operators of PyTorch's, besides pointwise ones, that compute the same whatever the strides of their arguments."""
_INFERENCE = (grad_mode._enter_inference_mode, grad_mode._exit_inference_mode)


def show(moved: Iterable[Tensor], graph: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a graph of Dynamo's shows that the `moved` filters are not contiguous, as they were: by the strides of a
    result, by values that share memory or do not when one of them is written, or by what reads or draws in the order of
    memory."""
    ids = set(map(id, moved))
    if ids.isdisjoint(map(id, inputs)):
        return False
    fakes = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
    with mode, enable_python_dispatcher(), torch.inference_mode(False), torch.no_grad():
        before = [fake.contiguous() if id(x) in ids else fake for x, fake in zip(inputs, fakes, strict=True)]
        then, now = _Seen(graph).of(before), _Seen(graph).of(fakes)
    shared = zip(then.shared, now.shared, strict=True)
    return then.orders != now.orders or any(a != b and (wrote or writes) for (a, wrote), (b, writes) in shared)


class _Seen(fx.Interpreter):
    """What a graph's run on fake tensors shows of their layout."""

    def of(self, values: Sequence[Any]) -> _Seen:
        self.orders: list[Order] = []
        """Of what is read or drawn in the order of memory, and of results."""
        made: list[tuple[bool, Tensor, int]] = []
        self._made = made
        with _Draws(self.orders):
            results = self.run(*(v.clone() if isinstance(v, Tensor) else v for v in values))  # in case it is written
        self.orders += [_order(value) for value in results if isinstance(value, Tensor)]
        self.shared = [(shared, value._version != version) for shared, value, version in made]
        """For each value, whether it shares memory with what it was made of, and whether that is written afterwards."""
        return self

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _INFERENCE:  # whose tensors have no versions
            return None
        known = n.meta.get("example_value")
        if n.op != "placeholder" and isinstance(known, torch.SymInt | torch.SymFloat | torch.SymBool):
            return known  # of a tensor that was made of a number, which others do not have
        taken = [self.env[node] for node in n.all_input_nodes]
        if n.target in ("as_strided", torch.as_strided):
            self.orders.append(_order(taken[0]))
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op.startswith("call"):
            place = value.untyped_storage()._cdata
            shared = any(isinstance(t, Tensor) and t.untyped_storage()._cdata == place for t in taken)
            self._made.append((shared, value, value._version))
        return value


class _Draws(TorchDispatchMode):
    """Note how values lie that random numbers are drawn for."""

    def __init__(self, orders: list[Order]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._orders = orders

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._orders += [_order(value) for value in tree_leaves(result) if isinstance(value, Tensor)]
        return result


def note(graph: fx.Graph) -> None:
    """Remember, before operators are replaced, how the model lays out each value."""
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta["order"] = _order(value)


def restore_arguments(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    """Copy what an operator that may look at strides takes, where it is laid out otherwise than the model's."""
    if node.op != "call_function" or _is_indifferent(node.target):
        return
    for argument in node.all_input_nodes:
        value: Any = values.get(argument)
        if (order := _lost_order(argument, value)) is not None:
            with node.graph.inserting_before(node):
                again = node.graph.call_function(in_order, (argument, order))
            values[again] = again.meta["val"] = in_order(value, order)
            node.replace_input_with(argument, again)


def restore_results(graph: fx.Graph) -> None:
    """The same of results. Those that are views of one tensor stay views of one."""
    for base in set(map(base_of, graph.output_node().all_input_nodes)):
        value: Any = base.meta.get("val")
        if (order := _lost_order(base, value)) is not None:
            with graph.inserting_after(base):
                again = graph.call_function(in_order, (base, order))
            again.meta["val"] = in_order(value, order)
            for user in list(base.users):
                if user.target is in_order and user is not again:
                    user.replace_all_uses_with(again)
                elif user.op == "output" or is_view(user):
                    user.replace_input_with(base, again)


def in_order(x: Tensor, order: Order) -> Tensor:
    """x, dense, with strides that fall in this order of its dimensions."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def base_of(node: fx.Node) -> fx.Node:
    """What this is a view of, at last."""
    while True:
        first = next(iter(node.all_input_nodes), None)
        if first is not None and (
            node.target in (in_order, torch.ops.aten._unsafe_view.default)
            or is_view(node)
            or (node.target is operator.getitem and is_view(first))
        ):
            node = first
        else:
            return node


def _lost_order(node: fx.Node, value: Any) -> Order | None:
    """The order of strides that the model gives a value, if it has another one now."""
    wanted = node.meta.get("order")
    return wanted if isinstance(value, Tensor) and wanted is not None and wanted != _order(value) else None


def _order(value: Tensor) -> Order:
    """Dimensions from the largest stride to the smallest; those of size one, whose strides say nothing, before all."""
    sizes, strides = value.shape, value.stride()
    return tuple(sorted(range(value.dim()), key=lambda d: (bool(sizes[d] != 1), -strides[d])))


def _is_indifferent(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # an element of a tuple, arithmetic of sizes
    if target.namespace == "resnet_triton" or torch.Tag.pointwise in target.tags:
        return True
    return target.namespace == "aten" and target._schema.name.removeprefix("aten::") in _INDIFFERENT


def is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None for a in schema.arguments)
