"""How much memory a forward pass holds at once, counted on fake tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import resnet_triton
from resnet_triton.support import vision


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators have made and Python has not dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and storage(t) not in given:
                self.now += t.nbytes
                weakref.finalize(t, self.drop, t.nbytes)
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, nbytes: int) -> None:
        self.now -= nbytes


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def peak(model: Any, x: Tensor) -> int:
    with torch.no_grad(), Live() as live:
        model(x)
    return live.peak


@contextlib.contextmanager
def half_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_batch_of_256_needs_half_of_torchvisions_memory(monkeypatch):
    """Images and results of layers; with a graph, the images twice. torchvision's pool makes indices, too."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, **kwargs: self)  # fake parameters cannot be moved
    with FakeTensorMode(), half_precision():
        theirs, ours = vision.torchvision().models.resnet18().eval(), resnet_triton.resnet18().eval()
        x = torch.empty(256, 3, 224, 224, dtype=torch.float16).to(memory_format=torch.channels_last)
        mine, yours = peak(ours, x), peak(theirs, x)
    assert yours == 256 * (112 * 112 * 64 * 2 + 56 * 56 * 64 * (2 + 8))
    assert mine == 256 * 56 * 56 * 64 * 2 * 3
    assert mine + 2 * x.nbytes <= (yours + x.nbytes) / 2
