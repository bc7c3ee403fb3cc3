"""What torch.compile calls with a graph of a model, and what it gets back.

AOTAutograd makes the graph functional: no operator in it writes its inputs or returns a view that somebody writes
later. In that form it is rewritten (`rewrite.py`). Parameters and buffers stay inputs, so an edit of a weight shows at
the next call. Where gradients are wanted, for which our operators have no formula, and on a CPU, for which there are no
kernels, the graph runs as it is.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..graphs.function import GraphedFunction
from ..graphs.replay import CudaGraph, check_cuda_graph
from ..ops import dispatch, interpreter
from ..ops.dispatch import Modes
from ..ops.trace import Call, compile_calls, propagate, trace_graph
from ..support.processes import cores
from . import layouts, overlap
from .inductor import compile_rest
from .rewrite import rewrite

Function = Callable[..., Any]
_MODES: dict[str | None, CudaGraph] = {
    None: "auto", "default": "auto", "reduce-overhead": True, "max-autotune": True, "max-autotune-no-cudagraphs": False,
}  # fmt: skip
_CHANGING = {
    torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output,
    torch.Tag.cudagraph_unsafe,
}  # fmt: skip
_OVERLAP = "an input that the model writes may overlap another one; plain copies of both do not"
_OURS = ("resnet_triton.conv_bn_relu.default", "resnet_triton.stem.default")


def resnet_triton(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Function:
    """Compile a graph of Dynamo's: convolutions and what follows them on our kernels, the rest on PyTorch's.

    `options` may hold `kernels` ("auto", "torch" or "triton"), `batch_invariant` (bool) and `cuda_graph` ("auto", True
    or False), which mean what they mean for `optimize`, and `rest`: "eager" runs the rest operator by operator,
    "inductor" has torch.compile's own backend compile it. `mode` is torch.compile's: "reduce-overhead" and
    "max-autotune" stand for `cuda_graph=True`, "max-autotune-no-cudagraphs" for False. Raises ValueError for others.
    """
    return compile_graph(graph, inputs, mode=mode, options=options)


def compile_graph(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    record: list[Call] | None = None,
    names: Mapping[int, str] | None = None,
    functions: list[weakref.ref[GraphedFunction]] | None = None,
    moved: Callable[[], Iterable[Tensor]] = tuple,
) -> Function:
    """`resnet_triton`, for `optimize` and `report`.

    `record` takes the calls that the graph makes, each time that it runs, `names` are of modules, by the ids of their
    parameters, and `functions` takes what CUDA graphs repeat. `moved` returns the filters that `optimize` has moved to
    channels_last memory: values lie as if it had not. RuntimeError where that cannot be.
    """
    modes, cuda_graph, rest = settings(mode, options)
    if record is None and (modes.batch_invariant or modes.kernels == "triton"):
        _refuse_last_compilation()
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        _warn_as_written(
            f"grad mode is on, and gradients are PyTorch's; {dispatch.REMEDIES[dispatch.GRADIENT]}", modes, inputs
        )
        return graph.forward
    given = layouts.as_they_were(moved(), graph, inputs)
    if record is None and rest == "eager" and _is_pytorchs(modes, inputs, given):
        return graph.forward
    if any(isinstance(x, Tensor) and x.is_inference() for x in inputs) and not _takes_gradients(graph):
        for node in graph.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
            node.args = (False,)  # of these inputs nothing is saved for a gradient
        graph.recompile()
    _leave_out_dropout(graph)
    whole: list[GraphedFunction] = []
    written: set[int] = set()

    def compile_inference(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Function:
        written.update(overlap.written())
        layouts.note(gm.graph)
        layouts.move(gm.graph, inputs, given)
        rewrite(gm, modes, _parameters(gm.graph))
        if record is None:
            _warn_of_coverage(gm.graph)
        calls = []
        if record is None and _sizes_may_change(gm.graph):  # kernels are compiled when sizes are known
            propagate(gm, layouts.restore_arguments)
        else:
            calls = trace_graph(gm, {node: node.name for node in gm.graph.nodes}, layouts.restore_arguments)
        if record is None:
            _warn_of_copies(gm.graph, modes)
            compile_calls(calls, cores())
        layouts.restore_results(gm.graph)
        gm.recompile()
        if record is not None:
            forward = _recorded(gm, calls, record, names or {})
        else:
            forward = compile_rest(gm) if rest == "inductor" else gm.forward
        graphed = _graphed(gm.graph, forward, cuda_graph)
        if functions is not None and graphed is not None:
            functions.append(weakref.ref(graphed))  # Dynamo keeps a backend for good
        if graphed is not None and _is_whole(gm.graph, graph.graph, inputs):
            whole.append(graphed)
        return _boxed(graphed or forward)

    examples = overlap.apart(graph, given)
    compiled: Function = aot_module_simplified(
        graph, examples, fw_compiler=compile_inference, keep_inference_input_mutations=True
    )
    if whole:  # AOTAutograd's way switches autocast off, of which the graph has what there is to cast
        autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
        return lambda *values: compiled(*values) if autocast() else whole[0](values)
    if not written:
        return compiled
    filters = [i for i, (x, fake) in enumerate(zip(inputs, given, strict=True)) if x is not fake]
    return _unless_overlapping(compiled, graph.forward, inputs, written, filters, modes)


def _is_pytorchs(modes: Modes, inputs: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether all of a graph would run on PyTorch, so that ours would only come between: on a CPU.

    Not where kernels are interpreted, for then a test wants to see what a GPU would run; nor on filters that lie
    otherwise than they are `given`.
    """
    if modes != dispatch.AUTO or interpreter.active() or any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        return False
    return all(x is fake for x, fake in zip(inputs, given, strict=True))


def _takes_gradients(graph: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's computes gradients itself, by `torch.func.grad` and the like."""
    return bool(graph.graph.find_nodes(op="call_function", target=torch._C._functorch._grad_increment_nesting))


def _leave_out_dropout(graph: fx.GraphModule) -> None:
    """Where nothing is dropped, dropout returns its input, but AOTAutograd copies that: what is written to one of them
    would not show in the other."""
    for function in (F.dropout, torch.dropout):
        for node in graph.graph.find_nodes(op="call_function", target=function):
            given = {"training": True, **dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
            if given.get("p") == 0 or not given.get("train", given["training"]):
                node.replace_all_uses_with(given["input"])
                graph.graph.erase_node(node)
    graph.recompile()


def _unless_overlapping(
    compiled: Function, forward: Function, inputs: Sequence[Any], written: Set[int], filters: list[int], modes: Modes
) -> Function:
    """`compiled` for calls in which no input that is `written` overlaps another one; else `forward`, on `filters` as
    they were before they were moved."""

    def as_written(*values: Any) -> Any:
        _warn_as_written(_OVERLAP, modes, values)
        changed = [values[i] for i in written]
        if any(overlap.overlap([values[i], *changed], {0}) for i in filters):
            raise RuntimeError(layouts.WRITTEN_FILTERS)
        return forward(*(x.contiguous() if i in filters else x for i, x in enumerate(values)))

    def run(*values: Any) -> Any:
        return (as_written if overlap.overlap(values, written) else compiled)(*values)

    hidden = any(map(is_traceable_wrapper_subclass, inputs))  # what overlaps are tensors in them
    return as_written if hidden else run


def _is_whole(functional: fx.Graph, written: fx.Graph, inputs: Sequence[Any]) -> bool:
    """Whether what a CUDA graph may repeat is all that a call does: AOTAutograd's way there costs as much as a check.

    It would switch gradients off, unpack tensors of subclasses, and translate what it has added to inputs and results.
    """
    ends = [(g.find_nodes(op="placeholder"), g.output_node().args[0]) for g in (functional, written)]
    sizes = [(len(arguments), len(results)) for arguments, results in ends]  # type: ignore[arg-type]
    return sizes[0] == sizes[1] and not (torch.is_grad_enabled() or any(map(is_traceable_wrapper_subclass, inputs)))


def _recorded(gm: fx.GraphModule, calls: list[Call], record: list[Call], names: Mapping[int, str]) -> Function:
    """What computes a graph, which is one for every module of a class where it ends within that. The name of each of
    its calls is so far that of a node."""
    nodes = {node.name: node for node in gm.graph.nodes}
    inputs = gm.graph.find_nodes(op="placeholder")

    def run(*values: Any) -> Any:
        owners = {node: names.get(id(value)) for node, value in zip(inputs, values, strict=True)}
        record.extend(replace(call, name=_name(nodes[call.name], owners)) for call in calls)
        return gm.forward(*values)

    return run


def _boxed(function: Function) -> Function:
    """`function` of a list, which it empties: so the memory of a caller's tensors can be used again."""

    def run(values: list[Any]) -> Any:
        result = function(values) if isinstance(function, GraphedFunction) else function(*values)
        values.clear()
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _graphed(graph: fx.Graph, forward: Function, cuda_graph: CudaGraph) -> GraphedFunction | None:
    """What computes a graph as a function that CUDA graphs may repeat, if they may."""
    if cuda_graph is False:
        return None
    inputs, parameters = graph.find_nodes(op="placeholder"), _parameters(graph)
    fixed = {i for i, node in enumerate(inputs) if node in parameters}
    tensors = {i for i, node in enumerate(inputs) if isinstance(node.meta["val"], Tensor)}
    reason = _ungraphed_reason(graph)
    if reason is None and not tensors - fixed:
        reason = "no input is a tensor"
    if reason is not None:
        if cuda_graph is True:
            warnings.warn(f"cuda_graph=True, but calls run without a graph: {reason}", RuntimeWarning, stacklevel=2)
        return None
    given = {inputs[i].meta["val"].dtype for i in tensors - fixed}
    computed = {node.meta["val"].dtype for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    widens = torch.float32 in computed - given
    return GraphedFunction(forward, tensors - fixed, tensors & fixed, cuda_graph, widens)


def _sizes_may_change(graph: fx.Graph) -> bool:
    """Whether it is compiled for sizes that are not numbers yet."""
    values = tree_leaves([node.meta.get("val") for node in graph.nodes])
    return any(isinstance(n, torch.SymInt) for v in values for n in (v.shape if isinstance(v, Tensor) else (v,)))


def _parameters(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of a functional graph that are parameters and buffers of its modules."""
    metadata = TracingContext.get().fw_metadata
    inputs = graph.find_nodes(op="placeholder")
    return set() if metadata is None else {inputs[i] for i in metadata.static_input_indices}


def _ungraphed_reason(graph: fx.Graph) -> str | None:
    """Why a CUDA graph cannot repeat this for other inputs; None if it can. Numbers follow from the inputs' sizes."""
    output: Any = graph.output_node().args[0]
    results = [node for node in output if isinstance(node, fx.Node) and isinstance(node.meta["val"], Tensor)]
    bases = set(map(layouts.base_of, results))
    if len(bases) < len(results) or any(node.op == "placeholder" for node in bases):
        return "results share memory with each other or with inputs"
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    if len({value.device for value in values}) > 1:
        return "tensors are on several devices"
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.target} may take another branch each time"
        if isinstance(node.target, torch._ops.OpOverload):
            if "as_strided" in node.target._schema.name and layouts.base_of(node).op == "placeholder":
                return "as_strided may read past an input"  # of which a graph has a copy
            if layouts.is_mutable(node):
                return f"{node.target} changes an input"
            if not _CHANGING.isdisjoint(node.target.tags):
                return f"{node.target} does not compute the same each time, or may not be in a graph"
    return None


def settings(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Modes, CudaGraph, str]:
    """What `mode` and `options` of torch.compile ask for; ValueError if that is unknown."""
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r}, expected one of {', '.join(repr(m) for m in _MODES if m)}")
    known = {"kernels": "auto", "batch_invariant": False, "cuda_graph": _MODES[mode], "rest": "eager"}
    asked = {**known, **(options or {})}
    if unknown := asked.keys() - known.keys():
        raise ValueError(f"options has {', '.join(map(repr, sorted(unknown)))}, expected {', '.join(known)}")
    dispatch.check_kernels(asked["kernels"])
    check_cuda_graph(asked["cuda_graph"])
    if not isinstance(asked["batch_invariant"], bool):
        raise ValueError(f"options has batch_invariant={asked['batch_invariant']!r}, expected True or False")
    if asked["rest"] not in ("eager", "inductor"):
        raise ValueError(f"options has rest={asked['rest']!r}, expected 'eager' or 'inductor'")
    return Modes(asked["batch_invariant"], asked["kernels"]), asked["cuda_graph"], asked["rest"]


def _name(node: fx.Node, owners: Mapping[fx.Node, str | None]) -> str:
    """The module that a node belongs to: the innermost one called, or one in it that only lends its parameters."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    called = re.sub(r"^L\['\w+'\]\.?", "", stack[-1][0]) if stack else ""
    owner = next(filter(None, map(owners.get, node.all_input_nodes)), "")
    return owner if not called or f".{called}." in f".{owner}." else called


def _refuse_last_compilation() -> None:
    """RuntimeError the last time that torch.compile compiles a function: what follows would run as written, unseen."""
    limit = torch._dynamo.config.recompile_limit
    compiled = _debug_get_cache_entry_list(InstructionTranslator.current_tx().f_code)
    if len(compiled) >= limit - 1:
        raise RuntimeError(
            f"torch.compile compiles a function at most {limit} times and then runs it without our kernels, which "
            'batch_invariant=True and kernels="triton" rule out, so the last time is refused; raise '
            "torch._dynamo.config.recompile_limit"
        )


def _warn_as_written(reason: str, modes: Modes, inputs: Sequence[Any]) -> None:
    """Warn of a graph that runs as it is, or raise if that was not to be."""
    dispatch.raise_if_required(modes.kernels, reason)
    if modes.batch_invariant:
        raise NotImplementedError(f"batch_invariant=True cannot be kept where {reason}")
    if any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        warnings.warn(f"a compiled model runs without our kernels: {reason}", RuntimeWarning, stacklevel=2)


def _warn_of_coverage(graph: fx.Graph) -> None:
    """Once for a graph on a GPU most of whose convolutions our operators do not take."""
    ours = sum(str(node.target) in _OURS for node in graph.nodes)
    left = [n for n in graph.nodes if n.target is torch.ops.aten.convolution.default and n.meta["val"].is_cuda]
    dispatch.warn_of_coverage([node.meta.get("reason", "") for node in left], len(left) + ours)


def _warn_of_copies(graph: fx.Graph, modes: Modes) -> None:
    filters = [node.args[1].meta["val"] for node in graph.nodes if str(node.target) in _OURS]
    there = [w.is_contiguous(memory_format=torch.channels_last) for w in filters if dispatch.meant(modes.kernels, w)]
    if not all(there):
        warnings.warn(
            f"each call copies {there.count(False)} filters, which are not in channels_last memory; "
            "model.to(memory_format=torch.channels_last) spares that",
            RuntimeWarning,
            stacklevel=2,
        )
