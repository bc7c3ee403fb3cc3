"""Where somebody may look at strides, values are laid out as the model would lay them out.

Our operators return channels_last tensors, the model's own may return others. Sums, products and convolutions do not
mind. Somebody who calls `view` does, and so do operators that a compiler has chosen for the strides that it saw.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Order = tuple[int, ...]

_INDIFFERENT = {
    "convolution", "cat", "mean", "sum", "amax", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm", "native_layer_norm",
    "constant_pad_nd", "upsample_nearest2d", "upsample_bilinear2d", "_to_copy", "clone", "mm", "addmm", "bmm",
    # views, whose users may mind
    "slice", "select", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "split", "split_with_sizes",
    "unbind", "alias", "detach",
}  # fmt: skip
"""Operators of PyTorch's, besides pointwise ones, that compute the same whatever the strides of their arguments.

Not `native_group_norm`: fakes of torch 2.14 have its result contiguous, where a CPU's is as its argument is."""
WRITTEN_FILTERS = "an input that the model writes is a part of its filters, expected a copy"


def as_they_were(moved: Iterable[Tensor], graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a graph of Dynamo's; for filters that were moved to channels_last memory, contiguous fakes.

    RuntimeError if the graph may hold strides that follow from where they are now.
    """
    ids = set(map(id, moved)) & set(map(id, inputs))
    if not ids:
        return list(inputs)
    if any("as_strided" in str(node.target) for node in graph.graph.nodes):
        raise RuntimeError("as_strided takes strides, and filters lie in memory in another order")
    fakes = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    known = zip(inputs, fakes, strict=True)
    return [_laid_out(fake, torch.contiguous_format) if id(x) in ids else x for x, fake in known]


def move(graph: fx.Graph, inputs: Sequence[Any], given: Sequence[Any]) -> None:
    """In a functional graph, traced with fakes `given` for some `inputs`, let those lie in channels_last memory.

    RuntimeError if it returns or changes one, or changes another input that is in their memory.
    """
    fakes, taken = [x is not fake for x, fake in zip(inputs, given, strict=True)], graph.find_nodes(op="placeholder")
    if not any(fakes):
        return
    if len(taken) != len(fakes):
        raise RuntimeError("inputs are taken apart, and filters lie in memory in another order")
    theirs = {memory(x) for x, is_fake in zip(inputs, fakes, strict=True) if is_fake}
    results = set(map(base_of, graph.output_node().all_input_nodes))
    for node, x, is_fake in zip(taken, inputs, fakes, strict=True):
        written = any(map(is_mutable, node.users))
        if is_fake and (written or node in results):
            raise RuntimeError("filters are returned or changed, and lie in memory in another order")
        if written and memory(x) in theirs:
            raise RuntimeError(WRITTEN_FILTERS)
        if is_fake:
            node.meta["val"] = _laid_out(node.meta["val"], torch.channels_last)


def memory(x: Any) -> int | None:
    plain = isinstance(x, Tensor) and x.layout == torch.strided and not is_traceable_wrapper_subclass(x)
    return x.untyped_storage()._cdata if plain else None


def _laid_out(fake: FakeTensor, memory_format: torch.memory_format) -> Tensor:
    with fake.fake_mode, torch.inference_mode(fake.is_inference()), torch.no_grad():
        return fake.contiguous(memory_format=memory_format)


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
    """Copy results that are laid out otherwise than the model's. Views of one tensor stay views of one."""
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

    def compare(a: int, b: int) -> int:  # as equal, where the data decides
        return guard_or_false(strides[a] < strides[b]) - guard_or_false(strides[a] > strides[b])

    dims = sorted(range(value.dim()), key=functools.cmp_to_key(compare))
    return tuple(sorted(dims, key=lambda d: guard_or_true(sizes[d] != 1)))


def _is_indifferent(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):  # an element of a tuple, arithmetic of sizes; or of graphs
        return not isinstance(target, torch._ops.HigherOrderOperator)
    if target.namespace == "resnet_triton" or torch.Tag.pointwise in target.tags:
        return True
    return target.namespace == "aten" and target._schema.name.removeprefix("aten::") in _INDIFFERENT


def is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None for a in schema.arguments)
