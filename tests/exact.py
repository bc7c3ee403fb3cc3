"""Data on which the kernels are exact, the fp64 reference, and runs that only a kernel can pass.

Small integers, and batch norms that scale by powers of two, leave nothing to round before the output: every order of
summation gives the same bits, so a test can ask for `torch.equal` whatever the tiling. CUTLASS tests this way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import shadow
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import config
from resnet_triton.config import ConvConfig, ConvShape, DepthwiseTile, choice
from resnet_triton.config.device import DeviceFacts
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import (
    RELU,
    Activation,
    BatchNorm,
    ConvBnRelu,
    Geometry,
    Operation,
    Shortcut,
    Stem,
    gluon,
    interpreter,
    reference,
)
from resnet_triton.ops.dispatch import Modes
from resnet_triton.ops.stem import STEM_CONV, STEM_POOL

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = Modes(kernels="triton")
Layout = Callable[[Tensor], Tensor]


def dtype_id(dtype: torch.dtype) -> str:
    """A dtype as a test's id: torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


def in_turn(*axes: Any, dtypes: Sequence[torch.dtype] = DTYPES, slow: Any = None) -> list[Any]:
    """Every combination, each with one of the dtypes: which values are tried does not depend on it, nor on an axis."""
    cases = []
    for places in itertools.product(*map(range, map(len, axes))):
        values = [list(axis)[i] for axis, i in zip(axes, places, strict=True)]
        dtype = dtypes[sum(places) % len(dtypes)]
        name = "-".join(map(str, (*values, dtype_id(dtype))))
        cases.append(pytest.param(*values, dtype, id=name, marks=pytest.mark.slow if slow in values else ()))
    return cases


# --- data ------------------------------------------------------------------------------------------------------------


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def integers(g: torch.Generator, limit: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integers in [-limit, limit]."""
    return torch.randint(-limit, limit + 1, shape, generator=g, device=g.device).to(dtype)


def _one_of(g: torch.Generator, values: Sequence[float], size: int, dtype: torch.dtype) -> Tensor:
    picks = torch.randint(len(values), (size,), generator=g, device=g.device)
    return torch.tensor(values, dtype=dtype, device=g.device)[picks]


def batch_norm(g: torch.Generator, k: int, dtype: torch.dtype = torch.float32, *, affine: bool = True) -> BatchNorm:
    mean, var = integers(g, 3, k, dtype=dtype), _one_of(g, [0, 0.75, 3.75, 15.75], k, dtype)
    if not affine:
        return BatchNorm(mean, var, None, None, 0.25)
    return BatchNorm(mean, var, _one_of(g, [0, 0.5, -0.5, 1, 2], k, dtype), integers(g, 4, k, dtype=dtype), 0.25)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def conv_call(
    g: torch.Generator,
    shape: ConvShape,
    *,
    activation: Activation = RELU,
    affine: bool = True,
    short_affine: bool = True,
    bn_dtype: torch.dtype = torch.float32,
    short_size: tuple[int, int] | None = None,
    layout: Layout = channels_last,
) -> ConvBnRelu:
    """A call of this shape on exact data. `short_size` is the shortcut's input size, by default the ResNet's."""
    dtype = getattr(torch, shape.dtype)
    n, k, p, q = shape.n, shape.k, shape.p, shape.q
    x = layout(integers(g, 3, n, shape.c, shape.h, shape.w, dtype=dtype))
    weight = layout(integers(g, 2, k, shape.c, shape.r, shape.s, dtype=dtype))
    residual = layout(integers(g, 3, n, k, p, q, dtype=dtype)) if shape.residual else None
    shortcut = None
    if shape.shortcut_c:
        h, w = short_size or (p * shape.shortcut_stride[0], q * shape.shortcut_stride[1])
        shortcut = Shortcut(
            layout(integers(g, 3, n, shape.shortcut_c, h, w, dtype=dtype)),
            layout(integers(g, 2, k, shape.shortcut_c, 1, 1, dtype=dtype)),
            batch_norm(g, k, bn_dtype, affine=short_affine),
            shape.shortcut_stride,
        )
    norm = batch_norm(g, k, bn_dtype, affine=affine)
    geometry = Geometry(shape.stride, shape.padding, shape.dilation)
    return ConvBnRelu(x, weight, norm, geometry, residual, shortcut, activation, KERNELS)


def grouped_call(
    g: torch.Generator,
    size: tuple[int, int, int, int],
    filters: tuple[int, int, int],
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    residual: bool = False,
    layout: Layout = channels_last,
) -> ConvBnRelu:
    """A grouped convolution's call on exact data: the size of its images, the number of its filters and their size."""
    k, r, s = filters
    shapes = size, (k, size[1] // geometry.groups, r, s)
    x, weight = (layout(integers(g, 3, *shape, dtype=dtype)) for shape in shapes)
    call = ConvBnRelu(x, weight, batch_norm(g, k), geometry, modes=KERNELS)
    if residual:
        call.residual = layout(integers(g, 3, *call.output().shape, dtype=dtype))
    return call


def depthwise_call(
    g: torch.Generator,
    size: tuple[int, int, int, int],
    filter: tuple[int, int],
    geometry: Geometry,
    dtype: torch.dtype,
    **options: Any,
) -> ConvBnRelu:
    """The same with a filter for each channel."""
    c = size[1]
    return grouped_call(g, size, (c, *filter), geometry._replace(groups=c), dtype, **options)


def depthwise_tiled(rows: int, block_c: int) -> Any:
    """Depthwise convolutions in tiles of so many rows and channels, until the context ends."""
    tile = DepthwiseTile(rows, 256 // block_c, block_c)
    return mock.patch("resnet_triton.ops.conv._depthwise_tile", return_value=tile)


def stem_call(
    g: torch.Generator, n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype, affine: bool = True
) -> Stem:
    """A stem's call on exact data."""
    x, weight = integers(g, 3, n, c, h, w, dtype=dtype), integers(g, 2, k, c, 7, 7, dtype=dtype)
    return Stem(channels_last(x), channels_last(weight), batch_norm(g, k, affine=affine), modes=KERNELS)


def _into(t: Tensor, margin: Sequence[int], index: tuple[slice, ...]) -> Tensor:
    """`t` copied into a part of a larger tensor."""
    larger = t.new_full([size + extra for size, extra in zip(t.shape, margin, strict=True)], float("nan"))
    return larger[index].copy_(t)


def _every_second(t: Tensor) -> Tensor:
    n, c, h, w = t.shape
    return t.new_full((n, c, 2 * h, 2 * w), float("nan"))[:, :, ::2, 1::2].copy_(t)


def offset_by_one(t: Tensor) -> Tensor:
    """channels_last memory that starts one element into its storage: not aligned to 16 bytes."""
    source = channels_last(t)
    storage = t.new_full((t.numel() + 1,), float("nan"))
    return storage[1:].as_strided(source.shape, source.stride(), 1).copy_(t)


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": channels_last,
    "slice": lambda t: _into(t, (1, 3, 2, 1), (slice(1, None), slice(2, -1), slice(1, -1), slice(None, -1))),
    "channels_last slice": lambda t: _into(
        t.permute(0, 2, 3, 1), (0, 1, 1, 8), (slice(None), slice(1, None), slice(None, -1), slice(None, -8))
    ).permute(0, 3, 1, 2),
    "every second pixel": _every_second,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda t: t[:1].expand(t.shape),
    "offset by one": offset_by_one,
}


# --- reference -------------------------------------------------------------------------------------------------------


def _normed_conv(x: Tensor, weight: Tensor, norm: BatchNorm, geometry: Geometry) -> Tensor:
    # Rounding undoes what an algorithm that transforms its input (Winograd, FFT) would leave of an integer.
    y = F.conv2d(x.double(), weight.double(), None, *geometry).round_()
    mean, var, bn_weight, bn_bias = (None if t is None else t.double()[:, None, None] for t in norm[:4])
    y = (y - mean) * (var + norm.eps).rsqrt()
    y = y if bn_weight is None else y * bn_weight
    return y if bn_bias is None else y + bn_bias


def conv_reference(call: ConvBnRelu) -> Tensor:
    """The call's answer on exact data in fp64."""
    y = _normed_conv(call.x, call.weight, call.batch_norm, call.geometry)
    if call.residual is not None:
        y = y + call.residual.double()
    if call.shortcut is not None:
        x, weight, norm, stride = call.shortcut
        y = y + _normed_conv(x, weight, norm, Geometry(stride))
    return reference.activate(y, *call.activation)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """An fp64 result, rounded once. It has to be exact in fp32, or the data were not what this module promises."""
    assert torch.equal(y.float().double(), y), "not exact in fp32"
    return y.to(dtype)


def stem_reference(call: Stem) -> Tensor:
    """The stem's answer on exact data: fp64, pooled, rounded once."""
    y = _normed_conv(call.x, call.weight, call.batch_norm, STEM_CONV).relu()
    return rounded(F.max_pool2d(y, *STEM_POOL), call.weight.dtype)


def assert_exact(y: Tensor, expected: Tensor, note: object = "") -> None:
    """Equal shapes, dtypes and values; NaN, with which outputs are filled, equals nothing."""
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype), note
    if not torch.equal(y, expected):
        wrong = (y != expected).nonzero()
        i = tuple(wrong[0].tolist())
        raise AssertionError(f"{len(wrong)} of {y.numel()} differ, first {i}: {y[i]}, expected {expected[i]} {note}")


# --- runs ------------------------------------------------------------------------------------------------------------


def _memory(t: Tensor) -> Tensor:
    """All bytes of a tensor's storage, gaps between its elements included."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def run(operation: Operation, *, programs: Sequence[int] | None = None, kernel: str | None = None) -> Tensor:
    """The call on our kernels, on an output full of NaN; inputs, and what surrounds the output, must stay as they are.

    The launches are made here, so PyTorch cannot have stood in for them. `programs` runs these program ids alone
    (interpreter only) of the last launch, `kernel` names the kernel that is expected there.
    """
    name, tensors, like = operation.name, operation.schema.tensors(operation), operation.output()
    margin = 2**17  # more than a tile may write past either end
    buffer = like.new_full((like.numel() + 2 * margin,), float("nan"))
    out = buffer.as_strided(like.shape, like.stride(), margin)
    operation = dataclasses.replace(operation, modes=operation.modes._replace(kernels="triton"))
    operation.choose()  # NotImplementedError if the kernels cannot
    *earlier, launch = plan(operation, out)
    if kernel is not None:
        assert launch.kernel.__name__ == kernel
    before = [(t, _memory(t).clone()) for t in tensors]
    with contextlib.ExitStack() as stack:
        if out.is_cuda:
            stack.enter_context(torch.cuda.device(out.device))
        else:
            stack.enter_context(shadow.watch(whole=programs is None))
            stack.enter_context(interpreter.ready())
        for preparation in earlier:
            preparation.run()
        if programs is not None:
            launch = dataclasses.replace(launch, grid=(len(programs), *launch.grid[1:]))
            stack.enter_context(only(programs))
        launch.run()
    for tensor, bits in before:
        assert torch.equal(_memory(tensor), bits), f"{name} changed an input of shape {tuple(tensor.shape)}"
    assert buffer[:margin].isnan().all(), f"{name} wrote before its output"
    assert buffer[-margin:].isnan().all(), f"{name} wrote behind its output"
    return out


def without_box(chosen: ConvConfig, shape: ConvShape, facts: Any) -> ConvConfig:
    """The configuration on the pointer path, whose loop may have another number of steps and so no such split."""
    pointers = dataclasses.replace(chosen, box=None, swap=False)
    legal = config.is_legal(pointers, shape, facts)
    return pointers if legal else dataclasses.replace(pointers, split_k=1)


def run_conv(call: ConvBnRelu, chosen: ConvConfig, programs: Sequence[int] | None = None) -> Tensor:
    """`run` with this configuration instead of the one looked up; unaligned tensors still drop its box."""

    def rule(shape: ConvShape, facts: Any, *, descriptors: bool) -> ConvConfig:
        return chosen if descriptors else without_box(chosen, shape, facts)

    with choosing(rule):
        return run(call, programs=programs)


@contextlib.contextmanager
def choosing(rule: Callable[..., ConvConfig]) -> Iterator[None]:
    """Make every convolution take what `rule` says of its shape, the facts of a device and `descriptors`."""

    def choose(shape: ConvShape, facts: Any, *, descriptors: bool = True) -> choice.Chosen:
        return choice.Chosen(rule(shape, facts, descriptors=descriptors), trusted=False)

    with mock.patch.object(config, "choose", choose), mock.patch.object(config, "state", object):  # nothing is cached
        yield


def plan(call: Operation, out: Tensor | None = None) -> tuple[Launch, ...]:
    """The launches of a call where its tensors are."""
    return call.launches(call.output() if out is None else out, gluon.facts(call.x.device))


def pretending(facts: DeviceFacts) -> contextlib.AbstractContextManager[object]:
    """Give every device these facts, in all threads."""
    return mock.patch.object(config.device, "facts", return_value=facts)


@contextlib.contextmanager
def only(programs: Sequence[int]) -> Iterator[None]:
    """Make the interpreter number its programs, on the first axis, like this instead of 0, 1, 2, ..."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as upstream

    def create_get_program_id(builder: Any, axis: int) -> Any:
        index = builder.grid_idx[axis]
        return upstream.TensorHandle(np.array([programs[index] if axis == 0 else index], dtype=np.int32), tl.int32)

    with mock.patch.object(upstream.InterpreterBuilder, "create_get_program_id", create_get_program_id):
        yield
