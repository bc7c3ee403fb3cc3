"""Tile choices: legal everywhere, the same every time, and never taken from a table that is not beyond doubt."""

from __future__ import annotations

import functools
import itertools
import json
import re
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from exact import conv_call, generator

from resnet_triton import resnet18, resnet50
from resnet_triton.config import (
    ConvConfig,
    ConvShape,
    candidates,
    choice,
    conv_heuristic,
    is_legal,
    linear_heuristic,
    lookup,
    measured,
    supports_descriptors,
    table,
)
from resnet_triton.config.conv import steps, taps, tiles
from resnet_triton.config.device import KNOWN, DeviceFacts, facts, override
from resnet_triton.config.estimate import estimate
from resnet_triton.config.heuristic import best_estimated, conv_candidates
from resnet_triton.kernels.launch import cdiv
from resnet_triton.ops import GlobalAvgPool, MaxPool2d
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
        assert chosen.path == "pointer" or (descriptors and arch >= 90 and supports_descriptors(shape))
        paths.add(chosen.path)
    modern = descriptors and arch >= 90 and precision == ("tf32" if dtype == "float32" else "ieee")
    if modern and arch == 90:
        others = set() if dtype == "float32" else {"hopper_conv64", "hopper_few"}
        assert paths == {"descriptor", "hopper_conv", *others}
    else:
        assert paths == ({"pointer", "descriptor"} if modern else {"pointer"})


@pytest.mark.parametrize("n", [32, 256])
def test_hopper_takes_its_own_kernels_for_many_images(n: int) -> None:
    shapes = {replace(call.shape, n=n) for model in ("resnet18", "resnet50") for call in calls(model)}
    assert {conv_heuristic(shape, KNOWN[90]).kernel for shape in shapes} <= {"hopper_conv", "hopper_conv64"}
    assert not any(conv_heuristic(shape, KNOWN[100]).kernel for shape in shapes)
    singles = [replace(shape, dtype="float32", precision="tf32") for shape in shapes]
    assert {conv_heuristic(shape, KNOWN[90]).kernel for shape in singles} == {"hopper_conv"}
    assert not any(conv_heuristic(replace(shape, precision="ieee"), KNOWN[90]).kernel for shape in singles)


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
        assert [launch.arguments["UNROLL"] for launch in call.launches(call.output())] == [unroll]


def test_a_mean_of_few_images_has_more_programs_and_an_invariant_one_as_ever() -> None:
    def tile(n: int, c: int, side: int, **modes: bool) -> tuple[int, ...]:
        call = GlobalAvgPool(torch.empty(n, c, side, side, device="meta"), Modes(**modes))
        (launch,) = call.launches(call.output())
        return *launch.grid, launch.arguments["BLOCK_P"], launch.arguments["BLOCK_C"], launch.num_warps

    with override(KNOWN[90]):
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
        assert conv_heuristic(shape, KNOWN[90]).path.startswith("hopper_conv")
        assert conv_heuristic(shape, INTERPRETED).path == "descriptor"
    assert conv_heuristic(shape, KNOWN[90], descriptors=False).path == "pointer"
    assert conv_heuristic(shape, KNOWN[89]).path == "pointer"


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in NOT_SERVED.items()])
def test_descriptors_do_not_serve(shape: ConvShape) -> None:
    assert not supports_descriptors(shape)
    assert not is_legal(BOX, shape, KNOWN[90])
    assert conv_heuristic(shape, KNOWN[90]).path == "pointer"


@ALL_DEVICES
def test_launches_are_what_was_chosen(arch: int) -> None:
    for call in calls("resnet18"):
        launch, chosen = call.launches(KNOWN[arch])[-1], lookup(call.shape, replace(KNOWN[arch], gluon=False))
        assert (
            launch.kernel.__name__ == {"pointer": "conv_pointer_kernel", "descriptor": "conv_box_kernel"}[chosen.path]
        )
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
        with override(gpu), choice.pinned(chosen):
            (launch,) = call.launches(call.output())
        assert tiles(chosen, shape) == cdiv(n * h * w, chosen.block_m) * cdiv(256, chosen.block_k)
        if chosen.path == "pointer":
            assert gpu is INTERPRETED
            continue
        assert chosen.box == (1, 1, chosen.block_m)
        channels = {"x_desc": 64, "y_desc": 256, "y_ptr": 256, "res_desc": 256, "res_ptr": 256, "short_x_desc": 128}
        for name, c in channels.items():
            if (given := launch.arguments.get(name)) is not None:
                assert getattr(given, "base", given).shape == (n * h * w, c, 1, 1), name
                if name.endswith("desc"):
                    assert (list(given.shape), given.strides[2:]) == ([1, 1, n * h * w, c], [c, 1]), name
        if not chosen.kernel.startswith("hopper_conv"):  # these have as many programs as run at a time
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


SINGLES = ConvConfig(128, 128, 32, 4, 5, (1, 4, 32), kernel="hopper_conv")
TF32 = replace(SHAPE, dtype="float32", precision="tf32")
ILLEGAL |= {
    "TF32 where IEEE was asked for": (SINGLES, replace(TF32, precision="ieee")),
    "TF32, results that leave room for two slots": (replace(SINGLES, block_k=256, num_stages=2), TF32),
    "TF32, slabs of 64 channels": (replace(SINGLES, block_c=64, num_stages=2), TF32),
    "TF32, slots in the room of residuals": (SINGLES, replace(TF32, residual=True)),
    "TF32 by the kernel of 64 channels": (
        replace(SINGLES, block_k=64, num_stages=5, box=(2, 2, 32), kernel="hopper_conv64"), replace(TF32, c=64, k=64)
    ),
}  # fmt: skip


def test_tf32_is_legal() -> None:
    """What the cases above differ from."""
    assert is_legal(SINGLES, TF32, KNOWN[90])
    assert is_legal(replace(SINGLES, num_stages=3), replace(TF32, residual=True), KNOWN[90])


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


# --- tables ----------------------------------------------------------------------------------------------------------

GPU = KNOWN[90]
H100 = replace(GPU, name="NVIDIA H100 80GB HBM3")
INTERPRETED = replace(GPU, gluon=False)
TUNED = ConvConfig(64, 32, 32, 4, 2, (2, 1, 32), swap=True)


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "nvidia-h200.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def document(shape: Any = SHAPE, chosen: Any = TUNED, **changes: Any) -> str:
    """A table of one entry."""
    entry = {"shape": asdict(shape) if isinstance(shape, ConvShape) else shape,
             "config": asdict(chosen) if isinstance(chosen, ConvConfig) else chosen}  # fmt: skip
    return json.dumps({"schema": 1, "gpu": GPU.name, "triton": triton.__version__, "entries": [entry], **changes})


def test_shipped_tables_are_sound() -> None:
    devices = {table.slug(device.name): device for device in KNOWN.values()}
    for path in table.FOLDER.glob("*.json"):
        if path.suffixes == [".measured", ".json"]:
            continue
        for shape, entry in table.load(path).entries.items():
            assert path.stem not in devices or is_legal(entry.config, shape, devices[path.stem]), (path.name, shape)


def test_file_names() -> None:
    assert {table.slug(device.name) for device in KNOWN.values()} == {
        "nvidia-a100", "nvidia-rtx-a6000", "nvidia-geforce-rtx-4090", "nvidia-h200", "nvidia-b200",
        "nvidia-geforce-rtx-5090",
    }  # fmt: skip
    assert re.fullmatch(r"[a-z0-9-]+", table.slug("../../etc/NVIDIA\0 H100 (80 GB)"))


def test_exact_entry_wins(folder: Path) -> None:
    write(folder, document())
    assert conv_heuristic(SHAPE, GPU) != TUNED
    assert lookup(SHAPE, GPU) == TUNED
    for other in (replace(SHAPE, n=65), replace(SHAPE, residual=True), replace(SHAPE, dtype="bfloat16")):
        assert lookup(other, GPU) == conv_heuristic(other, GPU)
    assert lookup(SHAPE, KNOWN[100]) == conv_heuristic(SHAPE, KNOWN[100])  # another GPU


TIMING = table.Timing(3.5, 3.25, 4.0, 5.0, 20, triton.__version__, "2026-01-31")


def test_entry_may_leave_out_defaults_and_carry_a_timing(folder: Path) -> None:
    entry = {"shape": {"n": 1, "c": 64, "h": 8, "w": 8, "k": 64}, "timing": {**asdict(TIMING), "p80_us": 4},
             "config": {"block_m": 64, "block_k": 64, "block_c": 64, "num_warps": 4, "num_stages": 2}}  # fmt: skip
    path = write(folder, document(entries=[entry]))
    expected = table.Entry(ConvConfig(64, 64, 64, 4, 2), TIMING)
    assert table.load(path).entries == {ConvShape(1, 64, 8, 8, 64): expected}


def test_unaligned_tensors_ignore_a_box(folder: Path) -> None:
    write(folder, document())
    assert lookup(SHAPE, GPU, descriptors=False) == conv_heuristic(SHAPE, GPU, descriptors=False)


def test_illegal_entry_is_ignored(folder: Path) -> None:
    chosen, shape = ILLEGAL["too much shared memory"]
    write(folder, document(shape, chosen))
    assert lookup(shape, GPU) == conv_heuristic(shape, GPU)


def test_no_table(folder: Path) -> None:
    assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


def changed(**changes: Any) -> str:
    """The good table with changed fields of its entry's shape."""
    return document({**asdict(SHAPE), **changes})


def timed(timing: Any) -> str:
    """The good table with a timing."""
    return document(entries=[{**json.loads(document())["entries"][0], "timing": timing}])


HOSTILE: dict[str, str | bytes] = {
    "empty": "",
    "not JSON": "schema: 1",
    "half a file": document()[:-20],
    "a bracket too many": document() + "]",
    "binary": bytes(range(256)) * 100,
    "not UTF-8": document().encode().replace(b"H200", b"\xff\xfe"),
    "UTF-16": document().encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + document().encode(),
    "a list": "[]",
    "a number": "1",
    "no entries": json.dumps({"schema": 1}),
    "entries no list": document(entries={}),
    "no schema": json.dumps({"entries": []}),
    "schema 2": document(schema=2),
    "schema as a string": document(schema="1"),
    "schema as a bool": document(schema=True),
    "entry no object": document(entries=[[]]),
    "entry empty": document(entries=[{}]),
    "unknown key in entry": document(entries=[{**json.loads(document())["entries"][0], "run": "x"}]),
    "shape no object": document([1, 64]),
    "shape incomplete": document({"n": 1}),
    "config no object": document(SHAPE, "fast"),
    "config incomplete": document(SHAPE, {"block_m": 64}),
    "unknown key in config": document(SHAPE, {**asdict(TUNED), "__class__": "x"}),
    "unknown key in shape": changed(eval="1"),
    "string for int": changed(n="32"),
    "float for int": changed(n=32.0),
    "NaN": changed(n=float("nan")),
    "infinity": changed(n=float("inf")),
    "bool for int": changed(c=True),
    "null for int": changed(c=None),
    "int for bool": changed(residual=0),
    "int for string": changed(dtype=16),
    "negative": changed(h=-56),
    "huge": changed(w=2**31),
    "very huge": changed(w=10**4000),
    "too many digits": document().replace("56", "5" * 5000, 1),
    "pair too short": changed(stride=[1]),
    "pair too long": changed(stride=[1, 1, 1]),
    "bool in pair": changed(stride=[True, True]),
    "negative in pair": changed(padding=[-1, 1]),
    "null for pair": changed(padding=None),
    "string for pair": changed(padding="11"),
    "box of floats": document(SHAPE, {**asdict(TUNED), "box": [1.0, 2.0, 32.0]}),
    "newline in a key": changed(**{"a\nb": 1}),
    "newline in a value": changed(dtype=["a\nb"]),
    "long key": changed(**{"x" * 1_000_000: 1}),
    "long value": changed(dtype=["x" * 1_000_000]),
    "no GPU": document().replace('"gpu"', '"driver"'),
    "GPU as a number": document(gpu=200),
    "unknown key": document(run="x"),
    "Triton as a number": document(triton=3.7),
    "a key twice": document().replace('"n": 32', '"n": 32, "n": 64'),
    "a shape twice": document(entries=json.loads(document())["entries"] * 2),
    "timing no object": timed(3.5),
    "timing incomplete": timed({"us": 3.5}),
    "timing with an unknown key": timed({**asdict(TIMING), "command": "x"}),
    "timing as a string": timed({**asdict(TIMING), "us": "3.5"}),
    "timing as a bool": timed({**asdict(TIMING), "us": True}),
    "timing negative": timed({**asdict(TIMING), "us": -1.0}),
    "timing NaN": timed({**asdict(TIMING), "us": float("nan")}),
    "timing infinite": timed({**asdict(TIMING), "us": 1.5}).replace("1.5", "1e999"),
    "deep nesting": '{"schema": 1, "entries": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested value": changed(n=functools.reduce(lambda inner, _: [inner], range(400), 1)),
    "oversize": document() + " " * (4 << 20),
}


SAID = {"not JSON": "not JSON", "half a file": "not JSON", "a bracket too many": "not JSON", "binary": "not JSON",
        "long key": "unknown key", "long value": r"ConvShape\.dtype must be str"}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_one_short_warning_that_says_what_to_do(folder: Path, name: str) -> None:
    path = write(folder, HOSTILE[name])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        table.load(path)
    ignored(path, SAID.get(name, ""))


def ignored(path: Path, fault: str = "") -> None:
    with pytest.warns(UserWarning, match=fault) as caught:
        assert lookup(SHAPE, GPU) == lookup(replace(SHAPE), GPU) == conv_heuristic(SHAPE, GPU)
    (warning,) = (str(w.message) for w in caught)
    assert str(path) in warning
    assert "; delete it, or mend what it says" in warning
    assert "heuristic" in warning
    assert "\n" not in warning
    assert len(warning) < 500


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (Path.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic link"),
    ],
    ids=["folder", "device", "symlink loop"],
)
def test_what_is_no_file_is_ignored(folder: Path, make: Callable[[Path], object], fault: str) -> None:
    make(folder / "nvidia-h200.json")
    ignored(folder / "nvidia-h200.json", fault)


def test_another_gpus_table_is_ignored(folder: Path) -> None:
    write(folder, document(gpu="NVIDIA H100"))
    with pytest.warns(UserWarning, match="tuned for 'NVIDIA H100', expected 'NVIDIA H200'"):
        assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


@pytest.mark.parametrize("with_timing", [True, False])
def test_another_triton_is_warned_of_once_and_used(folder: Path, with_timing: bool) -> None:
    """An entry's own version counts, where there is one."""
    old = document(triton="3.1.4")
    if with_timing:
        old = timed({**asdict(TIMING), "triton": "3.1.4"})
    write(folder, old)
    with pytest.warns(UserWarning, match=r"nvidia-h200.json was tuned with Triton 3\.1\.4, this is"):
        assert lookup(SHAPE, GPU) == TUNED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(replace(SHAPE), GPU) == TUNED
        write(folder, document(triton=triton.__version__.rpartition(".")[0] + ".99"))  # a patch release is no other
        choice.forget()
        assert lookup(SHAPE, GPU) == TUNED


def test_a_saved_table_is_the_table_that_was_saved(folder: Path) -> None:
    path = table.path_of(GPU.name)
    entries = {
        replace(SHAPE, n=2): table.Entry(TUNED),
        SHAPE: table.Entry(CONFIG, TIMING),
        replace(SHAPE, n=1): table.Entry(BOX),
    }
    saved = table.Table(GPU.name, "570.86.15", triton.__version__, torch.__version__, "2026-01-31", entries)
    table.save(saved, path)
    assert table.load(path) == saved
    head, *lines, end = path.read_text().splitlines()
    assert json.loads(head + end)["driver"] == "570.86.15"
    assert [json.loads(line.rstrip(","))["shape"]["n"] for line in lines] == [1, 2, 32], "one line each, in order"
    table.save(table.Table(GPU.name), path)
    assert table.load(path) == table.Table(GPU.name)
    assert [p.name for p in folder.iterdir()] == [path.name]


# --- another batch size ----------------------------------------------------------------------------------------------

WIDE = ConvConfig(128, 64, 64, 4, 4, (1, 1, 128))
AT_128 = replace(SHAPE, n=128)


def tabled(folder: Path, *entries: tuple[ConvShape, ConvConfig]) -> None:
    found = {shape: table.Entry(config) for shape, config in entries}
    table.save(table.Table(GPU.name, triton=triton.__version__, entries=found), table.path_of(GPU.name))


def test_a_near_batch_size_takes_the_tile(folder: Path) -> None:
    tabled(folder, (AT_128, WIDE))
    assert conv_heuristic(AT_128, GPU) != WIDE
    assert lookup(replace(SHAPE, n=255), GPU) == WIDE
    for n in (57, 63, 257, 1024):  # more than a factor of two away
        assert lookup(replace(SHAPE, n=n), GPU) == conv_heuristic(replace(SHAPE, n=n), GPU)
    for other in (replace(AT_128, n=120, residual=True), replace(AT_128, n=120, dtype="bfloat16")):
        assert lookup(other, GPU) == conv_heuristic(other, GPU)


def test_the_nearest_batch_size_wins(folder: Path) -> None:
    narrow = replace(WIDE, num_stages=3)
    tabled(folder, (replace(SHAPE, n=64), narrow), (AT_128, WIDE))
    assert lookup(replace(SHAPE, n=80), GPU).num_stages == 3
    assert lookup(replace(SHAPE, n=112), GPU).num_stages == 4


def test_a_box_is_fitted_to_the_batch_size(folder: Path) -> None:
    """(1, 1, 128) would compute 128 images to keep 64 of them."""
    tabled(folder, (AT_128, WIDE))
    chosen = lookup(replace(SHAPE, n=64), GPU)
    assert chosen.box is not None
    assert chosen.box[2] <= 64
    assert chosen == WIDE.on(chosen.box)
    assert is_legal(chosen, replace(SHAPE, n=64), GPU)


def test_a_tile_that_fits_worse_here_than_where_it_was_tuned_is_refused(folder: Path) -> None:
    """Tiles of 256 pixels make 98 programs of 8 images, enough for 132 SMs, but only 49 of 4 images."""
    at_8, tile = replace(SHAPE, n=8), ConvConfig(256, 64, 64, 8, 3, (4, 8, 8), swap=True)
    tabled(folder, (at_8, tile))
    assert lookup(at_8, GPU) == tile
    assert lookup(replace(SHAPE, n=7), GPU).block_m == 256
    assert candidates.adapt(tile, at_8, replace(SHAPE, n=4), GPU) is None
    assert lookup(replace(SHAPE, n=4), GPU) == conv_heuristic(replace(SHAPE, n=4), GPU)


def test_unaligned_tensors_take_only_pointers_from_another_batch_size(folder: Path) -> None:
    at_100 = replace(SHAPE, n=100)
    tabled(folder, (AT_128, WIDE))
    assert lookup(at_100, GPU, descriptors=False) == conv_heuristic(at_100, GPU, descriptors=False)
    pointers = replace(WIDE, box=None, swap=False)
    tabled(folder, (AT_128, pointers))
    choice.forget()
    assert conv_heuristic(at_100, GPU, descriptors=False) != pointers
    assert lookup(at_100, GPU, descriptors=False) == pointers


def test_an_illegal_neighbour_is_refused(folder: Path) -> None:
    tabled(folder, (AT_128, replace(WIDE, num_stages=8, block_k=256)))
    assert lookup(replace(SHAPE, n=100), GPU) == conv_heuristic(replace(SHAPE, n=100), GPU)


def test_a_pinned_configuration_is_the_answer_to_everything(folder: Path) -> None:
    with choice.pinned(TUNED), choice.pinned(CONFIG):
        assert lookup(SHAPE, GPU) is lookup(STRIDED, KNOWN[80]) is CONFIG
    assert lookup(SHAPE, GPU) == conv_heuristic(SHAPE, GPU)


def test_threads_see_only_what_they_have_pinned_and_overridden() -> None:
    together = threading.Barrier(2)

    def inside(gpu: DeviceFacts, config: ConvConfig) -> tuple[DeviceFacts, ConvConfig]:
        with override(gpu), choice.pinned(config):
            together.wait(10)
            seen = facts(torch.device("cpu")), lookup(SHAPE, gpu)
            together.wait(10)  # neither leaves before both have looked
        return seen

    given = [(KNOWN[80], CONFIG), (KNOWN[100], TUNED)]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(inside, *zip(*given, strict=True))] == given


def test_launches_alike_look_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing what may be chosen takes milliseconds. A table that is written is asked again."""
    asked = []

    def counted(shape: ConvShape, *arguments: Any, **options: Any) -> choice.Chosen:
        asked.append(shape)
        return choice.choose(shape, *arguments, **options)

    monkeypatch.setattr("resnet_triton.config.choose", counted)
    call = conv_call(generator(torch.device("cpu"), 0), ConvShape(1, 16, 4, 4, 16, 1, 1))
    for forgotten in (False, True):
        call.launches(call.output())
        call.launches(call.output())
        assert asked == [call.shape] * (1 + forgotten)
        choice.forget()


# --- what was measured -----------------------------------------------------------------------------------------------

MEASURED = Path(measured.__file__).with_name("nvidia-h200.measured.json")
TIMED = json.loads(MEASURED.read_text(encoding="utf-8"))


def usable(row: dict[str, Any]) -> bool:
    several_sides = row["box"] is not None and sum(side > 1 for side in row["box"]) > 1
    return row["exact"] and not row["spill_bytes"] and not several_sides


def fastest() -> dict[ConvShape, ConvConfig]:
    """Of each shape's forms that may be used."""
    found = {}
    for layer in TIMED["layers"]:
        rows = [dict(zip(TIMED["columns"], values, strict=True)) for values in layer["forms"]]
        if rows := sorted(filter(usable, rows), key=lambda row: row["us"]):
            shape = {name: tuple(value) if isinstance(value, list) else value for name, value in layer["shape"].items()}
            tile = [rows[0][f"block_{axis}"] for axis in "mkc"]
            box = rows[0]["box"] and tuple(rows[0]["box"])
            found[ConvShape(**shape)] = ConvConfig(
                *tile, rows[0]["num_warps"], rows[0]["num_stages"], box, rows[0]["split_k"]
            )
    return found


def test_an_h200_takes_the_fastest_form_that_was_measured_and_may_be_used() -> None:
    layers = {replace(call.shape, n=256) for call in calls("resnet18")}
    at_256 = {shape: config for shape, config in fastest().items() if shape.n == 256}
    assert len(at_256) == 8
    assert set(at_256) <= layers
    for shape, config in fastest().items():
        assert lookup(shape, INTERPRETED) == conv_heuristic(shape, INTERPRETED) == config, shape
        chosen, form = lookup(shape, GPU), measured.best_measured(shape, GPU)
        assert form
        assert chosen == conv_heuristic(shape, GPU)
        assert chosen == config or (chosen.kernel and estimate(chosen, shape, GPU) < 1100 * form.us)
        assert (chosen != config) == (shape.n in (1, 256)), "no kernel in Gluon has been timed yet"
        assert shape.n != 32, "timed in boxes with several sides alone"
    assert all(launch.own for call in calls("resnet18") for launch in call.launches(GPU)), "our own choice"
    assert at_256[replace(SHAPE, n=256)] == ConvConfig(128, 64, 64, 4, 3, (1, 1, 128)), "145 us, two columns took 207"


@pytest.mark.parametrize(
    "fault",
    [{"exact": False}, {"safe": False}, {"spill_bytes": 8}, {"box": [1, 4, 32]}, {"block_c": 256}],
    ids=["inexact", "unsafe", "spills", "several sides", "illegal"],
)
def test_the_fastest_form_is_not_taken_if_it_may_not_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    planted = {"us": 1.0, "exact": True, "safe": True, "spill_bytes": 0, **asdict(WIDE), "box": [1, 1, 128]}
    for row, taken in ((planted, True), (planted | fault, False)):
        data = json.loads(MEASURED.read_text(encoding="utf-8"))
        for layer in data["layers"]:
            layer["forms"].insert(0, [row[name] for name in data["columns"]])
        (tmp_path / MEASURED.name).write_text(json.dumps(data))
        monkeypatch.setattr(measured, "FOLDER", tmp_path)
        measured.measured.cache_clear()
        try:
            for shape, config in fastest().items():
                expected = WIDE if taken and is_legal(WIDE, shape, GPU) else config
                form = measured.best_measured(shape, GPU)
                assert form
                assert form.config == expected, shape
        finally:
            measured.measured.cache_clear()


def test_nothing_else_takes_what_was_measured_on_an_h200() -> None:
    shape = replace(SHAPE, n=256)
    others = [replace(shape, n=255), replace(shape, dtype="bfloat16"), replace(shape, h=57)]
    for elsewhere, device in [*((s, GPU) for s in others), *((shape, d) for d in (KNOWN[80], KNOWN[100], H100))]:
        assert measured.best_measured(elsewhere, device) is None
        assert lookup(elsewhere, device) == best_estimated(elsewhere, device)
    assert lookup(shape, GPU, descriptors=False) == best_estimated(shape, GPU, descriptors=False), "boxes alone"
    assert lookup(replace(SHAPE, n=1), GPU, descriptors=False) == fastest()[replace(SHAPE, n=1)]


def test_a_measured_form_stands_between_the_table_s_entries(folder: Path) -> None:
    """Behind the very shape's, before a near batch size's."""
    shape = replace(SHAPE, n=256)
    tabled(folder, (replace(SHAPE, n=255), WIDE))
    assert lookup(shape, INTERPRETED) == fastest()[shape]
    tabled(folder, (shape, WIDE))
    choice.forget()
    assert lookup(shape, INTERPRETED) == lookup(shape, GPU) == WIDE


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
        assert len({(c.path, c.block_m, c.block_k) for c in tried[1:]}) == len(tried) - 1, "one form of each tile"
        costs = [candidates.estimate(c, shape, device) for c in tried[1:]]
        assert costs == sorted(costs)
        for c in [*tried, *candidates.neighbours(tried[0], shape, device)]:
            assert is_legal(c, shape, device)
        paths = {c.path for c in tried[1:]}
        served = arch >= 90 and supports_descriptors(shape)
        assert paths - {"hopper_conv", "hopper_conv64", "hopper_few"} == (
            {"pointer", "descriptor"} if served else {"pointer"}
        )
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
    assert {c.kernel for c in near} == {"hopper_conv", "hopper_conv64"}
    pointers = candidates.neighbours(replace(BOX, box=None, swap=False), SHAPE, GPU)
    assert any(c.box for c in pointers)
    assert {c.block_m for c in pointers if c.box is None} == {64, 128}


def test_what_is_sure_to_spill_is_not_tried() -> None:
    exact = replace(SHAPE, dtype="float32", precision="ieee")
    for shape, most in ((SHAPE, 128), (exact, 32)):
        tried = candidates.candidates(shape, GPU, 100)
        assert max(c.block_m * c.block_k / (32 * c.num_warps) for c in tried if not c.kernel) == most


def test_an_entry_that_is_illegal_where_it_was_tuned_is_used_nowhere() -> None:
    """A table may hold anything: a box with a side of zero has no estimate."""
    tuned = replace(SHAPE, n=64)
    config = ConvConfig(64, 64, 64, 4, 3, (0, 1, 64))
    assert candidates.adapt(config, tuned, replace(SHAPE, n=96), GPU) is None
