"""Tile choices: legal everywhere, and the same every time."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import plan, pretending

from resnet_triton import resnet18, resnet50
from resnet_triton.config import (
    ConvConfig,
    ConvShape,
    candidates,
    conv_heuristic,
    is_legal,
    linear_heuristic,
    lookup,
    supports_descriptors,
)
from resnet_triton.config.conv import steps, taps, tiles
from resnet_triton.config.heuristic import conv_candidates
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import cdiv
from resnet_triton.ops import GlobalAvgPool, MaxPool2d, gluon
from resnet_triton.ops.dispatch import Modes
from resnet_triton.ops.trace import Call, trace
from resnet_triton.tuner.trial import abstract_call

BATCHES = (1, 2, 7, 8, 16, 31, 32, 64, 100, 129, 256)
NUMBERS = [("float16", "ieee"), ("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "ieee")]
ALL_NUMBERS = pytest.mark.parametrize(("dtype", "precision"), NUMBERS, ids=lambda value: value)
ALL_DEVICES = pytest.mark.parametrize("arch", KNOWN, ids=lambda arch: f"sm_{arch}")

SHAPE = ConvShape(32, 64, 56, 56, 64, 3, 3, padding=(1, 1))
CONFIG = ConvConfig(128, 64, 64, 4, 3)
BOX = replace(CONFIG, box=(1, 4, 32), swap=True)
STRIDED = replace(SHAPE, stride=(2, 2))
SHORTCUT = replace(SHAPE, shortcut_c=64)
GPU = KNOWN[90]
INTERPRETED = replace(GPU, gluon=False)


@functools.cache
def calls(model: str, size: int = 224) -> list[Call]:
    build = {"resnet18": resnet18, "resnet50": resnet50}[model]
    found = trace(build().eval(), (1, 3, size, size), torch.float16)
    return [call for call in found if call.operator == "conv_bn_relu"]


def convolutions(dtype: str, precision: str) -> set[ConvShape]:
    """Every convolution of ResNet-18 and ResNet-50 at every batch size."""
    shapes = {call.shape for model in ("resnet18", "resnet50") for call in calls(model)}
    return {replace(shape, n=n, dtype=dtype, precision=precision) for shape in shapes for n in BATCHES}


# --- the heuristic ---------------------------------------------------------------------------------------------------


@ALL_NUMBERS
@pytest.mark.parametrize(
    ("arch", "descriptors"),
    [
        pytest.param(arch, on, id=f"sm_{arch}-{'descriptors' if on else 'pointers'}")
        for arch, device in KNOWN.items()
        for on in ([True, False] if device.has_descriptors else [True])
    ],
)
def test_every_choice_is_legal(arch: int, dtype: str, precision: str, descriptors: bool) -> None:
    device = KNOWN[arch]
    paths = set()
    for shape in convolutions(dtype, precision):
        chosen = conv_heuristic(shape, device, descriptors=descriptors)
        assert is_legal(chosen, shape, device), (shape, chosen)
        assert chosen.kernel == "conv_pointer" or (descriptors and arch >= 90 and supports_descriptors(shape))
        paths.add(chosen.kernel)
    modern = descriptors and arch >= 90 and precision == ("tf32" if dtype == "float32" else "ieee")
    if modern and arch == 90:
        others = set() if dtype == "float32" else {"hopper_pingpong", "hopper_conv64", "hopper_few"}
        assert paths == {"conv_box", "hopper_conv", *others}
    else:
        assert paths == ({"conv_pointer", "conv_box"} if modern else {"conv_pointer"})


PERSISTENT = {"hopper_conv", "hopper_pingpong", "hopper_conv64"}
"""These have as many programs as run at a time."""


@pytest.mark.parametrize("n", [32, 256])
def test_hopper_takes_its_own_kernels_for_many_images(n: int) -> None:
    shapes = {replace(call.shape, n=n) for model in ("resnet18", "resnet50") for call in calls(model)}
    assert {conv_heuristic(shape, KNOWN[90]).kernel for shape in shapes} <= PERSISTENT
    assert not any(conv_heuristic(shape, KNOWN[100]).is_gluon for shape in shapes)
    singles = [replace(shape, dtype="float32", precision="tf32") for shape in shapes]
    assert {conv_heuristic(shape, KNOWN[90]).kernel for shape in singles} == {"hopper_conv"}
    assert not any(conv_heuristic(replace(shape, precision="ieee"), KNOWN[90]).is_gluon for shape in singles)


@ALL_DEVICES
def test_choices_for_odd_shapes_are_legal(arch: int) -> None:
    for dtype, precision in NUMBERS:
        for c, k in ((1, 1), (3, 5), (65, 33), (24, 2048)):
            for n, h, w in ((1, 1, 1), (3, 1, 17), (1, 2000, 3)):
                for r, s in ((1, 1), (7, 2)):
                    shape = ConvShape(n, c, h, w, k, r, s, (1, 3), (r // 2, s), (1, 1), dtype, precision)
                    assert is_legal(conv_heuristic(shape, KNOWN[arch]), shape, KNOWN[arch]), shape


def test_batch_size_changes_the_choice() -> None:
    """One choice for all would leave most of the GPU idle at batch 1."""
    small, large = (lookup(replace(SHAPE, n=n, residual=True), KNOWN[90]) for n in (1, 128))
    assert small.block_m * small.block_k < large.block_m * large.block_k
    assert small.box is not None
    assert small.box[2] == 1


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_linear_tiles(itemsize: int, precision: str) -> None:
    shapes = itertools.product((1, 16, 17, 64, 65, 4096), (1, 300, 25088), (1, 1000, 4096, 21841), KNOWN.values())
    for m, c, k, device in shapes:
        tile = linear_heuristic(m, c, k, itemsize, precision, device)
        sizes = (tile.block_m, tile.block_k, tile.block_c, tile.num_warps)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert min(sizes[:3]) >= 16
        assert tile.num_stages * (tile.block_m + tile.block_k) * tile.block_c * itemsize <= device.shared_memory


def test_few_rows_of_a_linear_layer_keep_memory_busy() -> None:
    """Weights of VGG's first linear layer on their way at a time: what an H200 reads in 0.8 us, 3.4 MB, and more."""
    wide = [linear_heuristic(m, 25088, 4096, 2, "ieee", KNOWN[90]) for m in (1, 16)]
    assert wide == [ConvConfig(16, 32, 256, 4, 4)] * 2
    assert 4096 // 32 * 3 * 32 * 256 * 2 > 3.4e6, "programs, buffers, bytes of each"
    assert linear_heuristic(1, 512, 1000, 2, "ieee", KNOWN[90]) == ConvConfig(16, 16, 256, 4, 4), "fewer classes"
    assert linear_heuristic(1, 40, 21841, 2, "ieee", KNOWN[90]) == ConvConfig(16, 64, 64, 4, 4), "many, few channels"
    assert linear_heuristic(16, 25088, 4096, 4, "tf32", KNOWN[80]) == ConvConfig(16, 32, 128, 4, 4)
    assert linear_heuristic(16, 25088, 4096, 4, "ieee", KNOWN[90]) == ConvConfig(16, 32, 32, 4, 4)
    assert linear_heuristic(17, 25088, 4096, 2, "ieee", KNOWN[90]) == ConvConfig(32, 64, 64, 4, 3)


def test_taps_of_a_usual_pool_are_loaded_at_once() -> None:
    for side, unroll in ((2, 4), (3, 9), (5, 25), (6, 8), (13, 8)):
        call = MaxPool2d(torch.empty(1, 8, 16, 16, device="meta"), (side, side), (1, 1), (0, 0))
        assert [launch.arguments["UNROLL"] for launch in plan(call)] == [unroll]


def test_a_mean_of_few_images_has_more_programs_and_an_invariant_one_as_ever() -> None:
    def tile(n: int, c: int, side: int, **modes: bool) -> tuple[int, ...]:
        call = GlobalAvgPool(torch.empty(n, c, side, side, device="meta"), Modes(**modes))
        (launch,) = plan(call)
        return *launch.grid, launch.arguments["BLOCK_P"], launch.arguments["BLOCK_C"], launch.num_warps

    with pretending(KNOWN[90]):
        assert tile(1, 256, 56) == (16, 512, 16, 8)
        assert tile(32, 256, 56) == (512, 512, 16, 8)
        assert tile(33, 256, 56) == (132, 64, 64, 4), "as many as SMs"
        assert tile(1, 24, 9) == (2, 128, 16, 8)
        assert tile(1, 512, 7) == (8, 64, 64, 4), "one turn"
        assert tile(1, 256, 56, batch_invariant=True) == (4, 64, 64, 4)


# --- which path ------------------------------------------------------------------------------------------------------

SERVED = {
    "3x3": SHAPE,
    "1x1": replace(SHAPE, r=1, s=1, padding=(0, 0)),
    "stride 2": STRIDED,
    "odd width at stride 1": replace(SHAPE, w=57),
    "odd height at stride 2": replace(STRIDED, h=57),
    "shortcut": replace(SHORTCUT, shortcut_w=112, shortcut_stride=(2, 2)),
    "odd shortcut at stride 1": replace(SHORTCUT, shortcut_w=57),
    "fp32 with 4 channels": replace(SHAPE, c=4, k=12, dtype="float32"),
}
NOT_SERVED = {
    "odd width at stride 2": replace(STRIDED, w=57),
    "fp16 with 4 channels": replace(SHAPE, c=4),
    "fp16 with 60 filters": replace(SHAPE, k=60),
    "fp32 with 6 channels": replace(SHAPE, c=6, dtype="float32"),
    "shortcut of 12 channels": replace(SHAPE, shortcut_c=12),
    "odd shortcut at stride 2": replace(SHORTCUT, shortcut_w=57, shortcut_stride=(2, 2)),
    "shortcut with stride 3": replace(SHORTCUT, shortcut_stride=(3, 3)),
    "shortcut with two strides": replace(SHORTCUT, shortcut_stride=(1, 2)),
    "5x5": replace(SHAPE, r=5, s=5, padding=(2, 2)),
    "3x1": replace(SHAPE, s=1, padding=(1, 0)),
    "no padding": replace(SHAPE, padding=(0, 0)),
    "stride 3": replace(SHAPE, stride=(3, 3)),
    "two strides": replace(SHAPE, stride=(1, 2)),
    "dilation": replace(SHAPE, dilation=(2, 2)),
}


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SERVED.items()])
def test_descriptors_serve(shape: ConvShape) -> None:
    assert supports_descriptors(shape)
    if shape.dtype != "float32":
        assert conv_heuristic(shape, KNOWN[90]).kernel in PERSISTENT
        assert conv_heuristic(shape, INTERPRETED).kernel == "conv_box"
    assert conv_heuristic(shape, KNOWN[90], descriptors=False).kernel == "conv_pointer"
    assert conv_heuristic(shape, KNOWN[89]).kernel == "conv_pointer"


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in NOT_SERVED.items()])
def test_descriptors_do_not_serve(shape: ConvShape) -> None:
    assert not supports_descriptors(shape)
    assert not is_legal(BOX, shape, KNOWN[90])
    assert conv_heuristic(shape, KNOWN[90]).kernel == "conv_pointer"


@ALL_DEVICES
def test_launches_are_what_was_chosen(arch: int) -> None:
    facts = gluon.without(KNOWN[arch])
    for call in calls("resnet18"):
        launch, chosen = call.launches(facts)[-1], lookup(call.shape, facts)
        assert launch.name == chosen.kernel
        sizes = (launch.arguments["BLOCK_K"], launch.arguments["BLOCK_C"], launch.num_warps, launch.num_stages)
        assert sizes == (chosen.block_k, chosen.block_c, chosen.num_warps, chosen.num_stages)
        if chosen.box is None:
            assert launch.arguments["BLOCK_M"] == chosen.block_m
        else:
            assert tuple(launch.arguments[f"BOX_{side}"] for side in "HWN") == chosen.box


def test_odd_image_sizes_take_the_pointer_path_where_columns_are_split() -> None:
    """At 200x200, layer3 and layer4 start from 25 and 13 columns: their convolutions and shortcuts at stride 2."""
    for call in calls("resnet18", 200):
        shape = call.shape
        if (shape.w if shape.stride == (2, 2) else shape.shortcut_w) % 2:
            assert call.launches(KNOWN[90])[-1].kernel.__name__ == "conv_pointer_kernel", call.name


POINTWISE = ConvShape(1, 64, 7, 7, 256)


@pytest.mark.parametrize("n", [1, 3, 32, 256])
@pytest.mark.parametrize("size", [(7, 7), (5, 13), (56, 56)], ids=str)
@pytest.mark.parametrize("more", [{}, {"residual": True}, {"shortcut_c": 128}], ids=["", "residual", "shortcut"])
def test_a_pointwise_convolution_takes_runs_of_pixels(size: tuple[int, int], n: int, more: dict[str, Any]) -> None:
    """All of them but the last are full, whatever the sides of images, and none has gaps in its memory."""
    h, w = size
    shape = replace(POINTWISE, n=n, h=h, w=w, shortcut_h=h, shortcut_w=w, **more)
    call = abstract_call(shape)
    for gpu in (GPU, INTERPRETED):
        chosen = lookup(shape, gpu)
        (launch,) = replace(call, tile=chosen).launches(call.output(), gpu)
        assert tiles(chosen, shape) == cdiv(n * h * w, chosen.block_m) * cdiv(256, chosen.block_k)
        if chosen.kernel == "conv_pointer":
            assert gpu is INTERPRETED
            continue
        assert chosen.box == (1, 1, chosen.block_m)
        channels = {"x_desc": 64, "y_desc": 256, "y_ptr": 256, "res_desc": 256, "res_ptr": 256, "short_x_desc": 128}
        for name, c in channels.items():
            if (given := launch.arguments.get(name)) is not None:
                assert getattr(given, "base", given).shape == (n * h * w, c, 1, 1), name
                if name.endswith("desc"):
                    assert (list(given.shape), given.strides[2:]) == ([1, 1, n * h * w, c], [c, 1]), name
        if chosen.kernel not in PERSISTENT:
            assert launch.grid[0] * (*launch.grid, 1)[1] == tiles(chosen, shape) * chosen.split_k


def test_no_other_convolution_does() -> None:
    assert POINTWISE.pointwise
    box = (1, 1, 32)
    for change in (
        {"r": 3}, {"s": 3}, {"stride": (2, 2)}, {"stride": (1, 2)}, {"padding": (0, 1)}, {"padding": (1, 0)},
        {"shortcut_stride": (2, 2)},
    ):  # fmt: skip
        other = replace(POINTWISE, n=3, h=9, w=9, **change)
        assert not other.pointwise
        assert tiles(ConvConfig(32, 256, 64, 8, 2, box), other) == other.p * other.q
    few = ConvConfig(32, 64, 64, 4, 1, box, kernel="hopper_few")
    assert is_legal(few, POINTWISE, GPU)
    assert is_legal(replace(few, box=(4, 8, 1)), POINTWISE, GPU)
    assert is_legal(few.on((1, 1, 16)), POINTWISE, GPU)
    assert not is_legal(few, replace(POINTWISE, h=8, w=8, stride=(2, 2)), GPU)
    assert tiles(few.on((4, 8, 1)), POINTWISE) == 2 * 4, "a box of rows stays one"
    found = conv_candidates(replace(POINTWISE, c=512), GPU)
    assert {c.split_k for c in found if c.kernel == "hopper_few"} == {1, 2, 4, 8}
    assert not is_legal(few.on((1, 1, 128)), POINTWISE, GPU)
    assert not is_legal(few.on((1, 1, 8)), POINTWISE, GPU)


def test_narrow_runs_are_columns_of_their_products() -> None:
    """Products of fewer than 64 rows leave tensor cores idle."""
    found = conv_candidates(replace(POINTWISE, h=28, w=28), INTERPRETED)
    assert {c.swap for c in found if c.box == (1, 1, 32)} == {True}
    assert {c.swap for c in found if c.box and c.box[2] > 32} == {False}


# --- what is legal ---------------------------------------------------------------------------------------------------

ILLEGAL: dict[str, tuple[ConvConfig, ConvShape]] = {
    "zero": (replace(CONFIG, block_m=0), SHAPE),
    "negative": (replace(CONFIG, block_k=-64), SHAPE),
    "not a power of two": (replace(CONFIG, block_k=48), SHAPE),
    "channels not a power of two": (replace(CONFIG, block_c=24), SHAPE),
    "three warps": (replace(CONFIG, num_warps=3), SHAPE),
    "too many warps": (replace(CONFIG, num_warps=16), SHAPE),
    "no stage": (replace(CONFIG, num_stages=0), SHAPE),
    "too many stages": (replace(CONFIG, num_stages=9, block_m=16, block_k=16, block_c=16), SHAPE),
    "too few rows": (replace(CONFIG, block_m=8), SHAPE),
    "too few filters": (replace(CONFIG, block_k=8), SHAPE),
    "too few channels": (replace(CONFIG, block_c=8), SHAPE),
    "too many rows": (replace(CONFIG, block_m=512, block_c=16), SHAPE),
    "too many filters": (replace(CONFIG, block_k=512, block_c=16), SHAPE),
    "rows of channels too long": (replace(CONFIG, block_m=16, block_k=16, block_c=256), SHAPE),
    "too much shared memory": (replace(CONFIG, block_m=256, block_k=256, num_stages=8), SHAPE),
    "two large accumulators": (replace(CONFIG, block_m=256, block_k=128), SHORTCUT),
    "box of another size": (replace(BOX, box=(1, 4, 16)), SHAPE),
    "box with a side of zero": (replace(BOX, box=(0, 4, 32)), SHAPE),
    "box with negative sides": (replace(BOX, box=(-1, -4, 32)), SHAPE),
    "box not of powers of two": (replace(BOX, block_m=128, box=(1, 3, 42)), SHAPE),
    "several sides as rows of a product": (replace(BOX, swap=False), SHAPE),
    "pointers swapped": (replace(CONFIG, swap=True), SHAPE),
    "two box rows at stride 2": (replace(BOX, box=(2, 2, 32)), STRIDED),
    "two box rows, shortcut at stride 2": (replace(BOX, box=(2, 2, 32)), replace(SHORTCUT, shortcut_stride=(2, 2))),
}  # fmt: skip


FEW = ConvConfig(32, 64, 64, 4, 1, (4, 8, 1), 2, kernel="hopper_few")
FEW_IMAGES = ConvShape(1, 128, 28, 28, 128, 3, 3, padding=(1, 1), shortcut_c=64, shortcut_h=28, shortcut_w=28)
ILLEGAL |= {
    f"few images: {name}": (replace(FEW, **config), replace(FEW_IMAGES, **shape))
    for name, config, shape in [
        ("a slab of 32 channels", {}, {"c": 96}),
        ("a tile of 32 filters", {}, {"k": 96}),
        ("half a slab of a shortcut", {}, {"shortcut_c": 96}),
        ("more slabs of a shortcut than shares", {"split_k": 1, "block_m": 16, "box": (2, 8, 1)}, {"shortcut_c": 128}),
        ("shares that are not equal", {"split_k": 3}, {}),
        ("too many shares", {"split_k": 16}, {"c": 1024}),
        ("odd rows at stride 2", {}, {"stride": (2, 2), "h": 27}),
        ("a ring of slots", {"num_stages": 2}, {}),
        ("a box of two images", {"box": (2, 8, 2)}, {}),
        ("a box of 16 rows", {"block_m": 128, "box": (16, 8, 1)}, {}),
        ("four slabs at a time", {"split_k": 1}, {"c": 256}),
        ("TF32", {}, {"dtype": "float32", "precision": "tf32"}),
    ]
}


IN_TURN = ConvConfig(128, 128, 64, 4, 5, (1, 4, 32), kernel="hopper_pingpong")
ILLEGAL |= {
    f"in turn: {name}": (replace(IN_TURN, **config), replace(SHAPE, **shape))
    for name, config, shape in [
        ("shares", {"split_k": 3}, {}),
        ("a shortcut", {}, {"shortcut_c": 64, "shortcut_h": 28, "shortcut_w": 28}),
        ("accumulators of 256 filters", {"block_k": 256, "num_stages": 2}, {}),
        ("accumulators of 256 pixels", {"block_m": 256, "box": (1, 8, 32), "num_stages": 2}, {}),
        ("six slots beside two whole results", {"num_stages": 6}, {}),
    ]
}

SINGLES = ConvConfig(128, 128, 32, 4, 5, (1, 4, 32), kernel="hopper_conv")
TF32 = replace(SHAPE, dtype="float32", precision="tf32")
ILLEGAL |= {
    "TF32 where IEEE was asked for": (SINGLES, replace(TF32, precision="ieee")),
    "TF32, results that leave room for two slots": (replace(SINGLES, block_k=256, num_stages=2), TF32),
    "TF32, slabs of 64 channels": (replace(SINGLES, block_c=64, num_stages=2), TF32),
    "TF32, slots in the room of residuals": (SINGLES, replace(TF32, residual=True)),
    "TF32 by the kernel of 64 channels": (
        ConvConfig(64, 64, 32, 4, 5, (2, 1, 32), kernel="hopper_conv64"), replace(TF32, c=64, k=64)
    ),
    "TF32 in turn": (replace(SINGLES, num_stages=3, kernel="hopper_pingpong"), TF32),
}  # fmt: skip


def test_tf32_is_legal() -> None:
    """What the cases above differ from."""
    assert is_legal(SINGLES, TF32, KNOWN[90])
    assert is_legal(replace(SINGLES, num_stages=3), replace(TF32, residual=True), KNOWN[90])


def test_turns_are_legal() -> None:
    """What the cases above differ from."""
    assert is_legal(IN_TURN, SHAPE, KNOWN[90])
    assert is_legal(IN_TURN, replace(SHAPE, residual=True), KNOWN[90]), "which is loaded into the results"
    assert is_legal(IN_TURN.on((2, 2, 32)), SHAPE, KNOWN[90])


def test_few_images_are_legal() -> None:
    """What the cases above differ from."""
    assert is_legal(FEW, FEW_IMAGES, KNOWN[90])
    assert not is_legal(FEW, FEW_IMAGES, KNOWN[100])
    assert is_legal(FEW, replace(FEW_IMAGES, stride=(2, 2)), KNOWN[90])
    assert is_legal(replace(FEW, split_k=8), replace(FEW_IMAGES, c=1024), KNOWN[90]) is False, (
        "two slabs and a shortcut"
    )
    assert is_legal(replace(FEW, split_k=8), replace(FEW_IMAGES, c=512), KNOWN[90])


@pytest.mark.parametrize(("chosen", "shape"), [pytest.param(*pair, id=name) for name, pair in ILLEGAL.items()])
def test_illegal(chosen: ConvConfig, shape: ConvShape) -> None:
    assert not is_legal(chosen, shape, KNOWN[90])


@pytest.mark.parametrize("chosen", [CONFIG, BOX, replace(BOX, box=(2, 2, 32))], ids=["pointer", "box", "two rows"])
def test_legal(chosen: ConvConfig) -> None:
    assert is_legal(chosen, SHAPE, KNOWN[90])
    assert is_legal(chosen, SHORTCUT, KNOWN[90])
    assert is_legal(chosen, SHAPE, KNOWN[80]) == (chosen.box is None)


def test_legality_follows_the_shared_memory() -> None:
    chosen = replace(CONFIG, block_m=128, block_k=128, num_stages=4)  # 128 KiB of tiles
    assert is_legal(chosen, SHAPE, KNOWN[90])
    assert not is_legal(chosen, SHAPE, KNOWN[89])


def test_boxes_of_two_rows_take_a_column_of_taps_at_a_time() -> None:
    """Where they are few, at stride 1: a step is three taps, and a slot is as large."""
    shape = ConvShape(8, 128, 28, 28, 128, 3, 3, padding=(1, 1))
    two = ConvConfig(128, 64, 64, 4, 3, (2, 8, 8), kernel="hopper_conv")
    assert conv_heuristic(shape, KNOWN[90]) == two
    many = conv_candidates(replace(shape, n=128), KNOWN[90])
    assert not any(taps(chosen, shape) > 1 for chosen in many)
    strided = replace(shape, stride=(2, 2))
    assert (steps(two, shape), steps(two, strided), steps(replace(two, box=(4, 4, 8)), shape)) == (6, 18, 18)
    for change in ({"num_stages": 4}, {"split_k": 9}):
        assert not is_legal(replace(two, **change), shape, KNOWN[90])
        assert is_legal(replace(two, **change), strided, KNOWN[90])


# --- what the tuner tries --------------------------------------------------------------------------------------------


@ALL_NUMBERS
@ALL_DEVICES
def test_candidates_are_legal_distinct_and_start_with_the_heuristic(arch: int, dtype: str, precision: str) -> None:
    device = KNOWN[arch]
    first = 13 * list(KNOWN).index(arch)  # of each GPU others
    for shape in sorted(convolutions(dtype, precision), key=repr)[first :: 80 if dtype == "float16" else 150]:
        tried = candidates.candidates(shape, device, 12)
        assert tried[0] == conv_heuristic(shape, device)
        assert len(set(tried)) == len(tried) >= 10
        assert len({(c.kernel, c.block_m, c.block_k) for c in tried[1:]}) == len(tried) - 1, "one form of each tile"
        costs = [candidates.estimate(c, shape, device) for c in tried[1:]]
        assert costs == sorted(costs)
        for c in [*tried, *candidates.neighbours(tried[0], shape, device)]:
            assert is_legal(c, shape, device)
        paths = {c.kernel for c in tried[1:]}
        served = arch >= 90 and supports_descriptors(shape)
        assert paths - PERSISTENT - {"hopper_few"} == ({"conv_pointer", "conv_box"} if served else {"conv_pointer"})
        ieee = (dtype, precision) == ("float32", "ieee")
        assert any(c.kernel == "hopper_conv" for c in tried) == (served and arch == 90 and not ieee)


def test_boxes_cover_the_output_without_much_waste() -> None:
    layer4 = ConvShape(100, 512, 7, 7, 512, 3, 3, padding=(1, 1))
    found = candidates.boxes(BOX, 128, layer4, GPU)
    assert (1, 1, 128) in found  # 128 images for 100
    assert (1, 8, 16) in found  # 8 columns for 7, 112 images for 100
    assert (8, 16, 1) not in found  # 16 columns for 7
    assert all(h * w * n == 128 for h, w, n in found)
    assert {h for h, _, _ in candidates.boxes(BOX, 128, STRIDED, GPU)} == {1}


def test_neighbours_are_one_step_away() -> None:
    near = candidates.neighbours(BOX, SHAPE, GPU)
    assert BOX not in near
    assert len(set(near)) == len(near)
    for expected in (
        replace(BOX, num_stages=2), replace(BOX, num_stages=4), replace(BOX, num_warps=8), replace(BOX, block_k=128),
        replace(BOX, block_c=32), BOX.on((1, 8, 16)),
        BOX.on((2, 2, 32)), BOX.on((1, 8, 32)),
    ):  # fmt: skip
        assert expected in near, expected
    assert {c.num_stages for c in near} == {2, 3, 4}
    few = candidates.neighbours(BOX, replace(SHAPE, h=7, w=7), GPU)
    assert {replace(BOX, split_k=3), replace(BOX, box=None, swap=False)} < set(few)
    specialised = ConvConfig(128, 64, 64, 4, 6, (1, 4, 32), kernel="hopper_conv")
    near = candidates.neighbours(specialised, SHAPE, GPU)
    for expected in (
        replace(specialised, num_stages=5), specialised.on((1, 8, 16)),
        replace(specialised, box=(8, 4, 4)),
    ):  # fmt: skip
        assert expected in near, expected
    assert {c.kernel for c in near} == PERSISTENT
    pointers = candidates.neighbours(replace(BOX, box=None, swap=False), SHAPE, GPU)
    assert any(c.box for c in pointers)
    assert {c.block_m for c in pointers if c.box is None} == {64, 128}


def test_what_is_sure_to_spill_is_not_tried() -> None:
    exact = replace(SHAPE, dtype="float32", precision="ieee")
    for shape, most in ((SHAPE, 128), (exact, 32)):
        tried = candidates.candidates(shape, GPU, 100)
        assert max(c.block_m * c.block_k / (32 * c.num_warps) for c in tried if not c.is_gluon) == most


def test_an_entry_that_is_illegal_where_it_was_tuned_is_used_nowhere() -> None:
    """A table may hold anything: a box with a side of zero has no estimate."""
    tuned = replace(SHAPE, n=64)
    config = ConvConfig(64, 64, 64, 4, 3, (0, 1, 64))
    assert candidates.adapt(config, tuned, replace(SHAPE, n=96), GPU) is None
