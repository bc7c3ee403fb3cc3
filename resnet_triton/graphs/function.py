"""A compiled function that runs as a CUDA graph: one for the sizes and the memory that come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import cuda_graph as cuda
from .replay import CudaGraph, Graphs, copied, key_of, uncaptured_reason


class GraphedFunction(Graphs):
    """`function(*values)`, which returns new tensors in a tuple and changes nothing.

    Of its values, number `images` is read anew in each call. Those in `static` are parameters and buffers, which a
    graph reads where they are: it is one for these addresses. All others are numbers.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], images: int, static: Sequence[int], cuda_graph: CudaGraph
    ) -> None:
        super().__init__()
        self.function, self.images, self.cuda_graph = function, images, cuda_graph
        self._static = sorted(static)
        self._known = {images, *static}
        self._first = True

    def __call__(self, values: list[Any]) -> Sequence[Tensor]:
        x = values[self.images]
        if self._first or not cuda.takes(x):  # in the first call, torch.compile watches what operators return
            self._first = False
            return self.function(*values)
        if (reason := uncaptured_reason(x)) is not None:
            self.note(reason, self.cuda_graph)
            return self.function(*values)
        key = key_of(x)
        where = tuple(values[i].data_ptr() for i in self._static)
        key = *key[:-1], where, tuple(v for i, v in enumerate(values) if i not in self._known), key[-1]
        replayed: Sequence[Tensor] | None = self.replay(key, x)
        if replayed is not None:
            return replayed
        y = self.function(*values)

        def body(images: Tensor) -> Any:
            return tuple(self.function(*(images if i == self.images else v for i, v in enumerate(values))))

        self.consider(key, x, self.cuda_graph, lambda: None, lambda: copied(body, x))
        return y
