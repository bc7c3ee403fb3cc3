"""Inputs that overlap, in a graph that writes some of them.

AOTAutograd makes such a graph functional for the inputs that it is given, and torch.compile does not ask whether those
of a later call overlap in the same way (pytorch#139789).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from . import layouts


def apart(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The inputs of a graph of Dynamo's; for those in the memory of another one, fakes in memory of their own."""
    found, seen = list(inputs), set()
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        memory = layouts.memory(inputs[i])
        if memory in seen:
            fake = node.meta["example_value"]
            with fake.fake_mode, torch.inference_mode(fake.is_inference()), torch.no_grad():
                found[i] = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
        elif memory is not None:
            seen.add(memory)
    return found


def written() -> set[int]:
    """Which inputs the graph that is being compiled writes, by their numbers."""
    metadata = TracingContext.get().fw_metadata
    infos = [] if metadata is None else metadata.input_info
    return {i for i, info in enumerate(infos) if info.mutates_data}


def overlap(values: Sequence[Any], written: Container[int]) -> bool:
    """Whether one of the `written` tensors overlaps another of `values`.

    Each counts from its first byte to its last, so two halves of the channels overlap.
    """
    end = written_end = 0  # of all that begin before
    for first, last, i in sorted((*_span(x), i) for i, x in enumerate(values) if isinstance(x, Tensor)):
        if first < written_end or (i in written and first < end):
            return True
        end = max(end, last)
        if i in written:
            written_end = max(written_end, last)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    """From which address to which a tensor lies in memory."""
    first = x.data_ptr()
    if x.is_contiguous():  # quickly, for most
        return first, first + x.nbytes
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()
