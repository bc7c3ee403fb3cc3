"""The samples on which PyTorch tests its own operators (OpInfo), through ours: PyTorch's answer, on both ways.

A sample becomes a call of `resnet_triton.functional`; axes that ours needs and the sample lacks are added with size 1.
One that ours cannot express is counted under its reason.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import sums
import torch
import torch.nn.functional as TF
from exact import DTYPES, dtype_id
from torch import Tensor

from resnet_triton import functional as F
from resnet_triton import ops
from resnet_triton.ops.checks import pair

PINNED = re.search(r"^torch==(\S+)$", Path(__file__).parents[2].joinpath("constraints.txt").read_text("utf-8"), re.M)


class Inexpressible(Exception):
    """Why none of our calls is this sample."""


class Call(NamedTuple):
    """Ours, PyTorch's, and what bounds the difference (None: no bit may differ), given that PyTorch may round twice."""

    ours: Callable[..., Tensor]
    theirs: Callable[[], Tensor]
    sums: Callable[[], sums.Sums] | None = None
    twice: bool = False

    def off(self, y: Tensor, *, twice: bool) -> float:
        """How much of the bound `y` needs."""
        assert self.sums is not None
        exact = self.sums()
        slack = 2.0 ** -sums.BITS[y.dtype] * exact.magnitude if twice and self.twice else 0.0
        return exact._replace(slack=slack).needed(y) if y.numel() else 0.0


def unless(**obstacles: bool) -> None:
    for reason, met in obstacles.items():
        if met:
            raise Inexpressible(reason)


def padded(x: Any) -> Tensor:
    unless(a_number=not isinstance(x, Tensor))
    return x[(None,) * (4 - x.dim())]


def max_pool2d(x: Tensor, *args: Any, dilation: Any = 1, return_indices: bool, **kwargs: Any) -> Call:
    unless(indices=return_indices, dilation=dilation not in (1, (1, 1)))
    return Call(*(partial(pool, padded(x), *args, **kwargs) for pool in (F.max_pool2d, TF.max_pool2d)))


def add_relu(x: Any, other: Any, *, alpha: float = 1) -> Call:
    x, other = padded(x), padded(other)
    unless(alpha=alpha != 1, broadcasting=x.shape != other.shape, long=x.numel() > 2**12)
    return Call(partial(F.add_relu, x, other), lambda: TF.relu(torch.add(x, other)))


def global_avg_pool(x: Tensor, output_size: Any = None, **_: Any) -> Call:
    """No sample asks for one pixel, or the mean of all: their images are pooled to one instead."""
    unless(wrong_size=output_size in ((), (-1, 0)))
    x = padded(x) if x.dim() > 2 or output_size is None else x
    theirs = partial(TF.adaptive_avg_pool2d, x, (1, 1))
    return Call(partial(F.global_avg_pool, x), theirs, partial(sums.global_avg_pool, ops.GlobalAvgPool(x)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    unless(one_feature=weight.dim() == 1)
    ours, theirs = (partial(module.linear, x, weight, bias) for module in (F, TF))
    return Call(ours, theirs, partial(sums.linear, ops.Linear(x, weight, bias)))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, **how: Any) -> Call:
    """With a batch norm that is the identity, or adds the bias."""
    unless(padding_in_words=isinstance(how.get("padding"), str))
    x, one = padded(x), torch.ones_like(weight[:, 0, 0, 0])
    norm = ops.BatchNorm(torch.zeros_like(one), one, None, bias, 0.0)

    def exact() -> sums.Sums:
        geometry = ops.Geometry(**{name: pair(value) for name, value in how.items()}, groups=groups)
        return sums.conv(ops.ConvBnRelu(x, weight, norm, geometry, activation=ops.NONE))

    ours = partial(F.conv_bn_relu, x, weight, *norm, groups=groups, activation="none", **how)
    return Call(ours, partial(TF.conv2d, x, weight, bias, groups=groups, **how), exact, bias is not None)


class Source(NamedTuple):
    """How an OpInfo's samples become calls, and the fewest that do, that run on our kernels, and that are errors."""

    express: Callable[..., Call]
    samples: int
    on_kernels: int
    errors: int = 0
    every: int = 1
    """1 for all samples, 3 for every third: of the max pool's, neighbours differ in little."""


SOURCES = {
    "nn.functional.max_pool2d": Source(max_pool2d, 60, 60, errors=7, every=3),
    "add": Source(add_relu, 49, 49),
    "nn.functional.adaptive_avg_pool2d": Source(global_avg_pool, 10, 10, errors=1),
    "mean": Source(global_avg_pool, 20, 20),
    "nn.functional.linear": Source(linear, 18, 18),
    "nn.functional.conv2d": Source(conv2d, 26, 10, errors=6),
}


@functools.cache
def opinfos() -> dict[str, Any]:
    """By name. They are PyTorch's internal affair and may move, but not in the version that is tested."""
    try:
        with mock.patch.object(torch.backends, "disable_global_flags"):  # or no later test could set one
            from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        if PINNED is None or torch.__version__.partition("+")[0] == PINNED[1]:
            raise
        pytest.skip(f"torch {torch.__version__} keeps its samples elsewhere: {error}")
    return {op.name: op for op in op_db if not op.variant_test_name}


def calls(name: str, samples: Any, reasons: Counter[str]) -> list[Call]:
    made = []
    for sample in samples:
        try:
            made.append(SOURCES[name].express(sample.input, *sample.args, **sample.kwargs))
        except Inexpressible as reason:
            reasons[str(reason)] += 1
    print(f"{len(made)} of {len(made) + reasons.total()}", dict(reasons))
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and overflow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", SOURCES)
def test_samples(device: torch.device, name: str, dtype: torch.dtype) -> None:
    on_kernels, limit = 0, sums.LAM if device.type == "cpu" else 4 * sums.LAM
    samples = itertools.islice(opinfos()[name].reference_inputs(device.type, dtype), 0, None, SOURCES[name].every)
    made = calls(name, samples, Counter())
    for call in made:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            theirs, ours = call.theirs(), {"auto": call.ours(kernels="auto")}
            with contextlib.suppress(NotImplementedError):
                ours["triton"] = call.ours(kernels="triton")
                on_kernels += 1
        for way, y in ours.items():
            assert (y.shape, y.dtype) == (theirs.shape, theirs.dtype), way
            if call.sums is None:
                torch.testing.assert_close(y, theirs, rtol=0, atol=0, equal_nan=True)
            else:
                assert call.off(y, twice=way == "auto") <= limit
                assert call.off(theirs, twice=True) <= limit
    assert len(made) >= SOURCES[name].samples
    assert on_kernels >= SOURCES[name].on_kernels


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.errors])
def test_errors(device: torch.device, name: str, kernels: str) -> None:
    """What PyTorch refuses, ours refuses, in one line."""
    samples = [error.sample_input for error in opinfos()[name].error_inputs(device.type)]
    for sample in samples:
        if name.endswith("max_pool2d"):
            sample.kwargs |= {"ceil_mode": False, "return_indices": False}  # neither is what is wrong
    made = calls(name, samples, Counter())
    assert len(made) >= SOURCES[name].errors
    for call in made:
        with pytest.raises((RuntimeError, ValueError)):
            call.theirs()
        with pytest.raises((ValueError, TypeError)) as caught:
            call.ours(kernels=kernels)
        assert "\n" not in str(caught.value)
