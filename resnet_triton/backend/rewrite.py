"""Find what our operators compute in a functional ATen graph, and put them there.

A convolution is fused with what follows it: batch norm with running statistics, as one node or as the multiplication
and addition of a frozen one; a layer scale; the sum with a residual or with a shortcut's convolution and batch norm; an
activation. Patterns are matched on what the graph computes, never on names. What is left runs as PyTorch's own
operators.

`_Rewriter.run` is the order of it: copies that nobody can tell are left out; each convolution begins a chain, which
grows by a norm, a scale, a sum and an activation, and then becomes one node; pools, sums and heads follow.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..graphs.cuda_graph import capturing, finish
from ..ops import NONE, RELU, Activation  # which registers torch.ops.resnet_triton
from ..ops.dispatch import DTYPES, Modes
from ..ops.stem import STEM_CONV, STEM_POOL
from .layouts import base_of

aten = torch.ops.aten
Node = fx.Node

# Where batch norms with running statistics have (weight, bias, running_mean, running_var), eps and "training".
_NORMS: dict[Any, tuple[tuple[int, int, int, int], int, int | None]] = {
    aten._native_batch_norm_legit_no_training.default: ((1, 2, 3, 4), 6, None),
    aten._batch_norm_no_update.default: ((1, 2, 3, 4), 6, None),
    aten.native_batch_norm.default: ((1, 2, 3, 4), 7, 5),
    aten.cudnn_batch_norm.default: ((1, 2, 3, 4), 7, 5),
}
# Operators that are an activation, with these arguments.
_ACTIVATIONS: dict[Any, tuple[tuple[int, ...], Activation]] = {
    aten.relu.default: ((), RELU),
    aten.hardtanh.default: ((0, 6), Activation("relu6")),
    aten.clamp.default: ((0, 6), Activation("relu6")),
    aten.hardswish.default: ((), Activation("hardswish")),
    aten.silu.default: ((), Activation("silu")),
    aten.gelu.default: ((), Activation("gelu")),
}
# Words in the names of operators that sum products, and may do so in another order for another batch.
_SUMS = {
    "convolution", "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "dot", "vdot", "linear",
    "trilinear", "attention", "transformer", "rnn", "lstm", "gru", "cdist",
}  # fmt: skip
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dims, aten.squeeze.dim)


class Norm(NamedTuple):
    """The arguments of batch norm, as nodes; the last is a number."""

    mean: Node
    var: Node
    weight: Node | None
    bias: Node | None
    eps: float


@dataclass
class Chain:
    """A convolution and what is fused with it so far. `tail` is the node whose value the chain computes."""

    conv: Node
    tail: Node
    norm: Callable[[], Norm]
    residual: Node | None = None
    shortcut: Chain | None = None
    activation: Activation = NONE

    @property
    def geometry(self) -> tuple[Any, ...]:
        return *map(_pair, _args(self.conv)[3:6]), _args(self.conv)[8]

    def is_shortcut(self) -> bool:
        """Whether it may be added inside another convolution."""
        _, padding, dilation, groups = self.geometry
        size = tuple(_shape(_args(self.conv)[1])[2:])
        alone = self.residual is None and self.shortcut is None and self.activation == NONE
        return alone and size == (1, 1) and padding == (0, 0) and dilation == (1, 1) and groups == 1


def rewrite(graph: fx.GraphModule, modes: Modes, parameters: Collection[Node]) -> None:
    """Replace, in place, what our operators compute. Convolutions that stay have the reason in `meta["reason"]`.

    `parameters` are those inputs of the graph that are parameters and buffers. NotImplementedError if the modes promise
    what PyTorch's operators, which would stay, do not keep.
    """
    _Rewriter(graph, modes, parameters).run()


class _Rewriter:
    def __init__(self, module: fx.GraphModule, modes: Modes, parameters: Collection[Node]) -> None:
        self.module, self.graph, self.modes, self.parameters = module, module.graph, modes, parameters
        self.sources: dict[Node, frozenset[Node]] = {}
        """For batch invariance: the tensors, but for parameters, from which each value follows."""
        self.constants: dict[tuple[Any, ...], Node] = {}
        self.replaced: dict[Node, Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if _strides_are_its_own(node) or _is_needless_copy(node):
                node.replace_all_uses_with(_args(node)[0])
                self.graph.erase_node(node)
        if self.modes.batch_invariant:
            self._trace_sources()
        nodes = list(self.graph.nodes)
        if any(map(_looks_past_a_view, nodes)):
            for node in nodes:  # what these read depends on where every value lies in memory
                node.meta["reason"] = "as_strided of a view in the same graph"
            self._refuse_what_varies()
            return
        chains = {chain.tail: chain for node in list(self.graph.nodes) if (chain := self._chain(node)) is not None}
        for node in list(self.graph.nodes):
            if node.target is aten.add.Tensor:
                self._add(node, chains)
        for chain in list(chains.values()):
            if (found := _activation(chain.tail)) is not None:
                chain.tail, chain.activation = found
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for chain in sorted(chains.values(), key=lambda chain: order[chain.tail]):
            self._place(chain)
        self.graph.eliminate_dead_code()
        for match in (self._head, self._pool, self._mean, self._add_relu):
            for node in list(self.graph.nodes):
                match(node)
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default  # our results are in channels_last, which a view may not take
        self._refuse_what_varies()
        self.graph.lint()
        self.module.recompile()

    # Batch invariance: what is fused for one image is so for many, and PyTorch's sums may be others for another batch

    def _trace_sources(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
                self.sources[node] = frozenset() if node in self.parameters else frozenset((node,))
            else:
                self.sources[node] = frozenset().union(*(self.sources[used] for used in node.all_input_nodes))

    def _is_constant(self, value: Node | None) -> bool:
        """Whether its sizes tell nothing of the batch: of a single image it could be a vector by chance."""
        return not self.modes.batch_invariant or value is None or not self.sources[value]

    def _may_be_summed(self, a: Node, b: Node) -> bool:
        """Whether both have as many images in any batch, if they have in this one."""
        return not self.modes.batch_invariant or self.sources[a] == self.sources[b]

    def _refuse_what_varies(self) -> None:
        if not self.modes.batch_invariant:
            return
        left = [node for node in self.graph.nodes if _sums_products(node, self.module) and self.sources[node]]
        if left:
            names = {node.target.name().rpartition("::")[2]: node.meta.get("reason") for node in left}
            said = ", ".join(f"{name} ({reason})" if reason else name for name, reason in sorted(names.items()))
            raise NotImplementedError(
                f"batch_invariant=True cannot be kept by what runs on PyTorch, {said}; leave it out"
            )

    # Convolutions

    def _chain(self, conv: Node) -> Chain | None:
        if conv.target is not aten.convolution.default:
            return None
        if (reason := _reason(conv)) is not None:
            conv.meta["reason"] = reason
            return None
        chain = Chain(conv, conv, lambda: self._identity(conv))
        for find in (self._batch_norm, self._frozen_norm):
            found = find(conv)
            if found is not None and _dtype(found[0]) == _dtype(conv):
                chain.tail, chain.norm = found
                break
        if (found := self._scaled(chain)) is not None:
            chain.tail, chain.norm = found
        return chain

    def _batch_norm(self, conv: Node) -> tuple[Node, Callable[[], Norm]] | None:
        norm = next(iter(conv.users)) if len(conv.users) == 1 else None
        if norm is None or norm.target not in _NORMS or _args(norm)[0] is not conv:
            return None
        places, eps, training = _NORMS[norm.target]
        if training is not None and _args(norm)[training]:
            return None
        result, (weight, bias, mean, var) = _only_result(norm), (_args(norm)[i] for i in places)
        if result is None or mean is None or var is None or _args(norm)[eps] < 0:
            return None
        return result, lambda: Norm(self._less_bias(mean, conv, norm), var, weight, bias, _args(norm)[eps])

    def _frozen_norm(self, conv: Node) -> tuple[Node, Callable[[], Norm]] | None:
        """`conv * scale + shift`, where both hold a number for each channel; of a layer scale, there is no shift."""
        scaled, channels = _only_user(conv, aten.mul.Tensor), _shape(conv)[1]
        scale = None if scaled is None else _other_operand(scaled, conv)
        if scaled is None or not _is_channelwise(scale, channels) or not self._is_constant(scale):
            return None
        summed = _only_user(scaled, aten.add.Tensor)
        shift = None if summed is None or summed.kwargs else _other_operand(summed, scaled)
        if summed is None or not _is_channelwise(shift, channels) or not self._is_constant(shift):
            summed, shift = scaled, None
        buffers = _frozen_buffers(scale, shift, channels)

        def norm() -> Norm:
            if buffers is not None:
                return buffers._replace(mean=self._less_bias(buffers.mean, conv, summed))
            mean, var = self._constant(0.0, channels, conv), self._constant(1.0, channels, conv)
            with self.graph.inserting_before(summed):
                weight, bias = (t and self._call(aten.reshape.default, t, [channels]) for t in (scale, shift))
            return Norm(self._less_bias(mean, conv, summed), var, weight, bias, 0.0)

        return summed, norm

    def _scaled(self, chain: Chain) -> tuple[Node, Callable[[], Norm]] | None:
        """The chain times a number, as residual branches are weighed, or one for each channel, as a layer scale: its
        norm's weight and bias are."""
        unscaled, scaled, channels = chain.norm, _only_user(chain.tail, aten.mul.Tensor), _shape(chain.conv)[1]
        if scaled is None or _dtype(scaled) != _dtype(chain.conv):
            return None
        number: Any = _args(scaled)[1]
        vector = _other_operand(scaled, chain.tail)
        weighs = type(number) in (int, float) and abs(number) <= torch.finfo(torch.float32).max
        if not weighs and not (_is_channelwise(vector, channels) and self._is_constant(vector)):
            return None

        def norm() -> Norm:
            mean, var, weight, bias, eps = unscaled()
            zero = self._constant(0.0, channels, chain.conv)  # in fp32, and so are the products
            if vector is None:
                factor = self._constant(float(number), channels, chain.conv)
            with self.graph.inserting_before(scaled):
                if vector is not None:
                    factor = self._call(aten.reshape.default, vector, [channels])
                weight, bias = (t and self._call(aten.addcmul.default, zero, t, factor) for t in (weight, bias))
            return Norm(mean, var, factor if weight is None else weight, bias, eps)

        return scaled, norm

    def _identity(self, conv: Node) -> Norm:
        """The norm of a convolution alone: its bias is the norm's."""
        channels = _shape(conv)[1]
        mean, var = self._constant(0.0, channels, conv), self._constant(1.0, channels, conv)
        return Norm(mean, var, None, _args(conv)[2], 0.0)

    def _less_bias(self, mean: Node, conv: Node, norm: Node) -> Node:
        """The running mean of what the convolution in front of `norm` computes without its bias."""
        bias = _args(conv)[2]
        if bias is None:
            return mean
        minus = self._constant(-1.0, _shape(conv)[1], conv)  # in fp32, and so is the sum
        with self.graph.inserting_before(norm):
            return self._call(aten.addcmul.default, mean, bias, minus)

    def _add(self, node: Node, chains: dict[Node, Chain]) -> None:
        """Let one of the convolutions whose sum this is compute the sum."""
        a, b = _args(node)
        if node.kwargs or not (isinstance(a, Node) and isinstance(b, Node)) or a is b:
            return
        if not _is_shape(a, _shape(b)) or not _dtype(a) == _dtype(b) == _dtype(node) or not self._may_be_summed(a, b):
            return
        mine = [t for t in (a, b) if t in chains and len(t.users) == 1 and not chains[t].residual]
        mine = [t for t in mine if chains[t].shortcut is None and chains[t].activation == NONE]
        if not mine:
            return
        tail = min(mine, key=lambda t: (chains[t].is_shortcut(), t is a))  # of two, not the one that may ride along
        chain, other = chains.pop(tail), b if tail is a else a
        if other in mine and chains[other].is_shortcut() and chain.geometry[-1] == 1:
            chain.shortcut = chains.pop(other)
        else:
            chain.residual = other
        chain.tail = node
        chains[node] = chain

    def _place(self, chain: Chain) -> None:
        tail, pool = chain.tail, _stem_pool(chain)
        x, weight = _args(chain.conv)[:2]
        with self.graph.inserting_before(tail):
            norm = chain.norm()
            if pool is not None:
                new = self._ours("stem", x, weight, *norm, None, None)
                tail = pool
            else:
                short: tuple[Any, ...] = (None,) * 8
                if chain.shortcut is not None:
                    their_x, their_weight = _args(chain.shortcut.conv)[:2]
                    short = their_x, their_weight, *chain.shortcut.norm(), chain.shortcut.geometry[0]
                behind = *norm, *chain.geometry, chain.residual, *short, *chain.activation
                new = self._ours("conv_bn_relu", x, weight, *behind)
        self._replace(tail, new)
        new.meta["nn_module_stack"] = chain.conv.meta.get("nn_module_stack")

    # Pools, sums and the head

    def _head(self, node: Node) -> None:
        """`linear(mean of all pixels)`, or a linear layer."""
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = _args(node)
        elif node.target is aten.mm.default:
            (x, weight), bias = _args(node), None
        else:
            return
        filters = _transposed(weight)
        if filters is None or _dtype(x) not in DTYPES or (bias is not None and _shape(bias) != _shape(filters)[:1]):
            return
        pooled = _flattened(x)
        with self.graph.inserting_before(node):
            if pooled is not None:
                new = self._ours("avg_pool_linear", pooled, filters, bias)
            else:
                new = self._ours("linear", x, filters, bias)
        self._replace(node, new)

    def _pool(self, node: Node) -> None:
        if node.target is not aten.max_pool2d_with_indices.default or len(_shape(_args(node)[0])) != 4:
            return
        if _dtype(_args(node)[0]) not in DTYPES:
            return
        result = _only_result(node)
        if result is None or node.kwargs:
            return
        window, dilation, ceil_mode = _window(node), (*_args(node)[4:], [1])[0], any(_args(node)[5:])
        if _pair(dilation) != (1, 1) or any(2 * pad > size for size, pad in zip(window[0], window[2], strict=True)):
            return
        with self.graph.inserting_before(node):
            new = self._ours("max_pool2d", _args(node)[0], *window, ceil_mode)
        self._replace(result, new)

    def _mean(self, node: Node) -> None:
        if not _is_global_mean(node) or not _args(node)[2:]:
            return
        with self.graph.inserting_before(node):
            new = self._ours("global_avg_pool", _args(node)[0])
        self._replace(node, new)

    def _add_relu(self, node: Node) -> None:
        added = _args(node)[0] if node.target is aten.relu.default else None
        if not isinstance(added, Node) or added.target is not aten.add.Tensor or added.kwargs or len(added.users) != 1:
            return
        a, b = _args(added)
        if not (isinstance(a, Node) and isinstance(b, Node)) or len(_shape(a)) != 4 or not _is_shape(a, _shape(b)):
            return
        if _dtype(a) != _dtype(b) or _dtype(a) not in DTYPES or not self._may_be_summed(a, b):
            return
        with self.graph.inserting_before(node):
            new = self._ours("add_relu", a, b)
        self._replace(node, new)

    # Nodes

    def _ours(self, name: str, *values: Any) -> Node:
        return self._call(getattr(torch.ops.resnet_triton, name).default, *values, *self.modes)

    def _call(self, target: Any, *values: Any, **named: Any) -> Node:
        """A node; what was replaced since its arguments were found is so in them, too."""
        return self.graph.call_function(target, tuple(map(self._current, values)), named)

    def _current(self, value: Any) -> Any:
        while isinstance(value, Node) and value in self.replaced:
            value = self.replaced[value]
        return value

    def _replace(self, old: Node, new: Node) -> None:
        new.meta.update(old.meta)
        self.replaced[old] = new
        self.sources[new] = self.sources.get(old, frozenset())
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _constant(self, value: float, channels: int, like: Node) -> Node:
        """`channels` equal numbers in fp32, made once; at each call, if somebody captures now, who would have them
        made when the graph is replayed."""
        where = like.meta["val"].device
        key = (value, channels, where)
        if key not in self.constants:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                if capturing(like.meta["val"]):
                    made = self._call(aten.full.default, [channels], value, dtype=torch.float32, device=where)
                else:
                    made = self.graph.get_attr(self._buffer(channels, value, where))
            self.constants[key] = made
        return self.constants[key]

    def _buffer(self, channels: int, value: float, where: torch.device) -> str:
        """The name of a new buffer."""
        name = f"_constant_{len(self.constants)}"
        with torch.inference_mode(False), torch._subclasses.fake_tensor.unset_fake_temporarily():
            made = torch.full((channels,), value, dtype=torch.float32, device=where)
            finish(made)  # calls may come on other streams
            self.module.register_buffer(name, made)
        return name


def _sums_products(node: Node, module: torch.nn.Module) -> bool:
    """Whether this, of PyTorch, sums products, or a branch that it may take does, which is a part of `module`."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        parts = [getattr(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        branches = [part for part in parts if isinstance(part, fx.GraphModule)]
        return any(_sums_products(inner, branch) for branch in branches for inner in branch.graph.nodes)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "resnet_triton":
        return False
    return not _SUMS.isdisjoint(target._schema.name.partition("::")[2].split("_"))


def _strides_are_its_own(node: Node) -> bool:
    """Whether this is `as_strided` and changes nothing but the strides of dimensions of size one.

    An average pool in channels_last ends so.
    """
    if node.target is not aten.as_strided.default or node.kwargs:
        return False
    x: Any = _args(node)[0]
    if _args(node)[3:] not in ((), (None,), (x.meta["val"].storage_offset(),)):
        return False
    size, stride = ([v.meta["val"] if isinstance(v, Node) else v for v in values] for values in _args(node)[1:3])
    same = zip(size, stride, x.meta["val"].stride(), strict=False)
    return tuple(size) == _shape(x) and all(n == 1 or a == b for n, a, b in same)


def _is_needless_copy(node: Node) -> bool:
    """Whether this is a copy that nobody can tell from what it copies.

    Blocks whose scale is an option multiply or divide by one. A caller could tell, by an input that changes later, by
    two results that share memory, or by one that keeps more alive than itself; `as_strided`, by where they start;
    whoever looks at pairs of numbers, by a conjugation that is put off.
    """
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs or _args(node)[1] != 1:
        return False
    x: Any = _args(node)[0]
    if _dtype(node) != _dtype(x):
        return False
    base, results = base_of(x), set(map(base_of, node.graph.output_node().all_input_nodes))
    seen = base.op != "call_function" or (node in results and (base in results or base is not x))
    before, after = x.meta["val"], node.meta["val"]
    same = (before.stride(), before.storage_offset()) == (after.stride(), after.storage_offset())
    return same and not (seen or before.is_complex() or before.is_neg())


def _looks_past_a_view(node: Node) -> bool:
    """Whether this is `as_strided`, and may read what its argument is a view of: not an input, which nobody moves."""
    if not isinstance(node.target, torch._ops.OpOverload) or "as_strided" not in node.target._schema.name:
        return False
    x = _args(node)[0]
    base = base_of(x)
    return base.op != "placeholder" and base is not x


def _reason(conv: Node) -> str | None:
    """Why our operators cannot compute a convolution."""
    x, weight, *_, transposed, _, _ = _args(conv)
    if len(_shape(conv)) != 4:
        return f"{len(_shape(conv)) - 2}-D convolution"
    if transposed:
        return "transposed convolution"
    if not isinstance(_shape(conv)[1], int):
        return "a number of filters that may change"
    if _has_zero(_shape(weight)):
        return "filters without elements"
    if not _dtype(x) == _dtype(weight) == _dtype(conv):
        return "mixed dtypes"
    return None if _dtype(x) in DTYPES else f"dtype {_dtype(x)}"


def _activation(node: Node) -> tuple[Node, Activation] | None:
    """The activation of this node, if nothing else uses it: the last node of it, and which one."""
    users = list(node.users)
    if [user.target for user in users] == [aten.sigmoid.default, aten.mul.Tensor]:
        sigmoid, product = users
        swish = set(_args(product)) == {node, sigmoid} and len(sigmoid.users) == 1
        return (product, Activation("silu")) if swish else None
    if len(users) != 1 or users[0].kwargs:
        return None
    (user,) = users
    numbers = _args(user)[1:]
    if user.target is aten.leaky_relu.default and all(isinstance(x, float) for x in numbers):
        return user, Activation("leaky_relu", *numbers)
    expected, activation = _ACTIVATIONS.get(user.target, (None, NONE))
    return (user, activation) if numbers == expected else None


def _stem_pool(chain: Chain) -> Node | None:
    """The max pool of a ResNet's stem behind a convolution, if the chain is that stem's."""
    if chain.activation != RELU or chain.geometry != tuple(STEM_CONV):
        return None
    if chain.residual is not None or chain.shortcut is not None:
        return None
    if tuple(_shape(_args(chain.conv)[1])[2:]) != (7, 7):
        return None
    pool = _only_user(chain.tail, aten.max_pool2d_with_indices.default)
    if pool is None or len(_args(pool)) > 4 or pool.kwargs or _window(pool) != STEM_POOL:
        return None
    return _only_result(pool)


def _window(pool: Node) -> tuple[tuple[int, int], ...]:
    """Size, stride and padding. Without a stride, that is the size."""
    given: list[Any] = [*_args(pool)[1:4]]
    size, stride, padding = given + [(), (0,)][len(given) - 1 :]
    return _pair(size), _pair(stride or size), _pair(padding)


def _pair(values: Any) -> tuple[int, int]:
    first, second = values if len(values) == 2 else values * 2
    return first, second


def _args(node: Any) -> Any:
    """A node's arguments, whose types nobody checks."""
    return node.args


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_shape(node: Any, expected: tuple[Any, ...]) -> bool:
    """Whether a node is known to have this shape, which may depend on data."""
    shape = _shape(node)
    return len(shape) == len(expected) and all(guard_or_false(m == n) for m, n in zip(shape, expected, strict=True))


def _has_zero(sizes: tuple[Any, ...]) -> bool:
    return any(guard_or_false(n == 0) for n in sizes)


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _only_result(node: Node) -> Node | None:
    """The first of an operator's results, if no other one is used."""
    used = [user for user in node.users if user.users]
    return used[0] if len(used) == 1 and used[0].target is operator.getitem and _args(used[0])[1] == 0 else None


def _only_user(node: Node, target: Any) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _other_operand(node: Node, one: Node | None) -> Node | None:
    others = [v for v in _args(node) if v is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _is_channelwise(node: Node | None, channels: Any) -> bool:
    dtype = _dtype(node)
    vectors = (1, channels, 1, 1), (channels, 1, 1)
    return dtype is not None and dtype.is_floating_point and any(_is_shape(node, vector) for vector in vectors)


def _frozen_buffers(scale: Any, shift: Any, channels: Any) -> Norm | None:
    """The four buffers of a FrozenBatchNorm2d: scale = weight / sqrt(var + eps), shift = bias - mean * scale."""
    if shift is None or scale.target is not aten.mul.Tensor or shift.target is not aten.sub.Tensor or shift.kwargs:
        return None
    for weight, root in (_args(scale), _args(scale)[::-1]):
        summed = _args(root)[0] if isinstance(root, Node) and root.target is aten.rsqrt.default else None
        if summed is None or summed.target is not aten.add.Tensor or summed.kwargs:
            continue
        if not isinstance(_args(summed)[1], float):
            continue
        if _args(summed)[1] < 0:
            continue
        bias, product = _args(shift)
        if not isinstance(product, Node) or product.target is not aten.mul.Tensor or scale not in _args(product):
            continue
        vectors: list[Any] = [_vector(t) for t in (_other_operand(product, scale), _args(summed)[0], weight, bias)]
        floating = all(dtype is not None and dtype.is_floating_point for dtype in map(_dtype, vectors))
        if floating and all(_shape(vector) == (channels,) for vector in vectors):
            return Norm(vectors[0], vectors[1], vectors[2], vectors[3], _args(summed)[1])
    return None


def _vector(node: Any) -> Node | None:
    """The vector of which this is a view with more dimensions."""
    while isinstance(node, Node) and node.target in _RESHAPES:
        node = _args(node)[0]
    return node if len(_shape(node)) == 1 else None


def _transposed(node: Any) -> Node | None:
    """The (K, C) matrix of which this is the transpose."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.t.default or (node.target is aten.permute.default and list(_args(node)[1]) == [1, 0]):
        return _args(node)[0]
    return None


def _is_global_mean(node: Any) -> bool:
    if not isinstance(node, Node) or node.target is not aten.mean.dim or node.kwargs:
        return False
    x, dims = _args(node)[:2]
    if _dtype(x) not in DTYPES or len(_shape(x)) != 4 or _has_zero(_shape(x)[1:]):
        return False
    return dims is not None and sorted(d % 4 for d in dims) == [2, 3]


def _flattened(node: Any) -> Node | None:
    """x, where this is its global mean as a matrix (N, C)."""
    given = node
    while isinstance(node, Node) and node.target in _RESHAPES and len(node.users) == 1:
        node = _args(node)[0]
    return _args(node)[0] if _is_global_mean(node) and _is_shape(given, _shape(_args(node)[0])[:2]) else None
