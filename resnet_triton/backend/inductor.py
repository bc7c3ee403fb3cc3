"""What is not ours in a graph, compiled by Inductor, to which our operators are calls that it leaves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._guards import detect_fake_mode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx


def compile_rest(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that computes what a rewritten graph does, from the same inputs; the graph's own if Inductor fails."""
    from torch._inductor import config  # not above: importing Inductor takes seconds
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    mode: Any = detect_fake_mode(inputs)
    constants = dict(gm.named_buffers())
    fakes = [*inputs, *map(mode.from_tensor, constants.values())]

    def run(*values: Any) -> Any:
        return functional_call(gm, dict(zip(constants, values[len(inputs) :], strict=True)), values[: len(inputs)])

    # PyTorch's random numbers: a pass that is not run here puts Inductor's. No CUDA graphs of its own: ours are around.
    with config.patch({"fallback_random": True, "triton.cudagraphs": False}):
        with mode:  # Inductor wants simpler operators than those that our patterns are made of
            simple = make_fx(run, decomposition_table=select_decomp_table())(*fakes)
        output: Any = simple.graph.output_node()
        results = enumerate(output.args[0])
        output.meta["user_visible_output_idxs"] = [i for i, node in results if isinstance(node, fx.Node)]
        try:
            compiled: Any = compile_fx_inner(simple, fakes, is_inference=True)
        except Exception as error:  # of whatever kind: it is a compiler
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            warnings.warn(f'rest="inductor" runs operator by operator here: {said}', RuntimeWarning, stacklevel=2)
            return gm.forward
    return lambda *values: compiled([*values, *constants.values()])
