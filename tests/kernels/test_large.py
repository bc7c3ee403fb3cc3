"""More than 2^31 elements, and no int32 overflow: the last programs of launches on tensors larger than the machine.

Untouched pages take no memory, so a tensor may have all the elements that an index has to reach. Integers that wrap
around do not show in the interpreter by themselves; its overflow check, which costs half the time and is off elsewhere,
is on here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from exact import assert_exact, generator, integers, only
from mapped import huge, run_file
from reliability.planting import planted
from torch import Tensor

from resnet_triton import config, ops
from resnet_triton.config import ConvConfig, StemConfig
from resnet_triton.kernels.launch import Launch
from resnet_triton.ops import Operation, interpreter

LARGE = 2**31
HALF = torch.float16
CPU = torch.device("cpu")


@contextlib.contextmanager
def overflow_is_an_error() -> Iterator[None]:
    from triton.runtime import interpreter as upstream

    interpreter.repair()
    checking = dataclasses.replace(upstream.interpreter_builder.options, debug=True, sanitize_overflow=True)
    with mock.patch.object(upstream.interpreter_builder, "options", checking):
        yield


def images(n: int, c: int, h: int, w: int) -> Tensor:
    """Channels-last zeros, but integers in the last rows of the last image."""
    x = huge((n, h, w, c), HALF).permute(0, 3, 1, 2)
    last = x[-1:, :, -16:, -64:]
    last.copy_(integers(generator(CPU, 0), 3, *last.shape, dtype=HALF))
    assert x.numel() > LARGE
    return x


def run_last(call: Operation, *, images_of: int = 0, programs: int = 0) -> Tensor:
    """The call's output; of each launch only the last programs run: this many, or all for the last image."""
    (n, *rest), dtype, memory = call.result()
    channels_last = memory == torch.channels_last
    out = huge((n, *rest[1:], rest[0]) if channels_last else (n, *rest), dtype)
    out = out.permute(0, 3, 1, 2) if channels_last else out

    empty = torch.empty

    def huge_if_large(*shape: int, dtype: torch.dtype, **other: Any) -> Tensor:
        return huge(shape, dtype) if math.prod(shape) > LARGE else empty(*shape, dtype=dtype, **other)

    with mock.patch.object(torch, "empty", huge_if_large):
        launches = call.launches(out)
    for launch in launches:
        run_part(launch, programs or launch.grid[0] // images_of)
    return out


def run_part(launch: Launch, programs: int) -> None:
    first = launch.grid[0] - programs
    with interpreter.ready(), only(range(first, launch.grid[0])):
        dataclasses.replace(launch, grid=(programs, *launch.grid[1:])).run()


IDENTITY = ops.BatchNorm(torch.zeros(64), torch.ones(64), None, None, 0.0)
TALL, WIDE, MANY = (1, 64, 2**22 + 2, 8), (1, 64, 2, 2**25 - 200), (2**19 + 2, 64, 8, 8)
COLOURED = (LARGE // (3 * 8 * 8) + 1, 3, 8, 8)


def check_conv(chosen: ConvConfig, shape: Sequence[int], stride: int = 1, *, residual: bool = False) -> None:
    x = images(*shape)
    weight = integers(generator(CPU, 1), 2, 64, shape[1], 3, 3, dtype=HALF)
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = ops.Geometry((stride, stride), (1, 1))
    with config.pinned(chosen):
        out = run_last(ops.ConvBnRelu(x, weight, IDENTITY, geometry, x if residual else None), programs=4)
    crop = x[-1:, :, -16:, -64:].double()
    expected = F.conv2d(crop, weight.double(), stride=stride, padding=1)
    expected = (expected + crop if residual else expected).relu().to(HALF)
    assert_exact(out[-1:, :, -1:, -2:], expected[:, :, -1:, -2:])


def check_max_pool(shape: Sequence[int]) -> None:
    x = images(*shape)
    out = run_last(ops.MaxPool2d(x, (3, 3), (1, 1), (1, 1)), programs=8)
    assert_exact(out[-1:, :, -1:, -4:], F.max_pool2d(x[-1:, :, -16:, -64:], 3, 1, 1)[:, :, -1:, -4:])


def check_depthwise(shape: Sequence[int]) -> None:
    x, weight = images(*shape), integers(generator(CPU, 1), 2, 64, 1, 3, 3, dtype=HALF)
    out = run_last(ops.ConvBnRelu(x, weight, IDENTITY, ops.Geometry(padding=(1, 1), groups=64), x), programs=4)
    crop = x[-1:, :, -16:, -64:].double()
    expected = (F.conv2d(crop, weight.double(), padding=1, groups=64) + crop).relu().to(HALF)
    assert_exact(out[-1:, :, -1:, -2:], expected[:, :, -1:, -2:])


def check_avg_pool() -> None:
    x = images(2**21 + 1, 1024, 1, 1)
    assert_exact(run_last(ops.GlobalAvgPool(x), programs=16)[-1], x[-1])


def check_stem() -> None:
    n = LARGE // (3 * 16 * 16) + 1
    x = images(n, 3, 16, 16)
    weight = integers(generator(CPU, 1), 2, 64, 3, 7, 7, dtype=HALF)

    def scratch(n: int, h: int, w: int, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        packed = huge(ops.stem.packed_shape(n, h, w), dtype)
        assert packed.numel() > LARGE
        return packed, huge(packed.shape[:2], torch.int32)

    tile = StemConfig(16, 64, 2, 4, 2)
    with (
        mock.patch.object(config, "stem_heuristic", return_value=tile),
        mock.patch.object(ops.stem, "_scratch", scratch),
    ):
        out = run_last(ops.Stem(x, weight, IDENTITY), images_of=n)
    expected = F.max_pool2d(F.conv2d(x[-1:].double(), weight.double(), stride=2, padding=3).relu(), 3, 2, 1)
    assert out.numel() > LARGE
    assert_exact(out[-1:], expected.to(HALF))


def check_linear() -> None:
    g = generator(CPU, 0)
    rows, weight = huge((2**25 + 1, 64), HALF), integers(g, 2, 64, 64, dtype=HALF)
    rows[-1] = integers(g, 3, 64)
    out = run_last(ops.Linear(rows, weight), programs=4)
    assert_exact(out[-1], (rows[-1].double() @ weight.double().T).to(HALF))


def check_classes(operator: type[ops.Linear] | type[ops.AvgPoolLinear]) -> None:
    """More weights than 2^31."""
    g = generator(CPU, 0)
    weight, x = huge((2**21 + 1, 1024), HALF), integers(g, 3, 2, 1024, dtype=HALF)
    weight[-1] = integers(g, 2, 1024)
    features = x if operator is ops.Linear else x[:, :, None, None]
    out = run_last(operator(features, weight), programs=1)
    assert_exact(out[1, -1], (x[1].double() @ weight[-1].double()).to(HALF))


def check_add_relu() -> None:
    x = images(*MANY)
    assert_exact(run_last(ops.AddRelu(x, x), programs=4)[-1], 2 * x[-1].relu())


def box(*sides: int, **options: Any) -> ConvConfig:
    return ConvConfig(16, 32, 16, 4, 2, **options).on(sides)


POINTER = ConvConfig(16, 32, 16, 4, 2)
PARTIALS = dataclasses.replace(POINTER, split_k=3)
CHECKS: dict[str, Callable[[], None]] = {
    "pointers, many images": lambda: check_conv(POINTER, MANY, residual=True),
    "pointers, a tall image": lambda: check_conv(POINTER, TALL, 2),
    "pointers, a wide image": lambda: check_conv(POINTER, WIDE),
    "pointers, few channels": lambda: check_conv(POINTER, COLOURED),
    "pointers, partials": lambda: check_conv(PARTIALS, MANY),
    "boxes of images": lambda: check_conv(box(1, 1, 16), MANY, residual=True),
    "boxes of images, stride 2": lambda: check_conv(box(1, 2, 8), MANY, 2),
    "boxes of rows": lambda: check_conv(box(4, 4, 1), MANY),
    "boxes of rows, stride 2": lambda: check_conv(box(1, 16, 1), MANY, 2),
    "boxes of one image, stride 2": lambda: check_conv(box(4, 4, 1), TALL, 2),
    "boxes, partials": lambda: check_conv(box(1, 1, 16, split_k=3), MANY),
    "depthwise, many images": lambda: check_depthwise(MANY),
    "depthwise, a wide image": lambda: check_depthwise(WIDE),
    "stem": check_stem,
    "max pool, many images": lambda: check_max_pool(MANY),
    "max pool, a tall image": lambda: check_max_pool(TALL),
    "max pool, a wide image": lambda: check_max_pool(WIDE),
    "average pool": check_avg_pool,
    "linear, many rows": check_linear,
    "linear, many classes": lambda: check_classes(ops.Linear),
    "average pool and linear, many classes": lambda: check_classes(ops.AvgPoolLinear),
    "add": check_add_relu,
}
POINTERS = ("conv_pointer.py", "conv_pointer_kernel")
DEPTHWISE = ("conv_depthwise.py", "conv_depthwise_kernel")
NARROW = [
    ("pointers, many images", *POINTERS, "offs_m.to(tl.int64)", "offs_m"),
    ("pointers, a tall image", *POINTERS, "row = W.to(tl.int64) * C", "n, row = (n.to(tl.int32), W * C)"),
    ("pointers, partials", "tiles.py", "sum_partials", "tile.to(tl.int64)", "tile"),
    ("boxes of images", "conv_box.py", "box_offsets", "n.to(tl.int64)", "n"),
    ("depthwise, many images", *DEPTHWISE, "(rest // (tiles_q * tiles_p)).to(tl.int64)", "rest // (tiles_q * tiles_p)"),
    ("depthwise, a wide image", *DEPTHWISE, "row = W.to(tl.int64) * C", "row = W * C"),
    ("stem", "stem.py", "pack_kernel", "(tl.program_id(0) // ROWS).to(tl.int64)", "tl.program_id(0) // ROWS"),
    ("stem", "stem.py", "_strip", "n.to(tl.int64)", "n"),
    ("max pool, a wide image", "max_pool.py", "max_pool_kernel", "offs_m.to(tl.int64)", "offs_m"),
    ("linear, many classes", "linear.py", "linear_kernel", "offs_k.to(tl.int64)", "offs_k"),
    ("add", "add_relu.py", "add_relu_kernel", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
]


def main() -> None:
    with overflow_is_an_error():
        for name, check in CHECKS.items():
            print(name, file=sys.stderr)
            check()
        for name, *place in NARROW:
            print("planted in", name, file=sys.stderr)
            with planted(*place), pytest.raises(Exception, match="int32 overflow detected for operation mul"):
                CHECKS[name]()


@pytest.mark.slow
@pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")
def test_tensors_with_more_than_int32_counts() -> None:
    """In a process of its own, which a wrong address may end."""
    run_file(__file__)


if __name__ == "__main__":
    main()
