"""A compiled function that runs as a CUDA graph: one for the sizes and the memory that come back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda_graph as cuda
from .cuda_graph import Entry
from .look import addresses
from .replay import CudaGraph, Graphs, key_of, tf32, watched_reason


class GraphedFunction(Graphs):
    """`function(*values)`, which returns new tensors and numbers in a tuple and changes nothing.

    Of its values, those numbered in `inputs` are tensors that are read anew in each call. Those in `static` are
    parameters and buffers, which a graph reads where they are: it is one for these addresses. All others are numbers.
    `widens` says that it computes in fp32, though no input is.
    """

    def __init__(
        self, function: Callable[..., Sequence[Any]], inputs: set[int], static: set[int], cuda_graph: CudaGraph,
        widens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.function, self.cuda_graph, self._widens = function, cuda_graph, widens
        self._inputs, self._static = sorted(inputs), tuple(sorted(static))
        self._known = inputs | static
        self._first = True

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        given = [values[i] for i in self._inputs]
        if self._first or not cuda.takes(given[0]):  # in the first call, torch.compile watches what operators return
            self._numbers = [i for i in range(len(values)) if i not in self._known]
            self._first = False
            return self.function(*values)
        if (reason := watched_reason(given[0].device)) is not None:
            self.note(reason, self.cuda_graph)
            return self.function(*values)
        first, *others = keys = list(map(key_of, given))
        where = addresses(values, self._static)
        numbers = tuple(map(values.__getitem__, self._numbers))
        key = *first, *others, where, numbers, tf32() if self._widens else None
        place = tuple(map(Tensor.data_ptr, given)) if all(readable for *_, readable in keys) else None
        replayed: Sequence[Any] | None = self.replay(key, given, place, lambda: self._there(values, given, where))
        if replayed is not None:
            return replayed
        y = self.function(*values)
        self.consider(key, self.cuda_graph, lambda: None, lambda: self._entry(values, given, where))
        return y

    def _entry(self, values: Sequence[Any], given: list[Tensor], where: Hashable) -> Entry:
        read, buffers = list(values), tuple(map(torch.clone, given))  # an index that nobody wrote could be any

        def fill(given: list[Tensor]) -> None:
            for buffer, t in zip(buffers, given, strict=True):
                buffer.copy_(t)

        def body(buffers: tuple[Tensor, ...]) -> Any:
            for i, buffer in zip(self._inputs, buffers, strict=True):
                read[i] = buffer
            return self._results(read, where)

        return Entry(buffers, fill, body)

    def _there(self, values: Sequence[Any], given: list[Tensor], where: Hashable) -> Entry:
        return Entry(tuple(given), None, lambda given: self._results(values, where))

    def _results(self, values: Sequence[Any], where: Hashable) -> tuple[Any, ...]:
        results = tuple(self.function(*values))
        if addresses(values, self._static) != where:
            raise RuntimeError("another thread has moved a parameter meanwhile")
        return results
