"""The stem: packed images, the fused convolution and pool, and the two launches where it does not apply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from calls import with_tensors
from exact import (
    DTYPES,
    KERNELS,
    LAYOUTS,
    assert_exact,
    dtype_id,
    generator,
    in_turn,
    integers,
    plan,
    pretending,
    run,
    stem_call,
    stem_reference,
)
from torch import Tensor

from resnet_triton import config, functional
from resnet_triton.config import StemConfig, hopper_strip, stem_heuristic
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels import stem as kernels
from resnet_triton.kernels.hopper_stem import reads
from resnet_triton.ops import BatchNorm, dispatch, interpreter, reference
from resnet_triton.ops import stem as operator
from resnet_triton.ops.dispatch import Modes
from resnet_triton.ops.precision import fp32_precision
from resnet_triton.ops.stem import Stem

INF, NAN = float("inf"), float("nan")
HALVES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
SPECIAL_VALUES = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tiled(block_q: int, strip: int, block_k: int = 64) -> Any:
    return mock.patch.object(config, "stem_heuristic", return_value=StemConfig(block_q, block_k, strip, 4, 2))


SIZES = [
    (1, 3, 30, 34, 64), (2, 3, 17, 19, 70), (3, 1, 8, 61, 16), (2, 4, 1, 1, 8), (1, 3, 4, 4, 65), (1, 2, 2, 13, 40),
    (1, 3, 5, 4, 24), (1, 3, 40, 6, 16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "strip", "block_q", "dtype"), in_turn(SIZES, (1, 3, 100), (16, 32, 128), dtypes=DTYPES[1:], slow=32)
)
def test_stem(device, size, strip, block_q, dtype):
    call = stem_call(generator(device, 0), *size, dtype)
    with tiled(block_q, strip):
        assert_exact(run(call, kernel="stem_kernel"), stem_reference(call))


def test_programs_write_their_own_part_alone(device):
    """In turns, the next program's values would hide what this one has written of its part; backwards they do not."""
    if device.type == "cuda":
        pytest.skip("the order of programs is the GPU's")
    call = stem_call(generator(device, 13), 1, 3, 14, 70, 24, torch.float16)
    with tiled(16, 3, block_k=16):
        *_, launch = plan(call)
        backwards = list(reversed(range(launch.grid[0])))
        assert_exact(run(call, programs=backwards, kernel="stem_kernel"), stem_reference(call))


@HALVES
def test_stem_without_affine_parameters_and_in_narrow_tiles(device, dtype):
    call = stem_call(generator(device, 1), 2, 3, 20, 20, 48, dtype, affine=False)
    with tiled(32, 2, block_k=16):
        assert_exact(run(call, kernel="stem_kernel"), stem_reference(call))


@pytest.mark.parametrize(
    "batch", [pytest.param(batch, marks=() if batch > 33 else pytest.mark.slow) for batch in (1, 2, 3, 8, 33, 64, 129)]
)  # each has another tile
def test_stem_of_resnet18_at_the_chosen_tiles(device, batch):
    """Few images in the interpreter, but tiles, strips and rows as they are for this batch."""
    chosen = stem_heuristic(batch, 64, 56, 56, KNOWN[90])
    images = batch if device.type == "cuda" else 1
    call = stem_call(generator(device, batch), images, 3, 224, 224, 64, DTYPES[1 + batch % 2])
    with mock.patch.object(config, "stem_heuristic", return_value=chosen):
        assert_exact(run(call, kernel="stem_kernel"), stem_reference(call))


@pytest.mark.parametrize(("layout", "dtype"), in_turn(LAYOUTS, dtypes=DTYPES[1:]))
def test_stem_reads_any_layout(device, layout, dtype):
    call = stem_call(generator(device, 2), 2, 3, 13, 15, 16, dtype)
    call = replace(call, x=LAYOUTS[layout](call.x), weight=LAYOUTS[layout](call.weight))
    assert_exact(run(call, kernel="stem_kernel"), stem_reference(call))


def test_stem_rounds_wider_images(device):
    call = stem_call(generator(device, 3), 2, 3, 13, 15, 16, torch.float16)
    wider = call.x.float() * (1 + 2.0**-13)  # half of fp16's half unit in the last place
    expected = stem_reference(replace(call, x=wider.half()))
    assert_exact(run(replace(call, x=wider), kernel="stem_kernel"), expected)


# --- bytes -----------------------------------------------------------------------------------------------------------


@HALVES
def test_bytes_are_normalised_once_and_padded_with_zero(device, dtype):
    """Means and deviations for which every step is exact: x / 255 is 0 or 1."""
    call = stem_call(generator(device, 4), 2, 3, 14, 16, 16, dtype)
    pixels = torch.randint(0, 2, (2, 3, 14, 16), generator=generator(device, 5), device=device, dtype=torch.uint8) * 255
    mean, std = (0.5, 0.0, -1.0), (0.25, 1.0, 1.0)
    m, s = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
    expected = stem_reference(replace(call, x=((pixels / 255 - m) / s).to(dtype)))
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = pixels.contiguous(memory_format=layout)
        of_bytes = replace(call, x=laid, pixel_mean=mean, pixel_std=std)
        assert_exact(run(of_bytes, kernel="stem_kernel"), expected)


def test_every_byte_is_normalised_as_torchvision_does(device):
    pixels = torch.arange(256, dtype=torch.uint8, device=device).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    packed, _ = pack(pixels, torch.float16, mean, std)
    m, s = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
    assert torch.equal(unpacked(packed, 16, 16), ((pixels.float() / 255 - m) / s).half())


# --- special values --------------------------------------------------------------------------------------------------


def same(y: Tensor, expected: Tensor) -> bool:
    return torch.equal(y.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


PIXELS = [(0, 0), (0, 7), (7, 0), (8, 8), (11, 6), (17, 35), (10, 35)]


@SPECIAL_VALUES
@pytest.mark.parametrize(
    ("where", "value", "dtype"),
    [(where, (NAN, INF, -INF)[i % 3], DTYPES[1 + i % 2]) for i, where in enumerate(PIXELS)],
    ids=str,
)
def test_a_pixel_that_is_not_finite_reaches_only_its_windows(device, where, value, dtype):
    """A window of 4 x 4 blocks covers one row and one column more than the filter: 0 x infinity lurks there."""
    call = stem_call(generator(device, 6), 2, 3, 18, 36, 16, dtype)
    call.x[1, 2, where[0], where[1]] = value
    with tiled(16, 3):
        y = run(call, kernel="stem_kernel")
    expected = with_tensors(call, Tensor.double).reference().to(dtype)
    assert same(y, expected)
    assert not torch.equal(y[1], stem_reference(replace(call, x=call.x.nan_to_num(0.0, 0.0, 0.0)))[1])
    assert y[0].isfinite().all()


@SPECIAL_VALUES
def test_a_pixel_that_is_not_finite_in_a_tall_image(device):
    """It is marked beyond the first 128 rows of blocks, which are read at once."""
    call = stem_call(generator(device, 14), 1, 3, 300, 8, 16, torch.float16)
    call.x[0, 1, 290:292, 3:5] = INF  # one of the four is in a block window, but not in the filter's
    with tiled(16, 100):
        y = run(call, kernel="stem_kernel")
    expected = with_tensors(call, Tensor.double).reference().half()
    assert same(y, expected)
    assert y[:, :, :70].isfinite().all()


@HALVES
@SPECIAL_VALUES
def test_no_filter_tap_is_skipped_in_the_padding(device, dtype):
    call = stem_call(generator(device, 7), 1, 3, 12, 12, 16, dtype)
    call.weight[5, 1, 0, 6] = NAN
    call.weight[6, 0, 6, 0] = INF
    call.weight[9, 0, 0, 0] = NAN  # next to the last tap of filter 8, whose packed pixel has a fourth channel: zero
    expected = with_tensors(call, Tensor.double).reference().to(dtype)
    assert expected[:, 5].isnan().all()
    assert same(run(call, kernel="stem_kernel"), expected)


@SPECIAL_VALUES
def test_statistics_of_every_kind(device):
    call = stem_call(generator(device, 8), 1, 3, 12, 12, 16, torch.float16)
    call.batch_norm.running_var[:4] = torch.tensor([-0.25, -1.0, INF, NAN])
    expected = with_tensors(call, Tensor.double).reference().half()
    assert same(run(call, kernel="stem_kernel"), expected)


# --- the packer ------------------------------------------------------------------------------------------------------


def pack(x: Tensor, dtype: torch.dtype, mean: Any = None, std: Any = None) -> tuple[Tensor, Tensor]:
    n, _, h, w = x.shape
    packed = torch.full(kernels.packed_shape(n, h, w), NAN, dtype=dtype, device=x.device)
    marks = torch.full(packed.shape[:2], -1, dtype=torch.int32, device=x.device)
    launch = kernels.pack(out=packed, marks=marks, x=x, mean=mean, std=std, block=16, num_warps=4)
    with torch.cuda.device(x.device) if x.is_cuda else interpreter.ready():
        launch.run()
    return packed, marks


def unpacked(packed: Tensor, h: int, w: int, c: int = 3) -> Tensor:
    n, rows, columns, _ = packed.shape
    pixels = packed.reshape(n, rows, columns, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(n, 4, 2 * rows, 2 * columns)
    inside = torch.zeros_like(pixels, dtype=torch.bool)
    inside[:, :c, 4 : 4 + h, 4 : 4 + w] = True
    assert not pixels[~inside].any(), "the padding is zero"
    return pixels[:, :c, 4 : 4 + h, 4 : 4 + w]


@pytest.mark.parametrize("size", [(2, 3, 9, 37), (1, 4, 2, 2), (1, 1, 1, 1), (3, 3, 16, 33)], ids=str)
def test_packing_keeps_every_pixel_and_pads_with_zero(device, size):
    x = torch.randn(size, generator=generator(device, 9), device=device)
    packed, marks = pack(x, torch.bfloat16)
    assert torch.equal(unpacked(packed, *size[2:], size[1]), x.bfloat16())
    assert not marks.any()


@SPECIAL_VALUES
def test_marks_name_the_rows_that_are_not_finite(device):
    x = torch.zeros(2, 3, 10, 40, device=device)
    x[1, 2, 3, 39] = NAN
    x[0, 0, 9, 0] = 70000.0  # finite, but not in fp16
    _, marks = pack(x, torch.float16)
    assert marks.nonzero().tolist() == [[0, (9 + 4) // 2], [1, (3 + 4) // 2]]
    assert marks.max() == 1


# --- where it applies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "c", "dtype"),
    [(80, 3, torch.float16), (120, 3, torch.float16), (90, 5, torch.bfloat16), (90, 3, torch.float32)],
    ids=["no descriptors", "little shared memory", "five channels", "fp32"],
)
def test_elsewhere_convolution_and_pool_are_two_launches(device, arch, c, dtype):
    call = stem_call(generator(device, 10), 2, c, 12, 14, 16, dtype)
    with pretending(KNOWN[arch]):
        names = [launch.kernel.__name__ for launch in plan(call)]
        assert names == ["conv_pointer_kernel", "max_pool_kernel"]
        assert_exact(run(call), stem_reference(call))


@SPECIAL_VALUES
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_three_channels_become_four(device, dtype):
    """A channel of zeros: on exact data it changes nothing, and NaN and infinity stay where they were."""
    call = stem_call(generator(device, 16), 2, 3, 12, 14, 16, dtype)
    call.modes = call.modes._replace(batch_invariant=True)
    special = replace(call, x=call.x.clone(), weight=call.weight.clone())
    special.x[0, 2, 0, 0], special.x[1, 0, 11, 13], special.weight[3, 1, 0, 6] = NAN, INF, INF
    with pretending(KNOWN[80]), fp32_precision("tf32"):
        (conv, _) = plan(call)
        assert conv.arguments["x_ptr"].shape[1] == conv.arguments["w_ptr"].shape[1] == 4
        assert_exact(run(call), stem_reference(call))
        actual, expected = run(special), run(replace(special, modes=KERNELS))  # of few images: three channels
    assert expected.isnan().any()
    assert expected.isinf().any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "c", "dtype", "channels"),
    [
        (1, 3, torch.float16, 3), (8, 3, torch.float16, 4), (8, 1, torch.float16, 1), (8, 5, torch.float16, 5),
        (8, 3, torch.float32, 3),
    ],
    ids=["few images", "many", "one channel", "five", "fp32"],
)  # fmt: skip
def test_where_three_channels_become_four(n, c, dtype, channels):
    with torch.device("meta"), pretending(KNOWN[80]), fp32_precision("ieee"):
        x, weight, ones = torch.empty(n, c, 224, 224).to(dtype), torch.empty(64, c, 7, 7).to(dtype), torch.ones(64)
        call = Stem(x, weight, BatchNorm(ones, ones, None, None, 0.0))
        (conv, _) = plan(call)
    assert conv.arguments["x_ptr"].shape[1] == conv.arguments["w_ptr"].shape[1] == channels


@pytest.mark.parametrize(
    ("change", "one"),
    [
        ({}, True), ({"k": 32}, False), ({"c": 5}, False), ({"arch": 100}, False), ({"every": 2}, True),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)  # fmt: skip
def test_hopper_takes_one_launch(device, change, one):
    sizes = {"k": 64, "c": 3, "arch": 90, "every": 1, "dtype": torch.bfloat16, **change}
    call = stem_call(generator(device, 15), 2, sizes["c"], 12, 28, sizes["k"], sizes["dtype"])
    call = replace(call, x=call.x[..., :: sizes["every"]])
    with mock.patch.object(interpreter, "active", return_value=False), pretending(KNOWN[sizes["arch"]]):
        launches = plan(call)
    names = [launch.kernel.__name__ for launch in launches]
    assert (names == ["hopper_stem_kernel"]) == one, names
    if one:  # so eager calls take the kernel that graphs take, which have a copy of the images
        images = launches[0].arguments["x_ptr"]
        assert reads(images)
        assert torch.equal(images, call.x)
        assert (images is call.x) == reads(call.x)


def test_images_too_large_for_one_launch():
    with torch.device("meta"), mock.patch.object(interpreter, "active", return_value=False):
        weight, norm = torch.empty(64, 1, 7, 7, dtype=torch.float16), BatchNorm(*[torch.ones(64)] * 2, None, None, 0.0)
        for width, fits in ((2**15, False), (2**15 - 16, True)):
            call = Stem(torch.empty(1, 1, 2**15, width, dtype=torch.float16), weight, norm)
            assert (call._for_one_launch(KNOWN[90]) is not None) == fits


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        (lambda call: call, True),
        (lambda call: replace(call, x=call.x[..., 2:]), False),
        (lambda call: replace(call, weight=call.weight.contiguous()), False),
        (lambda call: replace(call, batch_norm=call.batch_norm._replace(bn_bias=torch.zeros(128)[::2])), False),
        (lambda call: replace(call, modes=Modes(kernels="torch")), False),
    ],
    ids=["as it is", "images not aligned", "filters not channels_last", "a bias with gaps", "on PyTorch"],
)
def test_a_stem_that_can_be_repeated_reads_everything_where_it_is(change, alone):
    """What a launch has copied would be out of date at the next edit in place."""
    call = change(stem_call(generator(torch.device("cpu"), 15), 2, 3, 12, 28, 64, torch.float16))
    with mock.patch.object(interpreter, "active", return_value=False), pretending(KNOWN[90]):
        with mock.patch.object(dispatch, "_fallback_reason", return_value=None):  # as on a GPU
            found = call.alone()
        assert len(plan(call)) == 1
    assert (found is not None) == alone
    if found is not None:
        (out, launch), address = found, call.weight.data_ptr()
        assert launch.arguments["x_ptr"].data_ptr() == call.x.data_ptr()
        assert launch.arguments["y_desc"].base.data_ptr() == out.data_ptr()
        call.weight.data = torch.zeros(1)
        assert launch.arguments["w_ptr"].data_ptr() == address, "a replay that is out of date still reads what it may"


def test_bytes_that_reciprocals_do_not_normalise_exactly_take_other_launches(device):
    call = stem_call(generator(device, 15), 2, 3, 12, 28, 64, torch.float16)
    call = replace(call, x=call.x.byte(), pixel_mean=(0.5,) * 3, pixel_std=(0.5, 0.5, 1e-45))
    with mock.patch.object(interpreter, "active", return_value=False):
        assert len(plan(call)) == 2
        assert len(plan(replace(call, pixel_std=(0.5,) * 3))) == 1


def test_bytes_also_take_the_two_launches(device):
    call = stem_call(generator(device, 11), 1, 3, 12, 14, 16, torch.float16)
    pixels = integers(generator(device, 12), 1, 1, 3, 12, 14).abs().byte() * 255
    of_bytes = replace(call, x=pixels, pixel_mean=(0.0,) * 3, pixel_std=(0.5,) * 3)
    with pretending(KNOWN[80]):
        assert_exact(run(of_bytes), stem_reference(replace(call, x=(pixels / 127.5).half())))


def test_the_cpu_takes_a_few_images_at_a_time_and_gives_the_same_answer():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3, 32, 32), torch.randn(16, 3, 7, 7)
    statistics = torch.randn(16), torch.rand(16) + 0.5, torch.randn(16), torch.randn(16)
    sizes = []
    conv2d = F.conv2d

    def recorded(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(images))
        return conv2d(images, *args, **kwargs)

    with mock.patch.object(reference.F, "conv2d", recorded):
        functional.stem(x, weight, *statistics)
        assert sizes == [9], "small images find room together"
        sizes.clear()
        with mock.patch.object(reference, "_CACHED", 4 * 16 * 16 * 16):
            y = functional.stem(x, weight, *statistics)
    assert sizes == [4, 4, 1]
    expected = F.batch_norm(F.conv2d(x, weight, stride=2, padding=3), *statistics).relu()
    torch.testing.assert_close(y, F.max_pool2d(expected, 3, 2, 1), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_heuristic_fills_the_gpu_and_covers_the_image():
    for batch in (1, 2, 4, 8, 16, 64, 128, 132, 133, 256):
        tile = stem_heuristic(batch, 64, 56, 56, KNOWN[90])
        programs = batch * -(-56 // tile.strip) * -(-56 // (tile.block_q // 2 - 1))
        rounds = -(-programs // 132)
        assert programs / (rounds * 132) > (0.8 if batch > 1 else 0.4), (batch, tile)
    assert stem_heuristic(128, 64, 56, 56, KNOWN[90]).strip > 10, "long strips recompute less"
    assert stem_heuristic(128, 64, 56, 56, KNOWN[100]).block_q == 64
    assert stem_heuristic(128, 64, 56, 56, KNOWN[120]) is stem_heuristic(128, 64, 56, 56, KNOWN[80]) is None


def test_strips_on_hopper_keep_every_group_busy():
    for batch in (8, 16, 32, 64, 128, 132, 256, 1000):
        strip = hopper_strip(batch, 56, 56, KNOWN[90])
        items = batch * -(-56 // strip)
        assert items / (-(-items // 264) * 264) > 0.8, (batch, strip)
    assert hopper_strip(1, 56, 56, KNOWN[90]) == 1, "an image is divided among all"
    assert hopper_strip(256, 56, 56, KNOWN[90]) == 56, "long strips recompute less"


@pytest.mark.parametrize("message", ["an invalid argument", "CUDA out of memory"])
def test_a_driver_that_refuses_windows_is_tried_once(monkeypatch, message):
    """For lack of memory it refuses nothing."""
    where, tried = torch.device("cuda:0"), []

    def refused(where: torch.device) -> None:
        tried.append(where)
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(operator, "_windows", {})
    monkeypatch.setattr(operator, "_try_windows", refused)
    if "memory" in message:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                operator._windows_work(where)
        assert len(tried) == 2
    else:
        with pytest.warns(RuntimeWarning, match=f"the fused one failed: {message}"):
            assert not operator._windows_work(where)
        assert not operator._windows_work(where)
        assert len(tried) == 1
