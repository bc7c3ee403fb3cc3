"""What launches may do in a graph of our model, and not elsewhere: start early, and use the graph's own semaphores."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

import torch
from torch import Tensor

from ..config.device import DeviceFacts
from . import interpreter

graph_semaphores: ContextVar[Tensor | None] = ContextVar("graph_semaphores", default=None)
"""Zeros (int32) for the launches of the graph being captured: zeroed inside, every replay would zero them again."""
dependent_launches: ContextVar[bool] = ContextVar("dependent_launches", default=False)
"""Whether launches follow each other and no kernel among them writes a parameter: those of a graph of our model."""
borrowing: ContextVar[bool] = ContextVar("borrowing", default=False)
"""Whether a compiler may lend a call the memory that it allocates, for CUDA graphs. Then the call may keep none."""


def may_depend(facts: DeviceFacts, parameters: Iterable[tuple[object, object]]) -> bool:
    """Whether a launch may start while the one before runs, and read these parameters, each as given and as read.

    Only in a graph of our model: elsewhere the launch before may be somebody's edit of one. A parameter that is read in
    another form than it was given in has been copied just before.
    """
    if not dependent_launches.get() or interpreter.active() or facts.arch < 90:
        return False
    return all(given is read for given, read in parameters)


_kept: dict[tuple[torch.device, int], Tensor] = {}
"""Semaphores outside graphs, by device and stream."""


def forget_semaphores() -> None:
    """A kernel that is wrong may have left them at something: take new ones from now on."""
    _kept.clear()


def semaphores_for(where: torch.device, tiles: int) -> Tensor:
    """Zeros for launches that follow each other, on a stream or in a graph, and leave them at zero."""
    if where.type == "cuda":  # elsewhere a launch is interpreted, may be interrupted, and leaves them at something
        if torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: semaphores of its own
            prepared = graph_semaphores.get()
            if prepared is not None and prepared.numel() >= tiles:
                return prepared
        elif not borrowing.get():  # what stays in the memory of torch.compile's CUDA graphs is an error to it
            stream = torch.cuda.current_stream(where).cuda_stream
            semaphores = _kept.get((where, stream))
            if semaphores is None or semaphores.numel() < tiles:
                semaphores = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=where)
                _kept[where, stream] = semaphores
            return semaphores
    return torch.zeros(tiles, dtype=torch.int32, device=where)
