"""Every kernel, bit for bit: on exact data `torch.equal` with fp64 rounded once, and the special values of IEEE 754.

On a GPU the ResNet layers run in full size. In the interpreter the same layers, with the same channels, filters and
configurations, get images just large enough for several ragged tiles, and of a large grid only some programs run.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import random_cases
import sums
import torch
import torch.nn.functional as F
from calls import small as small_call
from calls import through_the_dispatcher, with_tensors
from exact import (
    DTYPES,
    LAYOUTS,
    assert_exact,
    channels_last,
    conv_call,
    conv_reference,
    depthwise_call,
    depthwise_tiled,
    dtype_id,
    generator,
    grouped_call,
    in_turn,
    integers,
    offset_by_one,
    plan,
    rounded,
    run,
    run_conv,
)
from layers import Layer, layers, small, steps, tiles_written
from torch import Tensor

from resnet_triton import config, ops
from resnet_triton.config import ConvConfig, ConvShape, is_legal, supports_descriptors
from resnet_triton.config import tiles as grid_size
from resnet_triton.config.device import facts
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.conv_depthwise import conv_depthwise
from resnet_triton.kernels.values import ACTIVATIONS, groups_at_once
from resnet_triton.ops import NONE, RELU, Activation, BatchNorm, ConvBnRelu, Geometry, dispatch, reference
from resnet_triton.ops.dispatch import Modes

INF, NAN = float("inf"), float("nan")
PATHS = {
    "pointer": ConvConfig(32, 32, 16, 4, 2),
    "descriptor": ConvConfig(32, 32, 16, 4, 2, box=(2, 4, 4), swap=True),
    "descriptor, one row": ConvConfig(32, 32, 16, 4, 2, box=(1, 8, 4), swap=True),
    "descriptor, one pixel": ConvConfig(32, 32, 16, 4, 2, box=(1, 1, 32)),
    "descriptor, one image": ConvConfig(32, 32, 16, 4, 2, box=(4, 8, 1), swap=True),
}
BOTH_PATHS = pytest.mark.parametrize("path", ["pointer", "descriptor"])
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
# NumPy, which computes in the interpreter, warns of what these tests are about.
SPECIAL_VALUES = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# --- ResNet-18's convolutions ----------------------------------------------------------------------------------------


@functools.cache
def cases() -> list[Layer]:
    """At eleven batch sizes, with descriptors (sm_90) and without (sm_80); `test_hopper_conv.py` has those in Gluon."""
    return layers((90, 80), (1, 8, 32, 128, 256, 2, 3, 7, 33, 64, 129), every_dtype=torch.cuda.is_available())


def is_soon_done(layer: Layer) -> bool:
    """At three batch sizes, and not the longest sums of the smallest tiles: fewer channels have these tiles, too."""
    return layer.shape.n in (1, 32, 256) and (layer.chosen.block_c != 16 or layer.shape.c < 256)


@pytest.mark.parametrize(
    "layer",
    [pytest.param(x, id=str(x), marks=() if is_soon_done(x) else pytest.mark.slow) for x in cases()],
)
def test_resnet18_layer(device: torch.device, layer: Layer) -> None:
    shape, chosen = layer.shape, layer.chosen
    whole = device.type == "cuda"
    if whole and not is_legal(chosen, shape, facts(device)):
        pytest.skip(f"not legal on {facts(device).name}")
    shape = shape if whole else small(shape, chosen)
    programs = None
    grid = grid_size(chosen, shape)
    affordable = max(48 // steps(shape, chosen), 1)
    if not whole and affordable < grid:
        programs = random.Random(str(layer)).sample(range(grid), affordable)
    call = conv_call(generator(device, 0), shape)
    with mock.patch.object(ops.conv, "conv_precision", return_value=shape.precision):
        out = run_conv(call, chosen, programs)
    expected = rounded(conv_reference(call), call.x.dtype)
    if programs is None:
        assert_exact(out, expected)
        return
    written = ~out.isnan()
    assert_exact(out[written], expected[written])
    assert tiles_written(written, chosen) == len(programs)


def test_layers_cover_what_they_claim() -> None:
    found = cases()
    assert {layer.chosen.kernel for layer in found} == {"conv_pointer", "conv_box"}
    assert {(s.c, s.k, s.r, s.stride[0], s.residual, s.shortcut_c) for _, s, *_ in found} == {
        (3, 64, 7, 2, False, 0),
        *((c, c, 3, 1, residual, 0) for c in (64, 128, 256, 512) for residual in (False, True)),
        *((c // 2, c, 3, 2, False, 0) for c in (128, 256, 512)),
        *((c, c, 3, 1, False, c // 2) for c in (128, 256, 512)),
    }


# --- convolution: every option --------------------------------------------------------------------------------------

EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {"activation": NONE},
    "relu": {},
    "residual": {"residual": True, "activation": NONE},
    "residual, relu": {"residual": True},
    "shortcut": {"shortcut_c": 24, "shortcut_stride": (2, 2), "activation": NONE},
    "shortcut, relu": {"shortcut_c": 40, "shortcut_stride": (1, 1)},
    "residual, relu6": {"residual": True, "activation": Activation("relu6")},
    "not affine": {"affine": False, "activation": Activation("leaky_relu", 0.25)},
    "shortcut not affine": {"shortcut_c": 16, "short_affine": False},
    "only shortcut affine": {"shortcut_c": 16, "affine": False},
}


@pytest.mark.parametrize(
    ("epilogue", "path", "dtype"), in_turn(EPILOGUES, ["pointer", "descriptor, one row", "descriptor, one pixel"])
)
def test_conv_epilogue(device: torch.device, path: str, epilogue: str, dtype: torch.dtype) -> None:
    options = EPILOGUES[epilogue]
    geometry = {name: options[name] for name in ("residual", "shortcut_c", "shortcut_stride") if name in options}
    others = {name: value for name, value in options.items() if name not in geometry}
    shape = ConvShape(5, 24, 2, 9, 40, dtype=dtype_id(dtype), **geometry)
    call = conv_call(generator(device, 1), shape, **others)
    assert_exact(run_conv(call, PATHS[path]), rounded(conv_reference(call), dtype))


@ALL_DTYPES
@BOTH_PATHS
def test_conv_batch_norm_tensors(device: torch.device, path: str, dtype: torch.dtype) -> None:
    """Statistics and affine parameters of every dtype, with gaps in their memory."""
    shape = ConvShape(2, 16, 3, 5, 24, dtype=dtype_id(dtype), shortcut_c=8)
    for bn_dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        call = conv_call(generator(device, 2), shape, bn_dtype=bn_dtype)
        call = with_tensors(call, lambda t: t[:, None].expand(-1, 2).clone()[:, 1] if t.dim() == 1 else t)
        assert not any(t.is_contiguous() for t in call.schema.tensors(call) if t.dim() == 1)
        assert_exact(run_conv(call, PATHS[path]), rounded(conv_reference(call), dtype), bn_dtype)


@pytest.mark.parametrize("width", [7, 8])
def test_shortcut_of_odd_width(device: torch.device, width: int) -> None:
    """An odd number of columns has no view that splits them by parity: the last column would read as zero."""
    shape = ConvShape(1, 16, 4, 4, 16, 3, 3, padding=(1, 1), shortcut_c=16, shortcut_stride=(2, 2))
    call = conv_call(generator(device, 3), shape, short_size=(7, width))
    assert_exact(run(call), rounded(conv_reference(call), torch.float16))


@pytest.mark.parametrize("size", [(1, 3), (2, 3), (3, 2)], ids=str)
def test_filters_that_are_not_square(device: torch.device, size: tuple[int, int]) -> None:
    """R * S is neither R * R nor S * S, and a slab of channels is no tile of filters."""
    shape = ConvShape(1, 40, 5, 6, 24, *size, padding=(1, 1))
    call = conv_call(generator(device, 0), shape)
    chosen = ConvConfig(16, 32, 16, 4, 2)
    assert_exact(run_conv(call, chosen), rounded(conv_reference(call), torch.float16))


def test_shortcut_of_one_channel(device: torch.device) -> None:
    """One filter for its only channel is no depthwise convolution, whose kernel takes no shortcut."""
    call = conv_call(generator(device, 0), ConvShape(2, 1, 4, 5, 1, 3, 3, padding=(1, 1), shortcut_c=8))
    assert_exact(run(call), rounded(conv_reference(call), torch.float16))


def test_shortcut_of_two_strides(device: torch.device) -> None:
    shape = ConvShape(2, 16, 4, 5, 16, 3, 3, padding=(1, 1), shortcut_c=8, shortcut_stride=(3, 2))
    call = conv_call(generator(device, 4), shape)
    assert_exact(run_conv(call, PATHS["pointer"]), rounded(conv_reference(call), torch.float16))


@pytest.mark.parametrize("seed", range(0, 100, 5))  # `test_fuzz.py` draws others
def test_random_conv(device: torch.device, seed: int) -> None:
    random_cases.check_conv(random.Random(seed), device, DTYPES[seed % 3])


def test_random_cases_are_diverse() -> None:
    cases = [random_cases.conv(random.Random(seed), torch.device("cpu"), DTYPES[seed % 3]) for seed in range(300)]
    shapes = [call.shape for call, _ in cases]
    assert sum(chosen.kernel == "conv_box" for _, chosen in cases) > 60
    assert sum(chosen.split_k > 1 for _, chosen in cases) > 10
    assert sum(s.residual for s in shapes) > 50
    assert sum(s.shortcut_c > 0 for s in shapes) > 50
    assert sum(s.r != s.s for s in shapes) > 50
    assert sum(s.dilation != (1, 1) for s in shapes) > 50
    assert sum(call.x.data_ptr() % 16 != 0 for call, _ in cases) > 10
    assert {s.dtype for s in shapes} == set(map(dtype_id, DTYPES))


# --- the other kernels -----------------------------------------------------------------------------------------------


DEPTHWISE: dict[str, Any] = {
    # images, filter, stride, padding, dilation, residual, rows and channels of a tile
    "3x3": ((2, 72, 8, 13), (3, 3), Geometry(padding=(1, 1)), True, 7, 64),
    "5x5, stride 2": ((1, 20, 19, 37), (5, 5), Geometry((2, 2), (2, 2)), False, 4, 16),
    "7x7": ((2, 33, 9, 10), (7, 7), Geometry(padding=(3, 3)), True, 4, 32),
    "not square": ((1, 129, 17, 5), (3, 7), Geometry((3, 1), (1, 3), (2, 1)), False, 4, 128),
    "a column of taps": ((1, 16, 9, 3), (5, 1), Geometry(padding=(2, 0)), False, 2, 16),
    "one pixel": ((5, 3, 1, 1), (3, 3), Geometry(padding=(1, 1)), False, 1, 32),
}


@pytest.mark.parametrize(
    ("depthwise", "layout", "dtype"), in_turn(DEPTHWISE, ["channels_last", "slice", "offset by one"])
)
def test_depthwise(device: torch.device, depthwise: str, layout: str, dtype: torch.dtype) -> None:
    size, filter, geometry, residual, *tile = DEPTHWISE[depthwise]
    call = depthwise_call(
        generator(device, 0), size, filter, geometry, dtype, residual=residual, layout=LAYOUTS[layout]
    )
    with depthwise_tiled(*tile):
        assert_exact(run(call, kernel="conv_depthwise_kernel"), rounded(conv_reference(call), dtype))


def depthwise_tile(n: int, c: int, edge: int, r: int = 3, arch: int = 90, **others: Any) -> tuple[int, int, int]:
    shape = ConvShape(n, c, edge, edge, c, r, r, padding=(r // 2, r // 2), **others)
    return config.depthwise_tile(shape, KNOWN[arch])


def test_tiles_of_depthwise_convolutions() -> None:
    """Rows, columns and channels: few images are cut into more programs, and many into those that do most at once."""
    assert depthwise_tile(256, 960, 7) == (7, 4, 64)
    assert depthwise_tile(1, 960, 7) == (1, 4, 64), "210 programs for 132 multiprocessors, else 30"
    assert depthwise_tile(8, 144, 112) == (7, 8, 32), "64 bytes of channels, though 16 would divide them"
    assert depthwise_tile(8, 144, 112, dtype="float32") == (7, 16, 16)
    assert depthwise_tile(256, 16, 112) == (7, 16, 16), "there are no more"
    assert depthwise_tile(1, 144, 56, arch=90) != depthwise_tile(1, 144, 56, arch=80), "of other multiprocessors"
    assert depthwise_tile(0, 144, 56) == (7, 8, 32), "an empty batch"


def test_depthwise_tiles_hold_no_more_rows_than_there_are_registers_for() -> None:
    assert [depthwise_tile(256, 64, 56, r)[0] for r in (7, 13, 15, 31)] == [7, 7, 4, 4]
    assert [depthwise_tile(256, 64, 56, 13, stride=(stride, 1))[0] for stride in (1, 2, 3)] == [7, 4, 2]
    assert [depthwise_tile(256, 64, 56, 3, dilation=(d, 1))[0] for d in (1, 2, 12)] == [7, 7, 4]


@pytest.mark.parametrize(("c", "edge", "r"), [(144, 56, 3), (960, 7, 3), (240, 28, 5), (384, 14, 7)])
def test_batch_sizes_compile_few_depthwise_kernels(c: int, edge: int, r: int) -> None:
    for arch in KNOWN:
        assert len({depthwise_tile(n, c, edge, r, arch) for n in range(1, 257)}) <= 4


def test_a_depthwise_sum_does_not_depend_on_the_tile() -> None:
    """So images give the same bits in every batch."""
    torch.manual_seed(0)
    x, weight, norm = channels_last(torch.randn(1, 40, 9, 10)), torch.randn(40, 1, 3, 5), torch.rand(4, 40)
    found = []
    for rows, box_w, block_c in ((7, 2, 128), (4, 4, 64), (2, 8, 32), (1, 16, 16)):
        out = torch.empty_like(x)
        conv_depthwise(
            out=out, x=x, weight=weight, batch_norm=BatchNorm(*norm, 1e-5), residual=x, activation=Activation("silu"),
            geometry=Geometry(padding=(1, 2), groups=40), rows=rows, box_w=box_w, block_c=block_c, num_warps=1,
        ).run()  # fmt: skip
        found.append(out)
    assert all(torch.equal(out, found[0]) for out in found)


def same_padding(groups: int, filter: int = 3) -> Geometry:
    return Geometry(padding=(filter // 2, filter // 2), groups=groups)


GROUPED: dict[str, Any] = {
    # images, filters and their size, geometry, residual
    "ResNeXt 4d": ((2, 128, 7, 10), (128, 3, 3), same_padding(32), True),
    "ResNeXt 8d, stride 2": ((1, 256, 9, 7), (256, 3, 3), Geometry((2, 2), (1, 1), groups=32), False),
    "RegNet 8, ragged": ((1, 56, 5, 6), (56, 3, 3), same_padding(7), True),
    "RegNet 16": ((1, 48, 5, 6), (48, 3, 3), same_padding(3), False),
    "RegNet 24": ((1, 48, 5, 6), (48, 3, 3), same_padding(2), True),
    "RegNet 48": ((1, 96, 4, 5), (96, 3, 3), same_padding(2), False),
    "RegNet 56": ((1, 168, 4, 5), (168, 3, 3), same_padding(3), False),
    "RegNet 64": ((3, 128, 7, 7), (128, 3, 3), Geometry((2, 2), (1, 1), groups=2), True),
    "RegNet 112": ((1, 224, 3, 4), (224, 3, 3), same_padding(2), False),
    "1x1": ((2, 60, 4, 5), (90, 1, 1), same_padding(3, 1), True),
    "RegNet 232": ((1, 464, 2, 3), (464, 3, 3), same_padding(2), True),
    "AlexNet": ((1, 96, 6, 5), (256, 5, 5), same_padding(2, 5), False),
    "more channels than filters": ((1, 64, 5, 4), (24, 3, 3), same_padding(4), False),
    "many channels, one filter": ((1, 96, 4, 5), (3, 3, 3), same_padding(3), True),
    "odd channels": ((2, 27, 6, 5), (45, 3, 2), Geometry((2, 1), (1, 0), (1, 2), 9), True),
    "two filters a channel": ((1, 40, 5, 9), (80, 3, 3), same_padding(40), False),
    "two filters an odd channel": ((2, 13, 5, 6), (26, 3, 3), same_padding(13), True),
    "one channel, wide": ((1, 3, 5, 6), (60, 3, 3), Geometry(dilation=(2, 1), padding=(2, 1), groups=3), False),
    "more rows than a depthwise kernel has": ((1, 7, 5, 6), (7, 32, 1), Geometry(padding=(16, 0), groups=7), True),
}


@pytest.mark.parametrize(("groups", "layout", "dtype"), in_turn(GROUPED, ["channels_last", "offset by one"]))
def test_grouped(device: torch.device, groups: str, layout: str, dtype: torch.dtype) -> None:
    size, filters, geometry, residual = GROUPED[groups]
    call = grouped_call(generator(device, 0), size, filters, geometry, dtype, residual=residual, layout=LAYOUTS[layout])
    assert_exact(run(call, kernel="conv_pointer_kernel"), rounded(conv_reference(call), dtype))


def test_tiles_of_grouped_convolutions() -> None:
    """Legal everywhere, alike for all batches; several groups only where these are narrower than a product."""
    for size, filters, geometry, residual in GROUPED.values():
        for dtype, precision in (("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee")):
            n, c, h, w = size
            shape = ConvShape(n, c, h, w, *filters, *geometry[:3], dtype, precision, residual)
            chosen, groups = config.grouped_tile(shape, geometry.groups), geometry.groups
            assert chosen == config.grouped_tile(replace(shape, n=256), groups)
            assert all(is_legal(chosen, shape, known) for known in KNOWN.values())
            together = groups_at_once(c, filters[0], groups, chosen.block_k)
            assert together == 1 or min(c, filters[0]) <= 16 * groups
            assert together * filters[0] // groups <= chosen.block_k or together == 1
    assert [groups_at_once(c, k, 32, 32) for c, k in ((128, 128), (96, 96), (32, 64), (1024, 1024))] == [8, 8, 16, 1]
    assert groups_at_once(27, 27, 9, 32) == 8, "their 24 channels begin at multiples of 8"
    assert groups_at_once(20, 12, 4, 32) == 4, "they do not, whatever is taken"
    assert groups_at_once(36, 72, 12, 32) == 5, "where results begin does not matter"


POOLS: dict[str, Any] = {
    "ResNet": ((2, 64, 13, 15), (3, 3), (2, 2), (1, 1)),
    "not square": ((3, 5, 7, 4), (2, 3), (1, 2), (0, 1)),
    "whole image": ((1, 65, 5, 5), (5, 5), (5, 5), (0, 0)),
    "1x1": ((2, 1, 1, 3), (1, 1), (3, 1), (0, 0)),
    "over the end": ((2, 5, 8, 2), (3, 3), (2, 2), (0, 0), True),
    "not in the padding": ((1, 5, 8, 7), (3, 2), (3, 2), (1, 1), True),
    "unrolled in part": ((1, 5, 8, 7), (4, 7), (2, 1), (1, 3)),
}


@pytest.mark.parametrize(("pool", "layout", "dtype"), in_turn(POOLS, LAYOUTS))
def test_max_pool(device: torch.device, pool: str, layout: str, dtype: torch.dtype) -> None:
    shape, size, stride, padding, ceil_mode = (*POOLS[pool], False)[:5]
    x = torch.randn(shape, generator=generator(device, 0), device=device) - 2  # a padding of zeros would win
    x = LAYOUTS[layout](x.to(dtype))
    expected = F.max_pool2d(x.double(), size, stride, padding, ceil_mode=ceil_mode).to(dtype)
    assert_exact(run(ops.MaxPool2d(x, size, stride, padding, ceil_mode)), expected)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    in_turn([(2, 512, 7, 7), (3, 65, 9, 11), (1, 3, 1, 1), (5, 40, 2, 41), (1, 20, 27, 23)], LAYOUTS),
)
def test_global_avg_pool(device: torch.device, shape: Any, layout: str, dtype: torch.dtype) -> None:
    g = generator(device, 0)
    n, c, h, w = shape
    deviation = integers(g, 9, n, c, h, w)
    x = integers(g, 50, n, c, 1, 1) + deviation - deviation.flip(2, 3)  # sums to a multiple of the pixels
    x = LAYOUTS[layout](x.to(dtype))
    for modes in (Modes(), Modes(batch_invariant=True)):  # narrow tiles, and wide ones
        assert_exact(run(ops.GlobalAvgPool(x, modes)), rounded(x.double().mean((2, 3), keepdim=True), dtype))


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"), in_turn([(2, 65, 3, 7), (1, 1, 3, 3), (2, 64, 4, 2), (3, 20, 5, 6)], LAYOUTS)
)
def test_add_relu(device: torch.device, shape: Any, layout: str, dtype: torch.dtype) -> None:
    g = generator(device, 0)
    x, other = integers(g, 9, *shape, dtype=dtype), LAYOUTS[layout](integers(g, 9, *shape, dtype=dtype))
    assert_exact(run(ops.AddRelu(x, other)), rounded((x.double() + other.double()).relu(), dtype))


@ALL_DTYPES
@pytest.mark.parametrize("rows", [1, 17, 65, 130])
@pytest.mark.parametrize(("c", "k", "bias"), [(512, 50, True), (3, 65, False), (65, 1, True), (1, 64, False)])
def test_linear(device: torch.device, rows: int, c: int, k: int, bias: bool, dtype: torch.dtype) -> None:
    g = generator(device, 0)
    x, w = integers(g, 3, rows, c, dtype=dtype), integers(g, 2, k, c, dtype=dtype)
    b = integers(g, 9, k, dtype=dtype) if bias else None
    expected = x.double() @ w.double().T + (0 if b is None else b.double())
    assert_exact(run(ops.Linear(x, w, b)), rounded(expected, dtype))


@ALL_DTYPES
def test_linear_layouts(device: torch.device, dtype: torch.dtype) -> None:
    g = generator(device, 0)
    x = integers(g, 3, 40, 2, 6, dtype=dtype).permute(1, 2, 0)[:, 1:]  # (2, 5, 40), columns innermost
    w = integers(g, 2, 40, 26, dtype=dtype).T[::2]
    b = integers(g, 9, 26, dtype=dtype)[::2]
    expected = rounded(x.double() @ w.double().T + b.double(), dtype)
    assert_exact(run(ops.Linear(x, w, b)), expected)
    assert_exact(run(ops.Linear(x[0, 0], w, b)), expected[0, 0])


# --- the operators as they are called --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"), in_turn([(2, 512, 7, 7, 50), (16, 40, 3, 2, 1), (1, 300, 9, 8, 17)], LAYOUTS)
)
def test_avg_pool_linear(device: torch.device, shape: Any, layout: str, dtype: torch.dtype) -> None:
    """Every pixel of a channel the same: means are whole, and so are the products."""
    *size, k = shape
    g = generator(device, 20)
    x = LAYOUTS[layout](integers(g, 3, *size[:2], 1, 1, dtype=dtype).expand(size))
    weight, bias = integers(g, 2, k, size[1], dtype=dtype), integers(g, 4, k, dtype=dtype)
    for b in (bias, None) if layout == "contiguous" else (bias,):
        y = run(ops.AvgPoolLinear(x, weight, b), kernel="avg_pool_linear_kernel")
        expected = x[:, :, 0, 0].double() @ weight.double().T
        assert_exact(y, rounded(expected if b is None else expected + b.double(), dtype))


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)], ids=str)
def test_a_mean_is_rounded_before_the_linear_layer(device: torch.device, dtype: torch.dtype, unit: float) -> None:
    """As it is between two launches: 1 and a quarter of a unit is 1."""
    x = torch.ones(1, 2, 2, 2, dtype=dtype, device=device)
    x[0, 0, 0, 0] += unit
    weight = torch.tensor([[1024.0, -1024.0]], dtype=dtype, device=device)
    assert_exact(run(ops.AvgPoolLinear(x, weight, None)), x.new_zeros(1, 1))


def test_many_images_take_two_launches(device: torch.device) -> None:
    g = generator(device, 21)
    x, weight = integers(g, 3, 17, 16, 2, 2), integers(g, 2, 5, 16)
    call = ops.AvgPoolLinear(x, weight)
    launches = plan(call)
    assert [launch.kernel.__name__ for launch in launches] == [
        "global_avg_pool_kernel",
        "linear_kernel",
    ]
    assert_exact(run(call), rounded(x.double().mean((2, 3)) @ weight.double().T, x.dtype))


@pytest.mark.parametrize(("size", "extra", "dtype"), in_turn([(8, 8), (6, 10), (7, 12)], ["residual", "shortcut"]))
def test_one_image_at_stride_2(device: torch.device, size: tuple[int, int], extra: str, dtype: torch.dtype) -> None:
    """Boxes of several rows where rows and columns are split by parity; an odd number of rows has no such view."""
    shape = ConvShape(
        1, 24, *size, 40, 3, 3, (2, 2), (1, 1), dtype=dtype_id(dtype), residual=extra == "residual", precision="tf32",
        shortcut_c=16 if extra == "shortcut" else 0, shortcut_h=size[0], shortcut_w=size[1], shortcut_stride=(2, 2),
    )  # fmt: skip
    assert not is_legal(ConvConfig(16, 32, 16, 4, 2, (2, 2, 4), swap=True), shape, KNOWN[90]), "rows of several images"
    for box in ((4, 4, 1), (2, 8, 1), (1, 16, 1)):
        chosen = ConvConfig(16, 32, 32 if box[1] == 16 else 16, 4, 2).on(
            box
        )  # neither side of a box as long as another
        assert is_legal(chosen, shape, KNOWN[90]) == (size[0] % 2 == 0 or box[0] == 1)
        if is_legal(chosen, shape, KNOWN[90]):
            call = conv_call(generator(device, 3), shape, short_size=size)
            assert_exact(run_conv(call, chosen), rounded(conv_reference(call), dtype), box)


BOXES = [(h, w, 16 // (h * w)) for h in (1, 2, 4, 8, 16) for w in (1, 2, 4, 8, 16) if h * w <= 16]


@pytest.mark.parametrize(("size", "n"), [((4, 6), 1), ((5, 4), 1), ((5, 4), 3)], ids=str)
@pytest.mark.parametrize("kind", ["1x1", "3x3", "1x1/2", "3x3/2", "shortcut", "shortcut/2", "3x3/2, shortcut/2"])
def test_every_legal_box_is_exact(device: torch.device, kind: str, size: tuple[int, int], n: int) -> None:
    """Legal is what computes right: batch sizes, strides and odd sizes decide which views exist."""
    r, stride = (3 if "3x3" in kind else 1), (2 if kind[:5] in ("1x1/2", "3x3/2") else 1)
    shape = ConvShape(n, 16, *size, 16, r, r, (stride, stride), (r // 2, r // 2))
    if "shortcut" in kind:
        step = 2 if kind.endswith("shortcut/2") else 1
        for odd in range(step):  # at stride 2 a shortcut's last row may be one that is not read
            h, w = shape.p * step - odd * (step - 1), shape.q * step
            shape = replace(shape, shortcut_c=8, shortcut_h=h, shortcut_w=w, shortcut_stride=(step, step))
            _every_box(device, shape, (h, w))
    else:
        _every_box(device, shape, None)


def _every_box(device: torch.device, shape: ConvShape, short_size: tuple[int, int] | None) -> None:
    call = conv_call(generator(device, shape.n), shape, short_size=short_size)
    expected = rounded(conv_reference(call), torch.float16)
    assert call.shape == shape
    forms = [[ConvConfig(16, 16, 16, 4, 2, box, swap=swap) for swap in (False, True)] for box in BOXES]
    both = [[c for c in pair if is_legal(c, shape, KNOWN[90])] for pair in forms]
    legal = [pair[(i + shape.h) % len(pair)] for i, pair in enumerate(both) if pair]  # in turns where both are legal
    assert bool(legal) == supports_descriptors(shape)
    for chosen in legal:
        assert_exact(run_conv(call, chosen), expected, (chosen.box, chosen.swap))


@pytest.mark.parametrize("chosen", [
    ConvConfig(16, 32, 16, 4, 2),
    ConvConfig(16, 32, 16, 4, 2, (1, 1, 16)),
    ConvConfig(16, 32, 16, 4, 2, (1, 1, 16), swap=True),
    ConvConfig(16, 16, 32, 4, 2),
    ConvConfig(16, 16, 32, 4, 2, (1, 1, 16)),
], ids=["pointer", "box", "filters first", "pointer, long slabs", "box, long slabs"])  # fmt: skip
def test_many_tiles_of_filters_and_channels(device: torch.device, chosen: ConvConfig) -> None:
    """Three whole tiles of filters, nine slabs of channels: no tile's work is done by another.

    Or six tiles of filters and five slabs, of which the last is short and a tile of filters shorter still.
    """
    shape = ConvShape(17, 136, 1, 2, 96, 3, 3, padding=(1, 1))
    call = conv_call(generator(device, 0), shape)
    assert_exact(run_conv(call, chosen), rounded(conv_reference(call), torch.float16))


EVERY_OPERATOR = pytest.mark.parametrize("name", list(ops.OPERATORS))


@EVERY_OPERATOR
def test_operator_launches_its_kernel_once(device: torch.device, name: str) -> None:
    call = small_call(name, device, torch.float16)
    for called in (call.run, lambda: through_the_dispatcher(call)):
        before = dispatch.calls.copy()
        y = called()
        assert dispatch.calls - before == {(name, "triton"): 1}
        assert_exact(y, run(call))


@EVERY_OPERATOR
def test_operator_sees_the_sign_of_a_negative_view(device: torch.device, name: str) -> None:
    call = small_call(name, device, torch.float16)
    expected = run(replace(call, x=-call.x))
    seen = replace(call, x=torch._neg_view(call.x))
    assert_exact(seen.run(), expected)
    assert_exact(through_the_dispatcher(seen), expected)


@ALL_DTYPES
@BOTH_PATHS
def test_unaligned_tensors_take_the_pointer_path(device: torch.device, path: str, dtype: torch.dtype) -> None:
    shape = ConvShape(4, 16, 3, 5, 16, 3, 3, padding=(1, 1), dtype=dtype_id(dtype), residual=True)
    for moved in ("x", "weight", "residual", None) if path == "pointer" else [None]:
        call = conv_call(generator(device, 0), shape)
        if moved is not None:
            call = replace(call, **{moved: offset_by_one(getattr(call, moved))})
        descriptors = moved is None and facts(device).has_descriptors
        kernel = "conv_box_kernel" if descriptors else "conv_pointer_kernel"
        with mock.patch.object(ops.conv, "conv_precision", return_value="tf32"):
            out = run(call, kernel=kernel)
        assert_exact(out, rounded(conv_reference(call), dtype), moved)


# --- special values --------------------------------------------------------------------------------------------------


def same(y: Tensor, expected: Tensor) -> bool:
    """Equal values, NaN where NaN is expected, and signs of zero alike."""
    y, expected = y.cpu(), expected.cpu()
    nan = expected.isnan()
    numbers = torch.equal(y[~nan], expected[~nan]) and torch.equal(y.signbit()[~nan], expected.signbit()[~nan])
    return torch.equal(y.isnan(), nan) and numbers


def conv(x: Tensor, w: Tensor, path: str, **changes: Any) -> Tensor:
    """A convolution with 3x3 or 1x1 filters, same padding, and a batch norm that changes nothing unless told to."""
    k, r = w.shape[0], w.shape[2]
    norm = BatchNorm(x.new_zeros(k), x.new_ones(k), None, None, 0.0)
    call = ConvBnRelu(x, channels_last(w), norm, Geometry(padding=(r // 2, r // 2)), activation=NONE)
    return run_conv(replace(call, **changes), PATHS[path])


@ALL_DTYPES
@SPECIAL_VALUES
def test_relu_of_special_values(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.tensor([NAN, INF, -INF, -0.0, 0.0, -1.0, 1.0], dtype=dtype, device=device).reshape(1, 1, 1, -1)
    y = run(ops.AddRelu(x, torch.full_like(x, -0.0))) + 0.0  # zero may have either sign
    assert same(y.flatten(), torch.tensor([NAN, INF, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=dtype))


@ALL_DTYPES
@BOTH_PATHS
@SPECIAL_VALUES
def test_conv_relu_of_special_values(device: torch.device, path: str, dtype: torch.dtype) -> None:
    values = torch.tensor([NAN, INF, -INF, -1.0, 1.0], dtype=dtype, device=device)
    residual = torch.zeros(1, 8, 1, 5, dtype=dtype, device=device) + values
    x, w = torch.zeros(1, 8, 1, 5, dtype=dtype, device=device), torch.ones(8, 8, 1, 1, dtype=dtype, device=device)
    y = conv(x, w, path, residual=residual, activation=RELU)
    assert same(y[0, 3, 0], torch.tensor([NAN, INF, 0.0, 0.0, 1.0], dtype=dtype))


@ALL_DTYPES
@SPECIAL_VALUES
def test_activations(device: torch.device, dtype: torch.dtype) -> None:
    """Of numbers up to overflow, -0.0, NaN and infinities: within 2**-21 of what goes in, and a rounding."""
    z = torch.cat([torch.linspace(-12, 12, 1016), torch.tensor([NAN, INF, -INF, -0.0, 3e-41, 6e4, -6e4, -100.0])])
    residual = channels_last(z.to(device, dtype).reshape(1, 8, 8, 16))
    x, w = torch.zeros_like(residual), torch.zeros(8, 8, 1, 1, dtype=dtype, device=device)
    zeros, ones = x.new_zeros(8), x.new_ones(8)
    norm = BatchNorm(-zeros, ones, -ones, -zeros, 0.0)  # of a sum of 0.0 it makes -0.0
    for activation in (Activation(name, -0.1) for name in ACTIVATIONS):
        y = conv(x, w, "pointer", batch_norm=norm, residual=residual, activation=activation)
        expected = reference.activate(residual.double(), *activation)
        finite = expected.isfinite()
        assert same(y[~finite], expected[~finite].to(dtype)), activation
        of_either_sign = activation.activation in ("relu", "relu6")  # a maximum may take either zero
        signed = finite & (y != 0) if of_either_sign else finite
        assert torch.equal(y.signbit()[signed], expected.signbit()[signed]), activation
        error = (y.double() - expected)[finite].abs() - sums.half_unit(y, expected)[finite]
        assert (error <= 2.0**-21 * residual.double().abs()[finite]).all(), (activation, error.max())


@ALL_DTYPES
@SPECIAL_VALUES
def test_max_pool_of_special_values(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 6, 6), -INF, device=device, dtype=dtype)
    x[0, 0, 0, 0] = NAN  # seen by the first window only
    x[0, 0, 5, 5] = NAN  # the last value of the last window
    x[0, 0, 3, 0] = INF
    x[0, 0, 0, 4] = -3.0
    expected = torch.tensor([[NAN, -INF, -3.0], [INF, -INF, -INF], [INF, -INF, NAN]], dtype=dtype)
    assert same(run(ops.MaxPool2d(x, (3, 3), (2, 2), (1, 1)))[0, 0], expected)
    x[0, 0, 1, 1] = 5.0  # after the NaN, and the last value of its window
    assert run(ops.MaxPool2d(x, (3, 3), (2, 2), (1, 1)))[0, 0, 0, 0].isnan()
    zeros = torch.tensor([-0.0, -0.0, 0.0, -0.0], dtype=dtype, device=device).reshape(1, 1, 1, 4)
    y = run(ops.MaxPool2d(zeros, (1, 2), (1, 2), (0, 0)))
    assert same(y[..., 0], zeros[..., 0])
    assert y[..., 1] == 0, "of either sign: a GPU's is positive, NumPy's differs by machine"


@SPECIAL_VALUES
def test_avg_pool_of_special_values(device: torch.device) -> None:
    x = torch.full((1, 5, 7, 7), 65504.0, dtype=torch.float16, device=device)
    x[0, 1, 2, 3] = INF
    x[0, 2, 4, 0], x[0, 2, 4, 1] = INF, -INF
    x[0, 3, 6, 6] = NAN
    x[0, 4] = -0.0
    y = run(ops.GlobalAvgPool(x)).flatten()
    assert same(y.abs(), torch.tensor([65504.0, INF, NAN, NAN, 0.0], dtype=torch.float16))


@ALL_DTYPES
@BOTH_PATHS
@SPECIAL_VALUES
@pytest.mark.parametrize("weight", [NAN, INF], ids=str)
def test_no_tap_is_skipped_in_the_padding(device: torch.device, path: str, dtype: torch.dtype, weight: float) -> None:
    x, w = torch.ones(2, 16, 4, 5, dtype=dtype, device=device), torch.ones(8, 16, 3, 3, dtype=dtype, device=device)
    w[3, 7, 0, 2] = weight  # reads one row up and one column to the right
    y = conv(channels_last(x), w, path)[:, 3]
    expected = torch.full((2, 4, 5), weight, dtype=dtype)
    expected[:, 0, :] = NAN
    expected[:, :, 4] = NAN
    assert same(y, expected)


@ALL_DTYPES
@SPECIAL_VALUES
def test_depthwise_of_special_values(device: torch.device, dtype: torch.dtype) -> None:
    """No tap is skipped in the padding, and no channel or window reads its neighbours."""
    x = torch.ones(2, 20, 4, 5, dtype=dtype, device=device)
    w = torch.ones(20, 1, 3, 3, dtype=dtype, device=device)
    expected = F.conv2d(x.double(), w.double(), padding=1, groups=20).to(dtype)
    w[3, 0, 0, 2] = INF  # reads one row up and one column to the right
    expected[:, 3] = INF
    expected[:, 3, 0, :] = expected[:, 3, :, 4] = NAN
    x[1, 7, 1, 4] = INF
    expected[1, 7, 0:3, 3:5] = INF
    x[0, 19, 3, 0] = NAN  # ReLU keeps it
    expected[0, 19, 2:4, 0:2] = NAN
    norm = BatchNorm(x.new_zeros(20), x.new_ones(20), None, None, 0.0)
    call = ConvBnRelu(channels_last(x), w, norm, Geometry(padding=(1, 1), groups=20))
    with depthwise_tiled(2, 32):
        assert same(run(call), expected)


@SPECIAL_VALUES
@pytest.mark.parametrize(("size", "dtype"), in_turn([(24, 24, 6), (9, 18, 9), (32, 32, 2), (9, 15, 3)]))
def test_groups_read_no_neighbours(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """What is not finite shows in its own group and window alone, where several groups share a product, too."""
    g, (c, k, groups) = generator(device, 0), size
    x, w = integers(g, 3, 2, c, 4, 5, dtype=dtype), integers(g, 1, k, c // groups, 2, 3, dtype=dtype)
    x[0, 1, 0, 1], x[1, c - 1, 3, 4], x[1, 0, 2, 0] = INF, NAN, -INF
    w[k // 2, 0, 0, 2] = INF  # reads one row up and one column to the right
    norm, geometry = BatchNorm(x.new_zeros(k), x.new_ones(k), None, None, 0.0), Geometry((1, 1), (1, 1), (2, 1), groups)
    y = run(ConvBnRelu(channels_last(x), channels_last(w), norm, geometry, activation=NONE))
    parts = zip(x.double().chunk(groups, 1), w.double().chunk(groups), strict=True)
    expected = torch.cat([F.conv2d(*part, None, *geometry[:3]) for part in parts], 1)
    assert expected.isnan().sum() < expected.numel() / 4
    assert same(y, expected.to(dtype))


@ALL_DTYPES
@BOTH_PATHS
@SPECIAL_VALUES
def test_infinity_times_zero(device: torch.device, path: str, dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 16, 3, 3, dtype=dtype, device=device), torch.ones(8, 16, 1, 1, dtype=dtype, device=device)
    x[0, 5, 1, 1] = INF
    w[2, 5] = 0.0
    y = conv(x, w, path)[0, :, 1, 1]
    assert same(y, torch.tensor([INF, INF, NAN, INF, INF, INF, INF, INF], dtype=dtype))
    z = run(ops.Linear(x[:, :, 1, 1], w[:, :, 0, 0]))
    assert same(z[0], y)


@ALL_DTYPES
@BOTH_PATHS
@SPECIAL_VALUES
def test_tails_of_tiles_read_no_neighbours(device: torch.device, path: str, dtype: torch.dtype) -> None:
    """24 channels in tiles of 16, 40 filters in tiles of 32: an infinite neighbour, times zero, would give NaN."""
    x, w = torch.ones(1, 24, 3, 3, dtype=dtype, device=device), torch.ones(40, 24, 3, 3, dtype=dtype, device=device)
    w[:, :8, 1, 1] = INF  # follows the last channels of the tap before
    w[39] = 1.0
    y = conv(channels_last(x), w, path)[0]
    assert_exact(y[:39], torch.full_like(y[:39], INF))
    assert_exact(y[39], 24 * F.conv2d(x[:1, :1], torch.ones_like(w[:1, :1]), padding=1)[0, 0])


@ALL_DTYPES
@SPECIAL_VALUES
@pytest.mark.parametrize(("path", "c"), [("pointer", 3), ("pointer", 24), ("descriptor", 24)])
def test_windows_read_no_neighbours(device: torch.device, path: str, c: int, dtype: torch.dtype) -> None:
    """An infinite pixel makes those outputs infinite whose window holds it, and turns no other into NaN."""
    g = generator(device, 0)
    x, w = integers(g, 3, 2, c, 6, 7, dtype=dtype), torch.ones(8, c, 3, 3, dtype=dtype, device=device)
    expected = F.conv2d(x.double(), w.double(), padding=1).to(dtype)
    x[0, 1, 3, 4] = INF
    expected[0, :, 2:5, 3:6] = INF
    assert_exact(conv(channels_last(x), w, path), expected)


@pytest.mark.parametrize("far", [31, 2**29])
def test_taps_far_from_the_image(device: torch.device, far: int) -> None:
    """Of three rows of taps the outer ones, also from pixels that a tile has beyond the last."""
    g = generator(device, 0)
    x, w = channels_last(integers(g, 3, 1, 16, 4, 5)), channels_last(integers(g, 2, 16, 16, 3, 1))
    y = conv(x, w, "pointer", geometry=Geometry((1, 1), (far, 0), (far, 1)))
    assert_exact(y, F.conv2d(x.double(), w[:, :, 1:2].double()).float())


@BOTH_PATHS
@SPECIAL_VALUES
def test_batch_norm_of_special_statistics(device: torch.device, path: str) -> None:
    g = generator(device, 0)
    x, w = integers(g, 3, 2, 8, 3, 3), integers(g, 2, 8, 8, 3, 3)
    var = torch.tensor([0.0, -1.0, INF, NAN, 1e-40, 1.0, 1.0, 1.0], device=device)
    mean = torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, INF, NAN, 3e38], device=device)
    bn_weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0], device=device)
    bn_bias = torch.arange(8.0, device=device)
    y = conv(x, w, path, batch_norm=BatchNorm(mean, var, bn_weight, bn_bias, 0.0))
    for k, value in {0: NAN, 1: NAN, 2: 2.0, 3: NAN, 5: -INF, 6: NAN, 7: 7.0}.items():
        assert same(y[:, k], torch.full_like(y[:, k], value)), (var[k], mean[k])
    expected = F.conv2d(x.double(), w.double(), padding=1)[:, 4] / var[4].double().sqrt() + 4.0
    torch.testing.assert_close(y[:, 4], expected.float(), rtol=1e-6, atol=0.0)
    quarter = BatchNorm(torch.zeros_like(var), torch.zeros_like(var), None, None, 0.25)
    assert same(conv(x, w, path, batch_norm=quarter), 2 * F.conv2d(x, w, padding=1) + 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@BOTH_PATHS
def test_sums_that_leave_the_range_and_come_back(device: torch.device, path: str, dtype: torch.dtype) -> None:
    x, w = torch.full((1, 48, 2, 2), 256.0, dtype=dtype, device=device), torch.zeros(8, 48, 1, 1, device=device)
    w[:, :16], w[:, 16:32], w[:, 47] = 256.0, -256.0, 0.5  # the sum is 2**20, then 0, then 128
    y = conv(x, w.to(dtype), path)
    assert_exact(y, torch.full_like(y, 128.0))
    z = run(ops.Linear(x[:, :, 0, 0], w[:, :, 0, 0].to(dtype)))
    assert_exact(z, torch.full_like(z, 128.0))
