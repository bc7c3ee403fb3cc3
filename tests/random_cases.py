"""Random small calls of every operator on exact data: shape, memory layouts, dtypes and tiles, all from one `Random`.

Each `check_*` makes a call, runs it through the kernel and compares with fp64, bit for bit. `test_exact.py` draws from
seeds; `test_fuzz.py` from Hypothesis, which makes a failing case small.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from exact import (
    LAYOUTS,
    assert_exact,
    conv_call,
    conv_reference,
    depthwise_call,
    depthwise_tiled,
    dtype_id,
    generator,
    grouped_call,
    integers,
    rounded,
    run,
    run_conv,
    stem_call,
    stem_reference,
    without_box,
)  # fmt: skip
from torch import Tensor

from resnet_triton import config
from resnet_triton.config import ConvConfig, ConvShape, StemConfig, is_legal, supports_descriptors
from resnet_triton.config import tiles as grid_size
from resnet_triton.config.conv import may_have_rows
from resnet_triton.config.device import facts
from resnet_triton.config.targets import KNOWN
from resnet_triton.kernels.launch import cdiv
from resnet_triton.kernels.values import has_several_sides
from resnet_triton.ops import (
    NONE,
    RELU,
    AddRelu,
    AvgPoolLinear,
    ConvBnRelu,
    Geometry,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
)

Check = Callable[[random.Random, torch.device, torch.dtype], None]

CHANNELS = [1, 2, 3, 5, 8, 16, 24, 40, 64, 65, 72]


def _generator(rng: random.Random, device: torch.device) -> torch.Generator:
    return generator(device, rng.getrandbits(31))


def _laid(rng: random.Random, t: Tensor) -> Tensor:
    return LAYOUTS[rng.choice(list(LAYOUTS))](t)


def conv_shape(rng: random.Random, dtype: torch.dtype, *, friendly: bool) -> ConvShape:
    """A convolution of any geometry, or a `friendly` one that tensor descriptors may serve."""
    stride = rng.choice([1, 2])
    r = rng.choice([1, 3])
    strides, filters, padding, dilation = (stride, stride), (r, r), (r // 2, r // 2), (1, 1)
    channels = [8, 16, 24, 40, 64]
    if not friendly:
        strides = (rng.randint(1, 3), rng.randint(1, 3))
        filters = (rng.randint(1, 7), rng.randint(1, 7))
        padding = (rng.randint(0, 3), rng.randint(0, 3))
        dilation = (rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3]))
        channels = [1, 2, 3, 5, 8, 16, 24, 64, 65, 72]
    extra = rng.choice(["", "residual", "shortcut"])
    short = rng.choice([1, 2]) if friendly else rng.randint(1, 3)
    return ConvShape(
        rng.choice([1, 2, 3, 5, 9]), rng.choice(channels), rng.choice([1, 2, 3, 5, 7, 8, 12, 13]),
        rng.choice([1, 2, 4, 6, 7, 8, 10, 11]), rng.choice(channels + [33, 48][: 2 - friendly]), *filters, strides,
        padding, dilation, dtype_id(dtype), residual=extra == "residual",
        shortcut_c=rng.choice(channels) if extra == "shortcut" else 0, shortcut_stride=(short, short),
    )  # fmt: skip


def conv_config(rng: random.Random, shape: ConvShape) -> ConvConfig:
    block_m = rng.choice([16, 32, 64, 128])
    box = None
    if supports_descriptors(shape) and rng.random() < 0.9:
        log_h = rng.randint(0, block_m.bit_length() - 1) if may_have_rows(shape, 1) else 0
        log_w = rng.randint(0, block_m.bit_length() - 1 - log_h)
        box = (1 << log_h, 1 << log_w, block_m >> (log_h + log_w))
    chosen = ConvConfig(
        block_m, rng.choice([16, 32, 64]), rng.choice([16, 32, 64]), rng.choice([4, 8]), rng.randint(1, 3), box,
        swap=box is not None and (has_several_sides(box) or rng.random() < 0.5),
    )  # fmt: skip
    split = dataclasses.replace(chosen, split_k=rng.choice([2, 3, 6]))
    return split if is_legal(split, shape, KNOWN[90]) and rng.random() < 0.5 else chosen


def conv(rng: random.Random, device: torch.device, dtype: torch.dtype) -> tuple[ConvBnRelu, ConvConfig]:
    """A convolution with a legal configuration; half of them may use tensor descriptors."""
    while True:
        shape = conv_shape(rng, dtype, friendly=rng.random() < 0.5)
        if shape.p < 1 or shape.q < 1:
            continue
        chosen = conv_config(rng, shape)
        if is_legal(chosen, shape, facts(device)) and grid_size(chosen, shape) * steps(shape, chosen) <= 64:
            break
    ragged = [rng.randint(1, s) if e > 1 else 1 for e, s in zip((shape.p, shape.q), shape.shortcut_stride, strict=True)]
    call = conv_call(
        _generator(rng, device), shape, activation=rng.choice([NONE, RELU]), affine=rng.random() < 0.8,
        short_affine=rng.random() < 0.8, bn_dtype=rng.choice([torch.float32, torch.float32, dtype, torch.float64]),
        short_size=tuple((e - 1) * s + extra for e, s, extra in
                         zip((shape.p, shape.q), shape.shortcut_stride, ragged, strict=True)),
        layout=lambda t: _laid(rng, t),
    )  # fmt: skip
    return call, chosen


def steps(shape: ConvShape, chosen: ConvConfig) -> int:
    """Iterations of a convolution's loops."""
    return shape.r * shape.s * cdiv(shape.c, chosen.block_c) + cdiv(shape.shortcut_c, chosen.block_c)


def check_conv(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    call, chosen = conv(rng, device, dtype)
    if chosen.box is not None and not is_legal(chosen, call.shape, facts(device)):  # the layouts were not known before
        chosen = without_box(chosen, call.shape, facts(device))
    assert_exact(run_conv(call, chosen), rounded(conv_reference(call), dtype), (call.shape, chosen))


def check_depthwise(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    filter, stride = (rng.randint(1, 7), rng.randint(1, 7)), (rng.randint(1, 3), rng.randint(1, 3))
    padding, dilation = (rng.randint(0, 3), rng.randint(0, 3)), (rng.choice([1, 1, 2]), rng.choice([1, 1, 2]))
    h, w = (rng.randint(max(d * (s - 1) + 1 - 2 * p, 1), 20) for s, p, d in zip(filter, padding, dilation, strict=True))
    size = rng.choice([1, 2, 5]), rng.choice([c for c in CHANNELS if c > 1]), h, w
    call = depthwise_call(
        _generator(rng, device), size, filter, Geometry(stride, padding, dilation), dtype,
        residual=rng.random() < 0.5, layout=lambda t: _laid(rng, t),
    )  # fmt: skip
    tile = rng.choice([1, 2, 4, 7]), rng.choice([16, 32, 64, 128])
    with depthwise_tiled(*tile):
        actual = run(call, kernel="conv_depthwise_kernel")
    assert_exact(actual, rounded(conv_reference(call), dtype), (size, call.geometry, tile))


def check_grouped(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    groups = rng.choice([2, 3, 5, 8, 16])
    c, k = rng.choice([1, 2, 3, 4, 8, 17, 24]), rng.choice([1, 2, 4, 5, 8, 24, 33])
    filter, stride = (rng.randint(1, 4), rng.randint(1, 4)), (rng.randint(1, 3), rng.randint(1, 3))
    padding, dilation = (rng.randint(0, 2), rng.randint(0, 2)), (rng.choice([1, 1, 2]), rng.choice([1, 1, 2]))
    h, w = (rng.randint(max(d * (s - 1) + 1 - 2 * p, 1), 10) for s, p, d in zip(filter, padding, dilation, strict=True))
    size, filters = (rng.choice([1, 2, 5]), c * groups, h, w), ((k + (c == k == 1)) * groups, *filter)
    call = grouped_call(
        _generator(rng, device), size, filters, Geometry(stride, padding, dilation, groups), dtype,
        residual=rng.random() < 0.5, layout=lambda t: _laid(rng, t),
    )  # fmt: skip
    assert_exact(run(call, kernel="conv_pointer_kernel"), rounded(conv_reference(call), dtype), (size, call.geometry))


def check_stem(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    size = (rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 3, 4]), rng.randint(1, 24), rng.randint(1, 24))
    k, affine = rng.choice([8, 16, 24, 64, 70]), rng.random() < 0.8
    call = stem_call(_generator(rng, device), *size, k, dtype, affine)
    call = dataclasses.replace(call, x=_laid(rng, call.x))
    tiles = StemConfig(rng.choice([16, 32, 64, 128]), rng.choice([16, 32, 64]), rng.choice([1, 2, 3, 100]), 4, 2)
    with mock.patch.object(config, "stem_heuristic", return_value=tiles):
        assert_exact(run(call), stem_reference(call), (size, k, tiles))


def check_max_pool(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    size, stride = (rng.randint(1, 5), rng.randint(1, 5)), (rng.randint(1, 3), rng.randint(1, 3))
    padding = (rng.randint(0, size[0] // 2), rng.randint(0, size[1] // 2))
    ceil_mode = rng.random() < 0.3
    least = [s - 2 * p - ceil_mode * (step - 1) for s, p, step in zip(size, padding, stride, strict=True)]
    h, w = (rng.randint(max(pixels, 1), 14) for pixels in least)
    x = integers(_generator(rng, device), 9, rng.choice([1, 2, 5]), rng.choice(CHANNELS), h, w, dtype=dtype)
    x = _laid(rng, x - 20)  # a padding of zeros would win
    expected = F.max_pool2d(x.double(), size, stride, padding, ceil_mode=ceil_mode).to(dtype)
    note = (x.shape, size, stride, padding, ceil_mode)
    assert_exact(run(MaxPool2d(x, size, stride, padding, ceil_mode)), expected, note)


def check_global_avg_pool(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    """Sums that are multiples of the number of pixels, so that means are whole."""
    g, (n, c) = _generator(rng, device), (rng.choice([1, 2, 5]), rng.choice(CHANNELS))
    deviation = integers(g, 9, n, c, rng.randint(1, 12), rng.randint(1, 12))
    x = _laid(rng, (integers(g, 50, n, c, 1, 1) + deviation - deviation.flip(2, 3)).to(dtype))
    assert_exact(run(GlobalAvgPool(x)), rounded(x.double().mean((2, 3), keepdim=True), dtype), x.shape)


def check_add_relu(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    g = _generator(rng, device)
    shape = rng.choice([1, 2, 5]), rng.choice(CHANNELS), rng.randint(1, 9), rng.randint(1, 9)
    x, other = (_laid(rng, integers(g, 9, *shape, dtype=dtype)) for _ in range(2))
    assert_exact(run(AddRelu(x, other)), rounded((x.double() + other.double()).relu(), dtype), shape)


def check_linear(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    g, (m, c, k) = _generator(rng, device), (rng.randint(1, 130), rng.randint(1, 300), rng.randint(1, 70))
    x, w = integers(g, 3, m, c, dtype=dtype), integers(g, 2, k, c, dtype=dtype)
    x, w = (rng.choice([lambda t: t, lambda t: t.T.contiguous().T, lambda t: t.repeat(2, 1)[::2]])(t) for t in (x, w))
    bias = integers(g, 9, k, dtype=dtype) if rng.random() < 0.7 else None
    expected = x.double() @ w.double().T + (0 if bias is None else bias.double())
    assert_exact(run(Linear(x, w, bias)), rounded(expected, dtype), (m, c, k))


def check_avg_pool_linear(rng: random.Random, device: torch.device, dtype: torch.dtype) -> None:
    """Every pixel of a channel the same: means are whole, and so are the products. Both forms of the head."""
    g, (n, c, k) = _generator(rng, device), (rng.choice([1, 2, 16, 17]), rng.choice(CHANNELS), rng.randint(1, 70))
    x = _laid(rng, integers(g, 3, n, c, 1, 1, dtype=dtype).expand(n, c, rng.randint(1, 9), rng.randint(1, 9)))
    weight, bias = integers(g, 2, k, c, dtype=dtype), integers(g, 4, k, dtype=dtype) if rng.random() < 0.7 else None
    expected = x[:, :, 0, 0].double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_exact(run(AvgPoolLinear(x, weight, bias)), rounded(expected, dtype), (x.shape, k))


CHECKS: dict[str, Check] = {
    "conv_bn_relu": check_conv, "depthwise": check_depthwise, "grouped": check_grouped, "stem": check_stem,
    "max_pool2d": check_max_pool, "global_avg_pool": check_global_avg_pool, "add_relu": check_add_relu,
    "linear": check_linear, "avg_pool_linear": check_avg_pool_linear,
}  # fmt: skip
"""By operator."""
