"""Shadow memory finds faults that are planted in the source of our kernels."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from exact import conv_call, generator, integers, run, run_conv
from planted import planted
from torch import Tensor

from resnet_triton import config, interpreter, ops
from resnet_triton.config import ConvConfig, ConvShape, StemConfig

pytestmark = pytest.mark.skipif(not interpreter.active(), reason="kernels are compiled here")
CPU = torch.device("cpu")
LAYER = ConvShape(3, 24, 5, 6, 40, 3, 3, padding=(1, 1), residual=True)
SMALL = ConvShape(1, 16, 4, 5, 40, 3, 3, padding=(1, 1))


def conv(shape: ConvShape, chosen: ConvConfig) -> None:
    run_conv(conv_call(generator(CPU, 0), shape), chosen)


def pointer() -> None:
    conv(LAYER, ConvConfig(32, 32, 16, 4, 2))


def flat() -> None:
    conv(ConvShape(2, 3, 5, 6, 40, 3, 3, (2, 2), (1, 1)), ConvConfig(32, 32, 16, 4, 2))


def box() -> None:
    conv(LAYER, ConvConfig(32, 32, 16, 4, 2, (2, 4, 4)))


def one_image() -> None:
    conv(ConvShape(1, 16, 6, 10, 32, 3, 3, (2, 2), (1, 1)), ConvConfig(32, 32, 16, 4, 2, (4, 8, 1)))


def columns() -> None:
    conv(ConvShape(17, 24, 2, 3, 40, 3, 3, padding=(1, 1)), ConvConfig(16, 32, 16, 4, 2, (1, 1, 16), columns=2))


def split() -> None:
    conv(SMALL, ConvConfig(16, 32, 16, 4, 2, split_k=3))


def split_boxes() -> None:
    conv(SMALL, ConvConfig(16, 32, 16, 4, 2, (4, 4, 1), split_k=3))


def two_launches() -> None:
    conv(SMALL, ConvConfig(16, 32, 16, 4, 2, split_k=3, two_launches=True))


def stem() -> None:
    shape = ConvShape(2, 3, 9, 42, 40, 7, 7, (2, 2), (3, 3))
    with mock.patch.object(config, "stem_heuristic", return_value=StemConfig(16, 32, 2, 4, 2)):
        run("stem", *conv_call(generator(CPU, 0), shape)[:7], None, None, "triton", kernel="stem_kernel")


def images(*shape: int) -> Tensor:
    return integers(generator(CPU, 0), 3, *shape)


def max_pool() -> None:
    run("max_pool2d", images(2, 65, 7, 9), [3, 3], [2, 2], [1, 1], "triton")


def avg_pool() -> None:
    run("global_avg_pool", images(2, 65, 5, 7), False, "triton")


def head() -> None:
    run("avg_pool_linear", images(2, 65, 5, 7), images(10, 65), images(10), False, "triton")


def linear() -> None:
    run("linear", images(17, 65), images(10, 65), images(10), False, "triton")


def add_relu() -> None:
    run("add_relu", images(2, 65, 5, 7), images(2, 65, 5, 7), "triton")


CALLS = (
    pointer, flat, box, one_image, columns, split, split_boxes, two_launches, stem, max_pool, avg_pool, head, linear,
    add_relu,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_our_kernels_pass(call):
    call()


PLANTED = [
    pytest.param(
        "conv_pointer", pointer, "mask_k = offs_k < K", "mask_k = offs_k <= K",
        "loads outside mean_ptr: element 40 of 40", id="conv_pointer, one filter too many",
    ),
    pytest.param(
        "conv_pointer", split, "mask_m = offs_m < M", "mask_m = offs_m <= M",
        "loads outside x_ptr: element 320 of 320", id="conv_pointer, one pixel too many",
    ),
    pytest.param(
        "conv_pointer", pointer, "mask_m = offs_m < M", "mask_m = offs_m < M - 1",
        "never stores y_ptr[2, 0, 4, 5] and 39 more", id="conv_pointer, one pixel too few",
    ),
    pytest.param(
        "conv_pointer", pointer, "(h < H) & (w >= 0) & (w < W) & mask_m\n", "(w >= 0) & (w < W) & mask_m\n",
        "loads outside x_ptr", id="conv_pointer, one row too many",
    ),
    pytest.param(
        "conv_pointer", flat, "mask_c = offs_c < R * S * C", "mask_c = offs_c >= 0", "loads outside w_ptr",
        id="conv_pointer, no tail of taps",
    ),
    pytest.param(
        "conv_pointer", pointer, "tl.store(y_ptr + offs_y, acc", "tl.store(res_ptr + offs_y, acc",
        "stores res_ptr[0, 0, 0, 0], an input", id="conv_pointer, result into the residual",
    ),
    pytest.param(
        "conv_pointer", pointer, "(n * H + h0) * row + w0.to(tl.int64) * C", "(n * H + w0) * row + h0.to(tl.int64) * C",
        "loads outside x_ptr", id="conv_pointer, rows and columns swapped",
    ),
    pytest.param(
        "conv_pointer", two_launches, "split.to(tl.int64) * M * K", "split.to(tl.int64) * 0",
        "stores workspace_ptr[0, 0], which", id="conv_pointer, shares on top of each other",
    ),
    pytest.param(
        "conv_box", box, "[h, w, n, c], [row, c, image, 1]", "[h, w, n, c], [c, row, image, 1]", "loads outside x_desc",
        id="conv_box, rows and columns swapped",
    ),
    pytest.param(
        "conv_box", box, "[h, w, n, c], [row", "[h, w, n + 1, c], [row", "loads outside x_desc",
        id="conv_box, one image too many",
    ),
    pytest.param(
        "conv_box", box, "[k, r * s, c], [", "[k + 1, r * s, c], [", "loads outside w_desc",
        id="conv_box, one filter too many",
    ),
    pytest.param(
        "conv_box", one_image, "[row, c, 2 * row, 2 * c, 1]", "[2 * row, c, 2 * row, 2 * c, 1]", "loads outside x_desc",
        id="conv_box, parities swapped",
    ),
    pytest.param(
        "conv_box", split_boxes, "            if not last:\n                return\n", "",
        "stores y_desc[0, 0, 0, 0], which program (0, 0, 0)", id="conv_box, the first writes, too",
    ),
    pytest.param(
        "conv_columns", columns, "tiles_q = tl.cdiv(Q, COLUMNS)\n    q = (tile % tiles_q) * COLUMNS",
        "tiles_q = tl.cdiv(Q, COLUMNS)\n    q = tile % tiles_q", "stores y_desc[0, 0, 0, 1], which program (0, 0, 0)",
        id="conv_columns, tiles overlap",
    ),
    pytest.param(
        "tiles", split, "tl.atomic_add(arrivals_ptr + tile, 1, sem=\"acq_rel\", scope=\"gpu\") == SPLIT_K - 1",
        "split == SPLIT_K - 1", "loads workspace_ptr[0], which program (0, 0, 0) stored", id="tiles, nobody waits",
    ),
    pytest.param(
        "tiles", split_boxes, "    tl.debug_barrier()\n", "", "loads workspace_ptr[0], which program (0, 0, 0) stored",
        id="tiles, no barrier",
    ),
    pytest.param(
        "tiles", box, "tl.load(mean_ptr + offs_k, mask=mask_k, other=0.0)", "tl.load(mean_ptr + offs_k)",
        "loads outside mean_ptr", id="tiles, batch norm without mask",
    ),
    pytest.param(
        "sum_shares", two_launches, "static_range(1, SPLIT_K)", "static_range(1, SPLIT_K + 1)",
        "loads outside shares_ptr", id="sum_shares, one too many",
    ),
    pytest.param(
        "stem", stem, "\"stride_h\": x.stride(2), \"stride_w\": x.stride(3)",
        "\"stride_h\": x.stride(3), \"stride_w\": x.stride(2)", "pack_kernel, program (2, 0, 0), loads outside x_ptr",
        id="stem, rows and columns swapped",
    ),
    pytest.param(
        "stem", stem, "    tl.store(marks_ptr + n * ROWS + row, mark)\n", "",
        "stem_kernel, program (0, 0, 0), loads marks_ptr[0, 0]", id="stem, no marks",
    ),
    pytest.param(
        "stem", stem, "[rows, n, q, WINDOW]", "[rows, n, q + 1, WINDOW]", "loads outside x_desc",
        id="stem, one window too many",
    ),
    pytest.param(
        "stem", stem, "(offs_j < HALF - 1) &", "(offs_j < HALF) &", "stores y_ptr[0, 0, 0, 7], which program",
        id="stem, tiles overlap",
    ),
    pytest.param(
        "stem", stem, "(offs_j < HALF - 1) &", "(offs_j < HALF - 2) &", "never stores y_ptr[0, 0, 0, 6]",
        id="stem, tiles leave a gap",
    ),
    pytest.param(
        "max_pool", max_pool, "mask=mask_m[:, None] & mask_c[None, :])",
        "mask=mask_c[None, :] & (offs_m >= 0)[:, None])", "outside y_ptr", id="max_pool, no tail of pixels",
    ),
    pytest.param(
        "max_pool", max_pool, "(w0 + s < W)", "(w0 + s <= W)", "loads outside x_ptr",
        id="max_pool, one column too many",
    ),
    pytest.param(
        "max_pool", max_pool, "cdiv(c, block_c),)", "(c // block_c),)", "never stores", id="max_pool, unwritten tail",
    ),
    pytest.param(
        "global_avg_pool", avg_pool, "offs_p < PIXELS", "offs_p <= PIXELS", "loads outside x_ptr: element 4550 of 4550",
        id="global_avg_pool, one pixel too many",
    ),
    pytest.param(
        "avg_pool_linear", head, "mask_c = offs_c < C", "mask_c = offs_c >= 0", "loads outside w_ptr",
        id="avg_pool_linear, no tail of channels",
    ),
    pytest.param(
        "linear", linear, "mask_c = offs_c < C", "mask_c = offs_c <= C", "loads outside x_ptr: element 1105 of 1105",
        id="linear, one channel too many",
    ),
    pytest.param(
        "add_relu", add_relu, "offs < NUMEL", "offs <= NUMEL", "loads outside x_ptr: element 4550 of 4550",
        id="add_relu, one too many",
    ),
    pytest.param(
        "add_relu", add_relu, "offs < NUMEL", "offs < NUMEL - 1", "never stores y_ptr[1, 64, 4, 6] and 0 more",
        id="add_relu, one too few",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("file", "call", "old", "new", "text"), PLANTED)
def test_a_planted_fault_is_found(file, call, old, new, text):
    counters = mock.patch.dict(ops.conv._counters, clear=True)  # a launch that fails leaves them counted
    with planted(file, old, new), counters, pytest.raises(AssertionError, match=re.escape(text)):
        call()


def test_operators_are_watched_wherever_they_are_called():
    x = torch.ones(1, 5, 4, 5)
    with planted("add_relu", "offs < NUMEL", "offs <= NUMEL"), pytest.raises(AssertionError, match="outside x_ptr"):
        torch.ops.resnet_triton.add_relu(x, x, "triton")


def test_some_programs_of_a_launch_are_watched_by_their_own_numbers():
    x = images(1, 64, 60, 60)
    with (
        planted("max_pool", "(w0 + s < W)", "(w0 + s <= W)"),
        pytest.raises(AssertionError, match=r"program \(112, 0, 0\)"),
    ):
        run("max_pool2d", x, [3, 3], [1, 1], [1, 1], "triton", programs=[3, 112])
