"""Tensors of more than 2^31 elements, of which only the pages that a test touches exist.

A launch of millions of programs is run as the few whose pixels lie beyond what int32 counts.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from typing import Any

import pytest
import shadow
import torch
import torch.nn.functional as F
from exact import assert_exact, generator, integers, only
from torch import Tensor

from resnet_triton.kernels import stem as stem_kernels
from resnet_triton.kernels.add_relu import add_relu
from resnet_triton.kernels.avg_pool_linear import avg_pool_linear
from resnet_triton.kernels.conv_bn_relu import conv_bn_relu
from resnet_triton.kernels.conv_depthwise import conv_depthwise
from resnet_triton.kernels.global_avg_pool import global_avg_pool
from resnet_triton.kernels.launch import Launch
from resnet_triton.kernels.linear import linear
from resnet_triton.kernels.max_pool import max_pool
from resnet_triton.kernels.values import NONE, BatchNorm, ConvConfig, Convolution, Geometry, Shortcut
from resnet_triton.ops import ConvBnRelu, Linear, Stem, interpreter

pytestmark = pytest.mark.skipif(not interpreter.active(), reason="a GPU's memory has no pages that do not exist")
RESERVE_NOTHING = 0x4000  # Linux's MAP_NORESERVE; Python names it from 3.13 on
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_shadow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would touch every page."""
    monkeypatch.setattr(shadow, "_active", True)


def sparse(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros in memory that exists once it is touched."""
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | RESERVE_NOTHING
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


def pixels(n: int, c: int, h: int, w: int) -> Tensor:
    return sparse(n, h, w, c).permute(0, 3, 1, 2)


def filled(t: Tensor, limit: int = 3) -> Tensor:
    """Small integers in a part of a tensor that is not there yet."""
    return t.copy_(integers(generator(CPU, t.numel()), limit, *t.shape))


def run(launch: Launch, *programs: int) -> None:
    """These programs alone, counted from the end if negative."""
    ids = [p % launch.grid[0] for p in programs]
    with interpreter.ready(), only(ids):
        replace(launch, grid=(len(ids), *launch.grid[1:])).run()


def test_add_relu() -> None:
    x, other, out = (sparse(2**31 + 16) for _ in range(3))
    filled(x[-32:])
    filled(other[-32:])
    run(add_relu(out=out, x=x, other=other, block=16, num_warps=4), -1, -2)
    assert_exact(out[-32:], (x[-32:] + other[-32:]).relu())


@pytest.mark.parametrize(
    ("m", "c", "k"), [(2**17 + 16, 2**14, 16), (16, 2**14, 2**17 + 16), (2**16 + 16, 16, 2**15 + 16)], ids=str
)
def test_linear(m: int, c: int, k: int) -> None:
    x, weight, bias, out = sparse(m, c), sparse(k, c), sparse(k), sparse(m, k)
    for t in (x[-16:], weight[-16:], bias[-16:]):
        filled(t, 1)
    run(
        linear(out=out, x=x, weight=weight, bias=bias, precision="ieee", block_m=16, block_k=16, block_c=1024,
               num_warps=4, num_stages=2),
        -1,
    )  # fmt: skip
    expected = x[-16:].double() @ weight[-16:].double().T + bias[-16:].double()
    assert_exact(out[-16:, -16:], expected.half())


def test_global_avg_pool() -> None:
    x, out = pixels(2, 2**20, 41, 50), pixels(2, 2**20, 1, 1)
    last = filled(x[-1, -16:])
    run(global_avg_pool(out=out, x=x, block_p=64, block_c=16, num_warps=4), -1)
    assert_exact(out[-1, -16:, 0, 0], (last.float().sum((1, 2)) / (41 * 50)).half())


def test_avg_pool_linear() -> None:
    n, c, k = 2**13 + 1, 1024, 2**21 + 16
    x, weight, out = pixels(n, c, 16, 16), sparse(k, c), sparse(n, k)
    x[-1] = filled(sparse(c, 1, 1))
    filled(weight[-16:], 1)
    launch = avg_pool_linear(out=out, x=x, weight=weight, bias=None, block_p=16, block_k=16, block_c=1024, num_warps=4)
    run(launch, -1)
    assert_exact(out[-1, -16:], (weight[-16:].double() @ x[-1, :, 0, 0].double()).half())


WIDE = 2**24 + 16  # times 64 channels: a row of 2^30 elements


def wide_tiles() -> list[int]:
    """The last 16 pixels of the second and third row."""
    return [2 * WIDE // 16 - 1, 3 * WIDE // 16 - 1]


def test_max_pool() -> None:
    x, out = pixels(1, 64, 3, WIDE), pixels(1, 64, 3, WIDE)
    end = filled(x[..., -20:])
    launch = max_pool(
        out=out,
        x=x,
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        block_m=16,
        block_c=64,
        unroll=9,
        num_warps=4,
    )
    run(launch, *wide_tiles())
    assert_exact(out[:, :, 1:, -16:], F.max_pool2d(end, 3, 1, 1)[:, :, 1:, -16:])


TILE, LONG = ConvConfig(16, 64, 64, 4, 2), ConvConfig(16, 16, 2048, 4, 2)
IDENTITY = BatchNorm(torch.zeros(64), torch.ones(64), None, None, 0.0)


def conv(out: Tensor, x: Tensor, weight: Tensor, **changes: Any) -> Launch:
    """A convolution whose batch norm changes nothing, through pointers in tiles of 16 pixels unless told otherwise."""
    default: dict[str, Any] = {
        "batch_norm": IDENTITY, "geometry": Geometry(padding=(1, 1)), "residual": None, "shortcut": None,
        "activation": NONE, "precision": "ieee", "config": TILE, "programs": 132, "partials": None, "semaphores": None,
    }  # fmt: skip
    return conv_bn_relu(Convolution(out, x, weight, **default | changes))


def flat(launch: Launch) -> Launch:
    """The same reduced over one index of taps and channels, as with few channels."""
    return replace(launch, arguments=launch.arguments | {"FLAT": True})


def filters(k: int, c: int, size: int) -> Tensor:
    return filled(sparse(k, size, size, c).permute(0, 3, 1, 2), 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
@pytest.mark.parametrize("how", ["plain", "flat", "grouped", "shortcut", "shared"])
def test_conv_pointer(how: str) -> None:
    groups = 16 if how == "grouped" else 1
    x, out, weight = pixels(1, 64, 3, WIDE), pixels(1, 64, 3, WIDE), filters(64, 64 // groups, 3)
    end = filled(x[..., -20:])
    expected = F.conv2d(end.double(), weight.double(), padding=1, groups=groups)
    options: dict[str, Any] = {"geometry": Geometry(padding=(1, 1), groups=groups)}
    first = 0
    if how == "grouped":  # the sums of other groups are not numbers at first
        x[0, 0, :, -8], first = math.inf, 4
    if how in ("plain", "flat"):
        options |= {"residual": x}  # as large as the result
        expected += end.double()
    if how == "shortcut":
        other, one = pixels(1, 64, 3, WIDE), filters(64, 64, 1)
        expected += F.conv2d(filled(other[..., -20:]).double(), one.double())
        options["shortcut"] = Shortcut(other, one, IDENTITY, (1, 1))
    if how == "shared":
        tiles = 3 * WIDE // 16
        options |= {"config": replace(TILE, split_k=3), "semaphores": sparse(tiles, dtype=torch.int32)}
        options["partials"] = sparse(3 * tiles * 16 * 64, dtype=torch.float32)
    launch = conv(out, x, weight, **options)
    run(flat(launch) if how == "flat" else launch, *wide_tiles())
    assert_exact(out[:, first:, 1:, -16:], expected[:, first:, 1:, -16:].half())


def test_conv_depthwise() -> None:
    x, out, weight = pixels(1, 64, 3, WIDE), pixels(1, 64, 3, WIDE), filled(sparse(64, 1, 3, 3), 1)
    end = filled(x[..., -20:])
    launch = conv_depthwise(
        out=out, x=x, weight=weight, batch_norm=IDENTITY, geometry=Geometry(padding=(1, 1)), residual=x,
        activation=NONE, rows=1, box_w=16, block_c=64, num_warps=4,
    )  # fmt: skip
    run(launch, *wide_tiles())
    expected = F.conv2d(end.double(), weight.double(), padding=1, groups=64) + end.double()
    assert_exact(out[:, :, 1:, -16:], expected[:, :, 1:, -16:].half())


def test_filters_of_conv_depthwise() -> None:
    c = 2**26
    x, out, weight = pixels(1, c, 1, 1), pixels(1, c, 1, 1), sparse(c, 1, 7, 7)
    filled(x[:, -64:])
    filled(weight[-64:], 1)
    norm = BatchNorm(sparse(c, dtype=torch.float32), sparse(c), None, None, 1.0)
    launch = conv_depthwise(
        out=out, x=x, weight=weight, batch_norm=norm, geometry=Geometry(padding=(3, 3)), residual=None,
        activation=NONE, rows=1, box_w=1, block_c=64, num_warps=4,
    )  # fmt: skip
    run(launch, -1)
    assert_exact(out[:, -64:, 0, 0], x[:, -64:, 0, 0] * weight[-64:, 0, 3, 3])


@pytest.mark.parametrize("how", ["plain", "flat"])
def test_filters_of_conv_pointer(how: str) -> None:
    k, c = 2**15 + 16, 2**13
    x, out, weight = pixels(1, c, 3, 5), pixels(1, k, 3, 5), sparse(k, 3, 3, c).permute(0, 3, 1, 2)
    filled(x, 1)
    filled(weight[-16:], 1)
    norm = BatchNorm(torch.zeros(k), torch.ones(k), None, None, 0.0)
    launch = conv(out, x, weight, batch_norm=norm, config=LONG)
    run(flat(launch) if how == "flat" else launch, -1)
    assert_exact(out[:, -16:], F.conv2d(x.double(), weight[-16:].double(), padding=1).half())


def test_filters_of_a_shortcut() -> None:
    k, c = 2**15 + 16, 2**16
    x, out, other, weight, one = (
        pixels(1, 16, 1, 5),
        pixels(1, k, 1, 5),
        pixels(1, c, 1, 5),
        filters(k, 16, 1),
        sparse(k, c),
    )
    filled(other, 1)
    filled(one[-16:], 1)
    norm = BatchNorm(torch.zeros(k), torch.ones(k), None, None, 0.0)
    shortcut = Shortcut(other, one[:, :, None, None], norm, (1, 1))
    run(conv(out, x, weight, batch_norm=norm, geometry=Geometry(), shortcut=shortcut, config=LONG), -1)
    assert_exact(out[:, -16:], F.conv2d(other.double(), one[-16:, :, None, None].double()).half())


def test_conv_box() -> None:
    """Boxes of 16 images. Descriptors are the hardware's business; a residual that comes through pointers is not."""
    n = 2**17 + 16
    x, out, weight = pixels(n, 64, 16, 16), pixels(n, 64, 16, 16), filters(64, 64, 3)
    end = filled(x[-16:])
    expected = F.conv2d(end.double(), weight.double(), padding=1) + end.double()
    run(conv(out, x, weight, config=TILE.on((1, 1, 16)), residual=x), -1)
    assert_exact(out[-16:, :, -1, -1], expected[:, :, -1, -1].half())


@pytest.mark.parametrize("strides", [(0, 2**30, 1, 2), (0, 1, 2**29, 4), (0, 1, 4, 2**28), (2**31, 1, 4, 16)], ids=str)
def test_pack(strides: tuple[int, ...]) -> None:
    """Images may have any strides, however large."""
    size = (2, 3, 6, 10)
    span = 1 + sum((edge - 1) * step for edge, step in zip(size, strides, strict=True))
    x = sparse(span, dtype=torch.uint8).as_strided(size, strides)
    for i in range(1 if strides[0] == 0 else 2):
        x[i] = torch.arange(x[0].numel(), dtype=torch.uint8).view(size[1:])
    packed = torch.empty(stem_kernels.packed_shape(2, 6, 10), dtype=torch.float16)
    marks = torch.empty(packed.shape[:2], dtype=torch.int32)
    stem_kernels.pack(out=packed, marks=marks, x=x, mean=None, std=None, block=16, num_warps=4).run()
    n, rows, columns, _ = packed.shape
    image = packed.view(n, rows, columns, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(n, 4, 2 * rows, 2 * columns)
    assert_exact(image[:, :3, 4:10, 4:14], x.half())


def test_pack_of_many_images() -> None:
    n = 2**23 + 1
    x = filled(sparse(1, 3, 2, 2)).expand(n, -1, -1, -1)
    shape = stem_kernels.packed_shape(n, 2, 2)
    packed, marks = sparse(*shape), sparse(*shape[:2], dtype=torch.int32)
    run(stem_kernels.pack(out=packed, marks=marks, x=x, mean=None, std=None, block=16, num_warps=4), -2, -1)
    assert_exact(packed[-1, 2, 2].view(2, 2, 4)[..., :3], x[0].permute(1, 2, 0))


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_counted_in_int32(fits: bool) -> None:
    """Pixels, elements of a row of input or results, and taps of a filter; larger calls run on PyTorch."""
    big = 2**31 - 2**12 if fits else 2**31 - 2**9

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    def norm(weight: Tensor) -> BatchNorm:
        return BatchNorm(*[made(len(weight))] * 4, 1e-5)

    def convolved(x: Tensor, weight: Tensor) -> ConvBnRelu:
        return ConvBnRelu(x, weight, norm(weight), Geometry())

    def stem(x: Tensor, weight: Tensor) -> Stem:
        return Stem(x, weight, norm(weight))

    calls = {
        "pixels": convolved(made(big, 4, 1, 1), made(8, 4, 1, 1)),
        "row": convolved(made(1, big // 16, 1, 16), made(1, big // 16, 1, 1)),
        "row of results": convolved(made(1, 1, 1, 16), made(big // 16, 1, 1, 1)),
        "taps": convolved(made(1, big // 49, 9, 9), made(1, big // 49, 7, 7)),
        "pixels of a stem": stem(made(big // 16, 3, 8, 8), made(64, 3, 7, 7)),
        "row of a stem's results": stem(made(1, 1, 1, 32), made(big // 16, 1, 7, 7)),
        "filters of a stem": stem(made(1, 3, 8, 8), made(big // 147, 3, 7, 7)),
        "rows": Linear(made(big, 2), made(3, 2), None),
        "columns": Linear(made(3, 2), made(big, 2), None),
    }
    reasons = {name: call.fallback_reason(call.result().shape) for name, call in calls.items()}
    if fits:
        del reasons["row of a stem's results"]  # which is within the limit only if its filters are not
        assert set(reasons.values()) == {None}
    else:
        assert [name for name, reason in reasons.items() if "exceed int32" not in (reason or "")] == []


def test_stem() -> None:
    n, size = 2**15 - 8, 64
    x = filled(sparse(3, size, size)).expand(n, -1, -1, -1)
    weight = filled(sparse(300, 7, 7, 3).permute(0, 3, 1, 2), 1)
    norm = BatchNorm(torch.zeros(300), torch.ones(300), None, None, 0.0)
    shape = stem_kernels.packed_shape(n, size, size)
    packed, marks, out = sparse(*shape), sparse(*shape[:2], dtype=torch.int32), pixels(n, 300, 16, 16)
    assert out.numel() > 2**31
    pack = stem_kernels.pack(out=packed, marks=marks, x=x, mean=None, std=None, block=128, num_warps=4)
    run(pack, *range(-shape[1], 0))
    launch = stem_kernels.stem(
        out=out, packed=packed, marks=marks, weight=weight, batch_norm=norm, block_q=16, block_k=64, strip=4,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    run(launch, -1)
    expected = F.max_pool2d(F.conv2d(x[-1:].double(), weight.double(), stride=2, padding=3).relu(), 3, 2, 1)
    assert_exact(out[-1:, 256:, -4:, -2:], expected[:, 256:, -4:, -2:].half())
