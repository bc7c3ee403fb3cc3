"""Inputs in one memory, in compiled models that write one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import exact
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from resnet_triton import optimize
from resnet_triton.ops import dispatch

SIZES = 2, 4, 6, 6
Inputs = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Writes(nn.Module):
    """It writes its first input and a buffer, and returns what a convolution makes of the second, and a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv.weight.data = exact.integers(exact.generator(torch.device("cpu"), 0), 1, 4, 4, 3, 3)
        self.register_buffer("seen", torch.zeros(SIZES))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(1)
        self.seen += 1
        return self.conv(y), y[:, 1:]


def images(n: int = 2) -> Tensor:
    return exact.integers(exact.generator(torch.device("cpu"), 1), 2, n, *SIZES[1:])


def of_numpy(model: Any) -> Inputs:
    """Two storages in one memory."""
    array: Any = np.arange(3 * 144, dtype=np.float32).reshape(3, *SIZES[1:])
    return torch.from_numpy(array[:2]), torch.from_numpy(array[1:])


def parts(n: int, first: int, second: int) -> Callable[[Any], Inputs]:
    return lambda model: (lambda x: (x[first : first + 2], x[second : second + 2]))(images(n))


INPUTS: dict[str, Callable[[Any], Inputs]] = {
    "apart": lambda model: (images(), images()),
    "neighbours": parts(4, 0, 2),
    "the first behind": parts(3, 1, 0),
    "the second behind": parts(3, 0, 1),
    "further behind": parts(5, 2, 3),
    "one image": lambda model: (images()[:1].expand(SIZES).contiguous(), model.seen[:1].expand(SIZES)),
    "one memory": lambda model: (lambda x: (x, x.view(SIZES)))(images()),
    "one tensor": lambda model: (images(),) * 2,
    "of another order": lambda model: (lambda x: (x, x.transpose(2, 3)))(images()),
    "channels of one": lambda model: (lambda x: (x[:, :4], x[:, 2:]))(torch.cat([images()] * 2, 1)[:, :6]),
    "every second image": lambda model: (lambda x: (x[::2], x[2:]))(images(4)),
    "the last number": lambda model: (lambda x: (x.as_strided(SIZES, (288, 72, 12, 2)), x[574:862].view(SIZES)))(
        images(6).flatten()
    ),
    "a buffer, written": lambda model: (model.seen.view(SIZES), images()),
    "a buffer, read": lambda model: (images(), model.seen.view(SIZES)),
    "of numpy": of_numpy,
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("first", ["apart", "the second behind", "a buffer, read"])
@torch._dynamo.config.patch(recompile_limit=16)
@torch.no_grad()
def test_inputs_that_overlap_otherwise_than_at_the_first_call(first, dynamic):
    model, plain = Writes().eval(), Writes().eval()
    fast = torch.compile(model, backend="resnet_triton", dynamic=dynamic)
    for name in (first, *INPUTS, first):
        given, expected = INPUTS[name](model), INPUTS[name](plain)
        for actual, wanted in zip(fast(*given), plain(*expected), strict=True):
            assert torch.equal(actual, wanted), f"{name} after {first}"
        for actual, wanted in zip((*given, model.seen), (*expected, plain.seen), strict=True):
            assert torch.equal(actual, wanted), f"{name} after {first}: what is written"


@pytest.mark.parametrize("make", [optimize, functools.partial(torch.compile, backend="resnet_triton")])
@torch.no_grad()
def test_our_kernels_run_where_no_written_input_overlaps(make):
    """Also if one did in the first call."""
    fast = make(model := Writes().eval())
    for name, count in (("of numpy", 0), ("one memory", 0), ("apart", 1), ("neighbours", 1), ("of numpy", 0)):
        before = dispatch.calls.total()
        fast(*INPUTS[name](model))
        assert dispatch.calls.total() - before == count, name


@torch.no_grad()
def test_kernels_that_were_asked_for_and_cannot_run():
    model = optimize(Writes().eval(), kernels="triton")
    model(images(), images())
    with pytest.raises(NotImplementedError, match="writes may overlap another one; plain copies of both do not"):
        model(*of_numpy(model))


@torch.no_grad()
def test_results_lie_as_if_filters_had_not_been_moved(monkeypatch):
    monkeypatch.setattr(dispatch, "meant", lambda kernels, t: True)  # as on a GPU
    model, plain = optimize(Writes().eval()), Writes().eval()
    for name in ("of numpy", "apart", "of numpy"):
        actual, expected = model(*INPUTS[name](model))[0], plain(*INPUTS[name](plain))[0]
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
    filters = model.conv.weight.data
    assert not filters.is_contiguous()
    model(filters[:2].clone(), images())
    with pytest.raises(RuntimeError, match="writes is a part of its filters, expected a copy"):
        model(filters[:2], images())


@torch.no_grad()
def test_a_tensor_of_two_that_overlap_another():
    model, plain = Writes().eval(), Writes().eval()
    fast = torch.compile(model, backend="resnet_triton")
    for name in ("apart", "of numpy", "the second behind"):
        (x, y), expected = INPUTS[name](model), plain(*INPUTS[name](plain))
        for actual, wanted in zip(fast(x, TwoTensor(y, y)), expected, strict=True):
            assert torch.equal(actual.a, wanted), name
