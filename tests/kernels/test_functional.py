"""resnet_triton.functional against torch.nn.functional beyond `contract/`: geometries, options, bad arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from calls import WITH_SHORTCUT, small
from torch import Tensor

from resnet_triton import functional as F
from resnet_triton.ops import dispatch

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32 here. By the older flag: torch.export refuses to run once the newer one is set (torch 2.13)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def ran() -> Callable[[], dict[tuple[str, str], int]]:
    """Calls counted since the test began."""
    before = Counter(dispatch.calls)
    return lambda: dict(dispatch.calls - before)


def torch_conv(
    x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, bn_weight: Any, bn_bias: Any, eps: float, **kw: Any
) -> Tensor:
    residual, relu = kw.pop("residual", None), kw.pop("relu", True)
    y = TF.batch_norm(TF.conv2d(x, weight, None, **kw), mean, var, bn_weight, bn_bias, False, 0.0, eps)
    y = y if residual is None else y + residual
    return TF.relu(y) if relu else y


def torch_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return TF.linear(x.mean((2, 3)), weight, bias)


def conv_tensors(device: Any, n: int, c: int, h: int, w: int, k: int, r: int, s: int, groups: int = 1) -> list[Tensor]:
    """x, weight, mean, var, bn_weight, bn_bias in fp32."""
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w, device=device)
    weight = torch.randn(k, c // groups, r, s, device=device) / (c // groups * r * s) ** 0.5
    norm = [torch.randn(k, device=device), torch.rand(k, device=device) + 0.5]
    return [x, weight, *norm, torch.randn(k, device=device), torch.randn(k, device=device)]


# --- values ----------------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "stem": ({"n": 1, "c": 3, "h": 9, "w": 11, "k": 8, "r": 7, "s": 7}, {"stride": 2, "padding": 3}),
    "3x3": ({"n": 2, "c": 16, "h": 8, "w": 6, "k": 16, "r": 3, "s": 3}, {"padding": 1}),
    "3x3-stride2": ({"n": 2, "c": 8, "h": 6, "w": 8, "k": 16, "r": 3, "s": 3}, {"stride": 2, "padding": 1}),
    "3x3-stride2-odd": ({"n": 1, "c": 8, "h": 7, "w": 5, "k": 8, "r": 3, "s": 3}, {"stride": 2, "padding": 1}),
    "1x1": ({"n": 2, "c": 16, "h": 3, "w": 5, "k": 24, "r": 1, "s": 1}, {}),
    "1x1-stride2": ({"n": 2, "c": 16, "h": 6, "w": 4, "k": 8, "r": 1, "s": 1}, {"stride": 2}),
    "dilated": ({"n": 1, "c": 8, "h": 9, "w": 9, "k": 8, "r": 3, "s": 3}, {"padding": 2, "dilation": 2}),
    "pairs": (
        {"n": 1, "c": 5, "h": 8, "w": 9, "k": 7, "r": 1, "s": 3},
        {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    ),
    "one-channel": ({"n": 1, "c": 1, "h": 4, "w": 5, "k": 1, "r": 3, "s": 3}, {}),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_bn_relu(device, geometry, kernels):
    sizes, options = geometry
    tensors = conv_tensors(device, **sizes)
    expected = torch_conv(*(t.double() for t in tensors), 1e-3, **options)
    actual = F.conv_bn_relu(*tensors, 1e-3, **options, kernels=kernels)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu6": TF.relu6,
    "leaky_relu": lambda x: TF.leaky_relu(x, 0.3),
    "hardswish": TF.hardswish,
    "silu": TF.silu,
    "gelu": TF.gelu,
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation, kernels):
    tensors, residual = conv_tensors(device, 2, 6, 5, 4, 8, 3, 3), 3 * torch.randn(2, 8, 3, 2, device=device)
    plain = torch_conv(*tensors, 1e-5, residual=residual, relu=False)
    how: Any = {"residual": residual, "activation": activation, "negative_slope": 0.3}
    expected, actual = ACTIVATIONS[activation](plain), F.conv_bn_relu(*tensors, **how, kernels=kernels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if kernels == "torch":
        x = tensors[0].requires_grad_()
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (
            ACTIVATIONS[activation](torch_conv(*tensors, 1e-5, residual=residual, relu=False)),
            F.conv_bn_relu(*tensors, **how),
        )]  # fmt: skip
        torch.testing.assert_close(*gradients)


POOLS = {
    "stride-defaults-to-window": (2,),
    "resnet": (3, 2, 1),
    "pairs": ((3, 2), (1, 2), (1, 0)),
    "stride-larger-than-window": (1, 2),
    "keyword-none": (2, None),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("arguments", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("size", [(2, 5, 6, 7), (1, 3, 3, 3), (0, 3, 4, 4)], ids=["odd", "small", "empty-batch"])
def test_max_pool2d(device, size, arguments, kernels):
    torch.manual_seed(0)
    x = torch.randn(size, device=device) - 3  # negative: a padding of zeros would win
    if x.numel():
        x[0, 0, 1, 1], x[0, 1, 1, 1] = torch.nan, -torch.inf
    expected = TF.max_pool2d(x, *arguments)
    actual = F.max_pool2d(x, *arguments, kernels=kernels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("size", [(2, 70, 3, 5), (1, 3, 1, 1), (1, 2, 9, 8), (0, 3, 4, 4)], ids=str)
def test_global_avg_pool(device, size, kernels):
    torch.manual_seed(0)
    x = torch.randn(size, device=device)
    actual = F.global_avg_pool(x, kernels=kernels)
    torch.testing.assert_close(actual, TF.adaptive_avg_pool2d(x.double(), 1).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", [(5, 33), (33,), (2, 3, 33), (1, 33), (0, 33)], ids=str)
def test_linear(device, size, bias, kernels):
    torch.manual_seed(0)
    x, weight = torch.randn(size, device=device), torch.randn(70, 33, device=device)
    b = torch.randn(70, device=device) if bias else None
    expected = TF.linear(x.double(), weight.double(), None if b is None else b.double())
    actual = F.linear(x, weight, b, kernels=kernels)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", [(2, 33, 3, 5), (1, 7, 1, 1), (17, 9, 2, 2), (0, 33, 4, 4)], ids=str)
def test_avg_pool_linear(device, size, bias, kernels):
    torch.manual_seed(0)
    x, weight = torch.randn(size, device=device), torch.randn(70, size[1], device=device)
    b = torch.randn(70, device=device) if bias else None
    expected = torch_head(x.double(), weight.double(), None if b is None else b.double())
    actual = F.avg_pool_linear(x, weight, b, kernels=kernels)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_statistics_may_be_strided(device, kernels):
    x, weight, *norm = conv_tensors(device, 1, 4, 4, 4, 6, 1, 1)
    strided = [torch.stack([t, t + 1], dim=1)[:, 0] for t in norm]
    assert strided[0].stride() == (2,)
    expected = F.conv_bn_relu(x, weight, *norm, kernels=kernels)
    torch.testing.assert_close(F.conv_bn_relu(x, weight, *strided, kernels=kernels), expected)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("changed", [slice(4), slice(2, 4)], ids=["all", "affine"])
def test_statistics_may_be_of_another_dtype(device, changed, dtype, kernels):
    size = 258 if kernels == "torch" else 4  # large enough for batch norm in place
    x, weight, *norm = conv_tensors(device, 1, 4, size, size, 4, 1, 1)
    norm = [t.half().float() for t in norm]
    given = list(norm)
    given[changed] = [t.to(dtype) for t in norm[changed]]
    expected = F.conv_bn_relu(x, weight, *norm, kernels=kernels)
    torch.testing.assert_close(F.conv_bn_relu(x, weight, *given, kernels=kernels), expected)


# --- what the kernels do not do --------------------------------------------------------------------------------------


def test_backend_is_counted(device, ran):
    x = torch.randn(1, 4, 4, 4, device=device)
    on_gpu = torch.device(device).type == "cuda"
    F.add_relu(x, x, kernels="torch")
    F.add_relu(x, x, kernels="triton")
    F.add_relu(x, x, kernels="triton")
    F.max_pool2d(x, 2, kernels="auto")
    assert ran() == {
        ("add_relu", "torch"): 1,
        ("add_relu", "triton"): 2,
        ("max_pool2d", "triton" if on_gpu else "torch"): 1,
    }


@pytest.mark.parametrize("kernels", BACKENDS)
def test_grouped_convolution(device, kernels):
    tensors = conv_tensors(device, 2, 8, 5, 5, 12, 3, 3, groups=4)
    torch.testing.assert_close(
        F.conv_bn_relu(*tensors, padding=1, groups=4, kernels=kernels),
        torch_conv(*tensors, 1e-5, padding=1, groups=4),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kernels", BACKENDS)
def test_depthwise_convolution(device, kernels):
    *tensors, _ = conv_tensors(device, 2, 8, 9, 12, 8, 5, 7, groups=8)
    options: dict[str, Any] = {"stride": 2, "padding": 3, "groups": 8, "kernels": kernels}
    expected = torch_conv(*tensors, None, 1e-5, stride=2, padding=3, groups=8)
    torch.testing.assert_close(F.conv_bn_relu(*tensors, **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", BACKENDS)
def test_shortcut(device, kernels):
    tensors = conv_tensors(device, 2, 8, 6, 4, 12, 3, 3)
    x, weight, *norm = conv_tensors(device, 2, 5, 12, 8, 12, 1, 1)
    shortcut = F.Shortcut(x, weight, F.BatchNorm(*norm, 1e-3), (2, 2))
    other = torch_conv(x, weight, *norm, 1e-3, stride=2, relu=False)
    expected = torch_conv(*tensors, 1e-5, padding=1, residual=other)
    actual = F.conv_bn_relu(*tensors, padding=1, shortcut=shortcut, kernels=kernels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_grouped_convolution_takes_no_shortcut(device):
    x, weight, *norm = conv_tensors(device, 2, 8, 5, 9, 16, 1, 1, groups=8)
    shortcut = F.Shortcut(x, torch.randn(16, 8, 1, 1, device=device), F.BatchNorm(*norm, 1e-5), (1, 1))
    with pytest.raises(NotImplementedError, match="grouped convolution with a shortcut"):
        F.conv_bn_relu(x, weight, *norm, groups=8, shortcut=shortcut, kernels="triton")


# --- bad inputs ------------------------------------------------------------------------------------------------------


def conv(**changes: Any) -> Callable[[], Tensor]:
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 3, 3),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }
    return lambda: F.conv_bn_relu(**(arguments | changes))  # type: ignore[arg-type]


def stem(**changes: Any) -> Callable[[], Tensor]:
    arguments = {
        "x": torch.zeros(2, 4, 5, 5),
        "weight": torch.zeros(6, 4, 7, 7),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
    }
    return lambda: F.stem(**(arguments | changes))  # type: ignore[arg-type]


X = torch.zeros(2, 4, 5, 5)
HALVES: dict[str, Any] = {"pixel_mean": [0.5] * 4, "pixel_std": [0.5] * 4}
PIXELS = {"x": X.byte(), **HALVES}
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # the call, its error, and words that the message has to hold: the argument, what it is, what it should be
    "conv-weight-rank": (conv(weight=torch.zeros(6, 4)), ValueError, ["weight", "(6, 4)", "4 dimensions"]),
    "conv-groups": (conv(groups=4), ValueError, ["x", "groups=4"]),
    "conv-weight-complex": (conv(weight=torch.zeros(6, 4, 3, 3).cfloat()), TypeError, ["weight", "torch.complex64"]),
    "conv-weight-device": (conv(weight=torch.zeros(6, 4, 3, 3, device="meta")), ValueError, ["weight", "meta", "cpu"]),
    "conv-mean-device": (conv(running_mean=torch.zeros(6, device="meta")), ValueError, ["running_mean", "meta", "cpu"]),
    "conv-mean-shape": (conv(running_mean=torch.zeros(5)), ValueError, ["running_mean", "(5,)", "(6,)"]),
    "conv-var-shape": (conv(running_var=torch.ones(6, 1)), ValueError, ["running_var", "(6, 1)", "(6,)"]),
    "conv-bn-weight-shape": (conv(bn_weight=torch.ones(1)), ValueError, ["bn_weight", "(1,)", "(6,)"]),
    "conv-bn-bias-dtype": (conv(bn_bias=torch.ones(6).long()), TypeError, ["bn_bias", "torch.int64"]),
    "conv-padding": (conv(padding=-1), ValueError, ["padding", "-1"]),
    "conv-stride": (conv(stride=0), ValueError, ["stride", "0"]),
    "conv-stride-triple": (conv(stride=(1, 2, 3)), ValueError, ["stride", "(1, 2, 3)", "pair"]),
    "conv-stride-float": (conv(stride=1.5), TypeError, ["stride", "1.5", "int"]),
    "conv-shortcut": (conv(shortcut=(X, X)), TypeError, ["Shortcut", "'batch_norm' and 'stride'"]),
    "conv-shortcut-norm": (conv(shortcut=(X, X, (X, X), 1)), TypeError, ["BatchNorm", "'bn_weight'", "'eps'"]),
    "conv-shortcut-stride": (
        conv(shortcut=(X, X, (X, X, None, None, 1e-5), "2")),
        TypeError,
        ["shortcut_stride", "'2'", "pair"],
    ),
    "conv-kernels": (conv(kernels="cuda"), ValueError, ["kernels", "'cuda'", "'auto', 'torch', 'triton'"]),
    "conv-activation": (conv(activation="swish"), ValueError, ["activation", "'swish'", "'silu'"]),
    "add-device": (lambda: F.add_relu(X, X.to("meta")), ValueError, ["other", "meta", "cpu"]),
    "add-kernels": (lambda: F.add_relu(X, X, kernels="cuda"), ValueError, ["kernels", "'cuda'"]),
    "pool-padding": (lambda: F.max_pool2d(X, 2, padding=2), ValueError, ["padding", "(2, 2)", "half"]),
    "pool-window": (lambda: F.max_pool2d(X, 0), ValueError, ["kernel_size", "0"]),
    "linear-weight-rank": (lambda: F.linear(X, torch.zeros(5)), ValueError, ["weight", "(5,)", "2 dimensions"]),
    "stem-weight-rank": (stem(weight=torch.zeros(6, 4)), ValueError, ["weight", "(6, 4)", "4 dimensions"]),
    "stem-weight-size": (stem(weight=torch.zeros(6, 4, 3, 3)), ValueError, ["weight", "(6, 4, 3, 3)", "(K, C, 7, 7)"]),
    "stem-weight-integers": (stem(weight=torch.zeros(6, 4, 7, 7).int()), TypeError, ["weight", "torch.int32"]),
    "stem-weight-device": (stem(weight=torch.zeros(6, 4, 7, 7, device="meta")), ValueError, ["weight", "meta", "cpu"]),
    "stem-mean-shape": (stem(running_mean=torch.zeros(5)), ValueError, ["running_mean", "(5,)", "(6,)"]),
    "stem-var-shape": (stem(running_var=torch.ones(6, 1)), ValueError, ["running_var", "(6, 1)", "(6,)"]),
    "stem-bn-weight-shape": (stem(bn_weight=torch.ones(1)), ValueError, ["bn_weight", "(1,)", "(6,)"]),
    "stem-bn-bias-dtype": (stem(bn_bias=torch.ones(6).long()), TypeError, ["bn_bias", "torch.int64"]),
    "stem-kernels": (stem(kernels="cuda"), ValueError, ["kernels", "'cuda'"]),
    "stem-bytes-half": (stem(x=X.byte(), pixel_mean=[0.5] * 4), TypeError, ["x", "torch.uint8", "pixel_std"]),
    "stem-floats-normalised": (stem(**PIXELS | {"x": X}), TypeError, ["x", "torch.float32", "expected torch.uint8"]),
    "stem-pixel-mean": (stem(**PIXELS | {"pixel_mean": [0.5]}), ValueError, ["pixel_mean", "1 values", "expected 4"]),
    "stem-pixel-std": (stem(**PIXELS | {"pixel_std": [0.5] * 3}), ValueError, ["pixel_std", "3 values", "expected 4"]),
    "stem-pixel-text": (stem(**PIXELS | {"pixel_mean": "abc"}), TypeError, ["pixel_mean='abc'", "for each channel"]),
    "stem-pixel-number": (stem(**PIXELS | {"pixel_mean": 0.5}), TypeError, ["pixel_mean=0.5", "for each channel"]),
    "stem-bytes-channels": (
        stem(x=X[:, :3].byte(), pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3),
        ValueError,
        ["x", "3 channels", "expected 4"],
    ),
    "stem-NHWC": (
        stem(**PIXELS | {"x": torch.zeros(1, 9, 9, 4, dtype=torch.uint8)}),
        ValueError,
        ["x has 9 channels, expected 4", "; NHWC? permute(0, 3, 1, 2)"],
    ),
    "head-weight-rank": (lambda: F.avg_pool_linear(X, torch.zeros(4)), ValueError, ["weight", "(4,)", "2 dimensions"]),
    "head-device": (
        lambda: F.avg_pool_linear(X, torch.zeros(3, 4, device="meta")),
        ValueError,
        ["weight", "meta", "cpu"],
    ),
    "head-kernels": (
        lambda: F.avg_pool_linear(X, torch.zeros(3, 4), kernels="cuda"),
        ValueError,
        ["kernels", "'cuda'"],
    ),
    "linear-device": (lambda: F.linear(X, torch.zeros(3, 5, device="meta")), ValueError, ["weight", "meta", "cpu"]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_inputs_have_a_clear_error(bad):
    call, error, words = bad
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv_bn_relu(x, torch.zeros(4, 4, 1, 1), torch.zeros(4), torch.ones(4), residual=X[:, :, :1, :1]),
        lambda x: F.conv_bn_relu(x, torch.zeros(4, 4, 1, 1), torch.zeros(1), torch.ones(1)),
        lambda x: F.add_relu(x, X[:1]),
        lambda x: F.max_pool2d(x[0], 2),
        lambda x: F.global_avg_pool(x[0]),
        lambda x: F.linear(x, torch.zeros(5)),
        lambda x: F.stem(x, torch.zeros(4, 4, 5, 5), torch.zeros(4), torch.ones(4)),
        lambda x: F.stem(x, torch.zeros(4, 4, 7, 7), torch.zeros(1), torch.ones(1)),
        lambda x: F.avg_pool_linear(x, torch.zeros(3, 5)),
    ],
    ids=["conv-residual", "conv-statistics", "add", "max_pool", "average", "linear", "stem", "stem-statistics", "head"],
)
@pytest.mark.parametrize("mode", ["grad", "autocast"])
def test_bad_shapes_are_refused_in_every_mode(call, mode):
    """Whether a gradient is wanted, or autocast is on, must not decide what is a valid call."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), pytest.raises(ValueError, match="expected"):
        call(X.clone().requires_grad_(mode == "grad"))


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_convolution_has_a_residual_or_a_shortcut(device, kernels):
    call = small(WITH_SHORTCUT, device, kernels=kernels)
    with pytest.raises(ValueError, match="residual and shortcut_x are both given"):
        replace(call, residual=call.output()).run()
    named = {a.name: v for a, v in zip(call.schema.arguments, call.schema.flatten(call), strict=True)}
    with pytest.raises(ValueError, match="belong together"):
        torch.ops.resnet_triton.conv_bn_relu(**named | {"shortcut_weight": None})
